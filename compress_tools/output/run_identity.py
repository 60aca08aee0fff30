"""What makes two runs the same run: source, recipe and versions; and the machine, which can change the last bits."""

import platform
from importlib.metadata import version
from typing import Any

import torch

from compress_tools.version import __version__

# Recorded, not compared: see ``machine``.
MACHINE = "machine"


def versions() -> dict[str, str]:
    """Versions that can change the bytes.

    torch factorises, and multiplies on a GPU; numpy multiplies on a CPU, by the BLAS that comes with it
    (``products``); POT and lapx choose among assignments of equal cost; safetensors lays the file out.
    """
    return {
        "resmoe": __version__,
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "pot": version("POT"),
        "lapx": version("lapx"),
        "safetensors": version("safetensors"),
    }


def machine(device: str) -> dict[str, Any]:
    """What of this machine can change rounding: where it computes, and with which instructions.

    The number of threads can't: each expert is computed in one (``parallel``).

    Args:
        device: cpu, cuda or cuda:N.
    """
    kind = torch.device(device)
    accelerator = torch.cuda.get_device_name(kind) if kind.type == "cuda" else ""
    return {
        "device": accelerator or kind.type,
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def differences(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, str]:
    """Where two identities differ.

    Args:
        found: of an earlier run.
        expected: of this one.
    Returns:
        by part (``source``, ``recipe``, ``version``), what differs within it; empty if it is the same run.
    """
    parts = sorted((found.keys() | expected.keys()) - {MACHINE})
    return {
        part: _difference(found.get(part), expected.get(part))
        for part in parts
        if found.get(part) != expected.get(part)
    }


def _difference(found: Any, expected: Any) -> str:
    if not isinstance(found, dict) or not isinstance(expected, dict):
        return f"{_short(found)}, now {_short(expected)}"
    keys = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
    shown = [f"{key} {_short(found.get(key))}, now {_short(expected.get(key))}" for key in keys[:3]]
    return "; ".join(shown) + (f"; and {len(keys) - 3} more" if len(keys) > 3 else "")


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    # A commit is shown whole: it is what --revision takes.
    return text if len(text) <= 40 else text[:8] + "..."
