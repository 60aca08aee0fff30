"""The models that benchmarks serve: a reference model trained here, and its compressed forms by `resmoe compress`."""

import json
import shlex
import shutil
import struct
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from benchmarks.models.reference_models import ReferenceModelConfig, build_reference_model
from benchmarks.models.reference_models.__main__ import RichProgress
from benchmarks.models.reference_models.build import RECIPE_FILE
from compress_tools.errors import ResMoEError


def ensure_reference_model(config: ReferenceModelConfig, model_dir: Path, console: Console) -> None:
    """Train a reference model into `model_dir`, unless the same recipe's model is already there."""
    recipe = model_dir / RECIPE_FILE
    if recipe.exists() and json.loads(recipe.read_text())["config"] == config.model_dump():
        console.print(f"{model_dir} already holds this recipe's model; remove it to train it again", highlight=False)
        return
    shutil.rmtree(model_dir, ignore_errors=True)
    model_dir.parent.mkdir(parents=True, exist_ok=True)
    with RichProgress() as progress:
        build_reference_model(config, model_dir, progress)


def compress(source: Path, target: Path, *options: str, console: Console) -> None:
    """Run `resmoe compress SOURCE TARGET OPTIONS` as a process of its own; its progress goes to the terminal.

    Raises:
        ResMoEError: it failed; the reason is on stderr, from the command itself.
    """
    arguments = ["compress", str(source), str(target), *options]
    console.print("$ " + shlex.join(["resmoe", *arguments]), highlight=False)
    command = [sys.executable, "-m", "compress_tools", *arguments, "--overwrite"]
    # Its result goes to stderr with ours, so that stdout carries nothing but the benchmark's own result.
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    if done.returncode:
        raise ResMoEError(f"`{shlex.join(command)}` ended with exit code {done.returncode}")


def expert_bytes_on_disk(model_dir: Path) -> int:
    """Bytes of everything stored for routed experts: weights, or centers, masks, values and factors."""
    return sum(
        end - begin
        for shard in sorted(model_dir.glob("*.safetensors"))
        for name, (begin, end) in _data_offsets(shard).items()
        if ".experts." in name
    )


def _data_offsets(shard: Path) -> dict[str, tuple[int, int]]:
    with shard.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
