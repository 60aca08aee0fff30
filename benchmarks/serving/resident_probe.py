"""Count expert bytes where they live: a measurement-only vLLM plugin that the benchmarks add to a server's processes.

It works for any model that vLLM serves, compressed or not, and neither changes vLLM nor listens on anything: each
process that builds MoE layers rewrites one small file. `Reader` adds it to a server's environment and sums the files.
"""

import json
import os
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

REPORT_DIR = "RESMOE_RESIDENT_REPORT_DIR"
INTERVAL_S = 0.5
# vLLM's owner of the routed experts' parameters.
EXPERTS_CLASS = "RoutedExperts"

_seen: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
_lock = threading.Lock()


def register() -> None:
    """Entry point `vllm.general_plugins`; repeatable. Notes every experts module that this process builds."""
    if not getattr(register, "done", False):
        register.done = True
        register_module_parameter_registration_hook(_note)


def expert_bytes(module: torch.nn.Module) -> int:
    """Bytes of storage behind a module: parameters, buffers, and tensors held as plain attributes or by its method."""
    storages = {}
    for tensor in _tensors(module):
        storage = tensor.untyped_storage()
        if tensor.device.type != "meta" and storage.nbytes():
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Reader:
    """The measuring side: prepares a server's environment, then reads what its processes report.

    Args:
        directory: empty or missing; holds the plugin's metadata and the reports.
    """

    def __init__(self, directory: Path) -> None:
        self._reports = directory / "reports"
        self._metadata = directory / "plugin"
        self._reports.mkdir(parents=True)
        info = self._metadata / "resmoe_resident_probe-0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: resmoe-resident-probe\nVersion: 0\n")
        entry = f"[vllm.general_plugins]\nresmoe_resident_probe = {__name__}:register\n"
        (info / "entry_points.txt").write_text(entry)

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """The environment with which a server carries the plugin."""
        repo = Path(__file__).resolve().parents[2]
        path = os.pathsep.join(filter(None, [str(self._metadata), str(repo), base.get("PYTHONPATH", "")]))
        return {**base, "PYTHONPATH": path, REPORT_DIR: str(self._reports)}

    def read(self, timeout_s: float = 30) -> dict[str, int]:
        """Bytes by layer name, over all processes, from reports made after this call.

        Raises:
            TimeoutError: no process reported in time.
        """
        asked = time.time()
        while time.time() < asked + timeout_s:
            reports = [json.loads(path.read_text()) for path in self._reports.glob("*.json")]
            if reports and all(report["time"] > asked for report in reports):
                layers = {name for report in reports for name in report["layers"]}
                return {n: sum(r["layers"].get(n, 0) for r in reports) for n in sorted(layers)}
            time.sleep(INTERVAL_S / 2)
        raise TimeoutError(f"no server process reported its MoE layers within {timeout_s:.0f} s")


def _note(module: torch.nn.Module, _name: str, _param: torch.nn.Parameter | None) -> None:
    if any(base.__name__ == EXPERTS_CLASS for base in type(module).__mro__):
        with _lock:
            first = not _seen
            _seen.add(module)
        if first:
            threading.Thread(target=_report_forever, daemon=True).start()


def _report_forever() -> None:
    path = Path(os.environ[REPORT_DIR]) / f"{os.getpid()}.json"
    while True:
        time.sleep(INTERVAL_S)
        with _lock:
            modules = list(_seen)
        layers = {getattr(module, "layer_name", ""): expert_bytes(module) for module in modules}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"time": time.time(), "layers": layers}))
        partial.rename(path)


def _tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from list(module.parameters())
    yield from list(module.buffers())
    for owner in (module, getattr(module, "quant_method", None)):
        for value in list(getattr(owner, "__dict__", {}).values()):
            if isinstance(value, torch.Tensor):
                yield value
