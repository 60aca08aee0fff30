"""vLLM's CUDA build with the plugin, its Python side alone: every family's model built without a GPU, on no device.

    python -m benchmarks.vllm_cuda write DIR                    # where transformers and compress_tools are
    python -m benchmarks.vllm_cuda check DIR --json rows.json   # where a CUDA build of vLLM is

The first writes a tiny config.json of each family, with the block of a compressed checkpoint. The second puts a
stand-in in place of vLLM's platform, which says that it is an H100, builds each model on the meta device, and looks at
what the plugin made: the method of each MoE layer, its parameters, a traced call of the op. Parameters have no memory
and no kernel runs. Each family is a process of its own, forked where vLLM is imported. Compiled parts of vLLM that
can't be loaded are left out.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from benchmarks.harness.rows import Row, print_rows, write_rows

SECONDS = 240
# Attention of the published models: vLLM's GPU backends take these alone, and the weights are nowhere.
MLA_SIZES = {"qk_nope_head_dim": 128, "v_head_dim": 128, "qk_head_dim": 192}
_LIBRARIES: list[Any] = []


def write(folder: Path) -> None:
    """One folder for each family that vLLM serves."""
    import torch

    from benchmarks.models.tiny_models import save_tiny_model
    from compress_tools.architectures.registry import ARCHITECTURES
    from compress_tools.config import make_config
    from compress_tools.output.outline import make_outline
    from compress_tools.output.target import make_target
    from compress_tools.source.reader import CheckpointReader

    config = make_config(method="low-rank", center_bits=8)
    for architecture in ARCHITECTURES:
        family = architecture.model_type
        if not architecture.served_here or (folder / family).exists():
            continue
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch) / "source"
            save_tiny_model(family, source, torch.bfloat16)
            outline = make_outline(source, config.recipe(), make_target(CheckpointReader(source), config))
            (folder / family).mkdir(parents=True)
            sizes = {name: size for name, size in MLA_SIZES.items() if name in outline.config}
            (folder / family / "config.json").write_text(json.dumps(outline.config | sizes))
            for file in source.glob("*.py"):
                (folder / family / file.name).write_text(file.read_text())
        print(family, flush=True)


class Absent(ModuleType):
    """A compiled part that is not here: whatever is asked of it is not supported."""

    def __getattr__(self, name: str) -> Any:
        """A function that says no."""
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *given, **options: False  # noqa: ARG005 -- any function


def answer_no() -> None:
    """What vLLM asks its compiled parts while it is imported, where they are not loaded: they support nothing."""
    import torch

    # the library's life is the operators'
    _LIBRARIES.append(torch.library.Library("_C", "FRAGMENT"))
    for name in ("scaled_mm_supports_fp8", "scaled_mm_supports_block_fp8", "group_gemm_supported"):
        if not hasattr(torch.ops._C, f"cutlass_{name}"):
            _LIBRARIES[0].define(f"cutlass_{name}(int capability) -> bool")
            _LIBRARIES[0].impl(f"cutlass_{name}", lambda capability: False, "CompositeExplicitAutograd")  # noqa: ARG005


def name_absent_operators() -> None:
    """Layers keep operators of vLLM's compiled parts when they are made; those not loaded here are names alone."""
    import torch

    namespace = type(torch.ops._C)
    plain = namespace.__getattr__

    def get(self: Any, name: str) -> Any:
        try:
            return plain(self, name)
        except AttributeError:
            if self.name not in ("_C", "_moe_C", "_C_cache_ops") or name.startswith("__"):
                raise
            return Absent(f"{self.name}.{name}")

    namespace.__getattr__ = get


def leave_out(*modules: str) -> None:
    """Put names alone in place of those that can't be loaded here."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as err:
            print(f"left out: {name}: {err}", file=sys.stderr)
            sys.modules[name] = Absent(name)


def stand_in() -> None:
    """Put a platform that says it is an H100 in vLLM's place for one; before anything of vLLM asks for it."""
    # vLLM has no use for Triton unless it finds a driver, or this says that there will be one
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch
    import vllm.platforms
    from vllm.platforms.interface import DeviceCapability

    leave_out("vllm._C_stable_libtorch", "vllm.vllm_flash_attn", "vllm.vllm_flash_attn.flash_attn_interface")
    answer_no()
    import vllm._custom_ops

    name_absent_operators()
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(  # noqa: ARG005 -- torch's signature
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30,
        warp_size=32, shared_memory_per_block_optin=232448, L2_cache_size=50 * 2**20, regs_per_multiprocessor=65536,
    )  # fmt: skip
    torch.cuda.get_device_capability = lambda device=None: (9, 0)  # noqa: ARG005 -- torch's signature
    torch.cuda.current_device = lambda: 0
    # of the shared experts, made and never used
    for name in ("Stream", "Event"):
        setattr(torch.cuda, name, type(name, (), {"__init__": lambda self, *given, **options: None}))  # noqa: ARG005
    from vllm.platforms.cuda import NonNvmlCudaPlatform

    class StandIn(NonNvmlCudaPlatform):  # type: ignore[misc, valid-type]  # vLLM's class
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:  # noqa: ARG003 -- vLLM's signature
            return DeviceCapability(9, 0)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:  # noqa: ARG003 -- vLLM's signature
            return "NVIDIA H100 80GB HBM3"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:  # noqa: ARG003 -- vLLM's signature
            return 80 * 2**30

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:  # noqa: ARG003 -- vLLM's signature
            return 132

        @classmethod
        def device_count(cls) -> int:
            return 1

        @classmethod
        def current_device(cls) -> torch.device:
            return torch.device("meta")

        @classmethod
        def set_device(cls, device: Any) -> None:
            """There is none."""

    vllm.platforms._current_platform = StandIn()


def prepare() -> None:
    """Import all that building a model takes, once for all families."""
    stand_in()
    import vllm.distributed
    import vllm.engine.arg_utils
    import vllm.model_executor.model_loader.utils  # noqa: F401 -- for the processes that are forked from here
    from vllm.model_executor.models import registry

    import resmoe_vllm

    # it looks at a model's class in a process of its own, where the stand-in is not
    registry._run_in_subprocess = lambda function: function()
    resmoe_vllm.register()


def build(model_dir: Path) -> dict[str, Any]:
    """One family: what was built."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    from resmoe_vllm.fused_moe import ResMoEFusedMoEMethod

    args = EngineArgs(
        model=str(model_dir), skip_tokenizer_init=True, enforce_eager=True, max_model_len=64, trust_remote_code=True,
        dtype="bfloat16", load_format="dummy",
    )  # fmt: skip
    config = args.create_engine_config()
    # for what vLLM builds from transformers' classes
    config.device_config.device = torch.device("meta")
    with set_current_vllm_config(config), tempfile.TemporaryDirectory() as scratch:
        init_distributed_environment(1, 0, f"file://{scratch}/store", 0, "gloo")
        initialize_model_parallel(1, 1)
        with torch.device("meta"):
            torch.set_default_dtype(torch.bfloat16)
            model = initialize_model(vllm_config=config)
        methods = [
            (module, module.quant_method)
            for module in model.modules()
            if isinstance(getattr(module, "quant_method", None), ResMoEFusedMoEMethod)
        ]
        traced = sum(trace(layer, method) for layer, method in methods)
    stored = sum(
        parameter.numel() for layer, _ in methods for name, parameter in layer.named_parameters() if "resmoe" in name
    )
    return {"layers": len(methods), "traced": traced, "parameters": stored, "model": type(model).__name__}


def trace(layer: Any, method: Any) -> bool:
    """Whether a call of the op gives what its trace says, on no device."""
    import torch

    x = torch.empty(7, method.fmt.hidden_size, dtype=torch.bfloat16, device="meta")
    ids = torch.empty(7, layer.top_k, dtype=torch.int32, device="meta")
    weights = torch.empty(7, layer.top_k, device="meta")
    out = method.apply(layer, x, weights, ids)
    return out.shape == x.shape and out.dtype == x.dtype and out.device == x.device


def send_built(model_dir: Path, sender: Connection) -> None:
    """In a process of its own: build, and say what was built or what was wrong."""
    try:
        sender.send(build(model_dir))
    except Exception as err:
        # whatever vLLM raises is a finding
        sender.send({"said": f"{type(err).__name__}: {err}"})


def built_apart(model_dir: Path) -> dict[str, Any]:
    """What ``build`` gives, in a process of its own and in bounded time; ``said``: why nothing was built."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_built, args=(model_dir, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(SECONDS):
            return {"said": f"not built within {SECONDS} s"}
        found: dict[str, Any] = receiver.recv()
    except EOFError:
        process.join()
        return {"said": f"the process ended with {process.exitcode}"}
    else:
        return found
    finally:
        process.kill()
        process.join()


def check(folder: Path, families: list[str] | None, file: Path | None) -> list[Row]:
    """Every family, each in a process of its own; rows are written as they come."""
    prepare()
    rows = []
    for model_dir in sorted(path for path in folder.iterdir() if (path / "config.json").exists()):
        if families and model_dir.name not in families:
            continue
        expected = len(json.loads((model_dir / "config.json").read_text())["quantization_config"]["layers"])
        context = {"said": None, **built_apart(model_dir)}
        count = context.get("traced", 0)
        rows.append(Row.at_least(f"{model_dir.name}: MoE layers built and traced", count, "", expected, **context))
        print(rows[-1].name, count, "of", expected, context["said"] or "", flush=True)
        if file is not None:
            write_rows(rows, file)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Write or check; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vllm_cuda", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["write", "check"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", nargs="+", help="default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    options = parser.parse_args(argv)
    if options.what == "write":
        write(options.folder)
        return 0
    rows = check(options.folder, options.family, options.json)
    print_rows(rows, title="vLLM's CUDA build, models on no device")
    return 0 if all(row.met for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
