"""Changed dense checkpoints through ``compress``, ``plan`` and ``probe``: refused in a sentence, or nothing is lost."""

import json
import os
import random
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

from compress_tools.output.target import make_target
from compress_tools.pipeline import compress
from compress_tools.probe.config import make_probe_config
from compress_tools.probe.probe import probe
from compress_tools.source.reader import CONFIG_NAME, INDEX_NAME
from compress_tools.source.source_reader import SourceReader
from compress_tools.stored.verify import verify
from tests.compress_tools.test_breaches import RECIPE, Listener, same, sources, unaccounted
from tests.fuzz import mutants
from tests.fuzz.mutants import CANARY_VARIABLE, Change, Mutant
from tests.fuzz.seeds import Files, Seed, read_files
from tests.fuzz.trial import Trial

# What stands for a file that is none, in place of its content.
SPECIAL = b"\0special "


def odd_json(files: Files, pick: random.Random) -> tuple[str, bool] | None:
    """JSON that parsers read in different ways, or hardly."""
    file = pick.choice([name for name in (CONFIG_NAME, INDEX_NAME) if name in files] or [""])
    text = files.get(file, b"")
    if not text.startswith(b"{"):
        return None
    kind = pick.choice(("mark", "twice", "deep", "number", "comment", "utf-16", "nan", "trailing"))
    files[file] = {
        "mark": b"\xef\xbb\xbf" + text,
        "twice": b'{"num_experts": 3, "weight_map": {}, ' + text[1:],
        "deep": b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b", " + text[1:],
        "number": b'{"x": ' + b"9" * 5000 + b", " + text[1:],
        "comment": b"// a\n" + text,
        "utf-16": text.decode().encode("utf-16"),
        "nan": b'{"rms_norm_eps": NaN, "x": -Infinity, ' + text[1:],
        "trailing": text + b" {}",
    }[kind]
    return f"{file}: {kind}", False


def special_file(files: Files, pick: random.Random) -> tuple[str, bool] | None:
    """Something that is no plain file in the place of one: a link round in a circle, a pipe, a directory, a device."""
    file = pick.choice(sorted(files))
    kind = pick.choice(("loop", "nowhere", "pipe", "directory", "zero", "huge"))
    files[file] = SPECIAL + kind.encode()
    return f"{file}: {kind}", False


SOURCE_CHANGES: tuple[Change, ...] = (
    *(mutants.set_value, mutants.set_value, mutants.flip_bits, mutants.noise, mutants.retype, mutants.reshape),
    *(mutants.rename, mutants.drop, mutants.add, mutants.swap, mutants.edit_header, mutants.edit_header),
    *(mutants.break_header, mutants.break_file, mutants.break_file, mutants.trap, mutants.edit_config),
    *(mutants.edit_config, mutants.edit_config, mutants.edit_index, mutants.edit_index, odd_json, special_file),
)


def make_sources(folder: Path) -> list[Seed]:
    """Good dense checkpoints: several files, fp8 with scales, a draft, 3-D experts."""
    return [Seed(kind, read_files(path)) for kind, path in sources(folder).items()]


def make_source_mutant(seeds: Sequence[Seed], number: int) -> Mutant:
    """The mutant of a number: always the same one."""
    pick = random.Random(number)
    seed = pick.choice(seeds)
    return mutants.mutate(seed.name, seed.files, pick, SOURCE_CHANGES)


def try_source(mutant: Mutant, good: Files) -> Trial:
    """Put a changed source on the disk and through every command.

    Args:
        mutant: it.
        good: files of the checkpoint that it was made from.
    """
    trial = Trial(mutant)
    with tempfile.TemporaryDirectory(prefix="resmoe-fuzz-") as name:
        top = Path(name)
        os.environ[CANARY_VARIABLE] = str(top / "canary")
        folder, small, listener = _write(mutant.files, top / "mutant"), top / "small", Listener()
        trial.call("plan", lambda: make_target(SourceReader(folder), RECIPE), theirs=False)
        report = trial.call("compress", lambda: compress(folder, small, RECIPE, progress=listener), theirs=False)
        probed = trial.call(
            "probe", lambda: probe(str(folder), make_probe_config(workers=1, max_layers=2)), theirs=False
        )
        if probed is not None:
            try:
                json.dumps(probed.content(), allow_nan=False)
            except ValueError:
                trial.faults.append("probe: says a number that is none")
        if report is None:
            if small.exists():
                trial.faults.append("compress: refuses, and leaves an output")
        else:
            if trial.outcomes["plan"] != "served":
                trial.faults.append(f"plan: refuses what compress takes: {trial.sentences['plan']}")
            trial.call("verify", lambda: verify(small, folder), theirs=False)
            if trial.outcomes["verify"] != "served":
                trial.faults.append(f"verify: refuses what compress wrote: {trial.sentences.get('verify')}")
            said = [*listener.said, *report.left_out]
            lost = [what for what in unaccounted(folder, small, report) if not _is_said(what.split()[0], said)]
            trial.faults += [f"compress: drops {what} in silence" for what in lost]
            trial.faults += _differences(mutant, good, small)
        if (top / "canary").exists():
            trial.faults.append("code of the checkpoint was run")
    return trial


def _is_said(name: str, said: list[str]) -> bool:
    return any(name in text for text in said)


def _write(files: Files, folder: Path) -> Path:
    folder.mkdir()
    for name, content in files.items():
        file = folder / name
        kind = content.removeprefix(SPECIAL).decode() if content.startswith(SPECIAL) else ""
        if kind == "loop":
            file.symlink_to(file.name)
        elif kind == "nowhere":
            file.symlink_to("nothing")
        elif kind == "zero":
            file.symlink_to("/dev/zero")
        elif kind == "pipe":
            os.mkfifo(file)
        elif kind == "directory":
            file.mkdir()
        elif kind == "huge":
            file.touch()
            os.truncate(file, 2**40)
        else:
            file.write_bytes(content)
    return folder


def _tensors(files: dict[str, bytes]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, content in sorted(files.items()):
        if name.endswith(".safetensors") and not content.startswith(SPECIAL):
            try:
                found |= load(content)
            except Exception:
                continue
    return found


@cache
def _good_output(key: tuple[tuple[str, bytes], ...]) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory(prefix="resmoe-fuzz-") as name:
        folder = _write(dict(key), Path(name) / "good")
        compress(folder, Path(name) / "small", RECIPE)
        return _tensors(read_files(Path(name) / "small"))


def _differences(mutant: Mutant, good: Files, small: Path) -> list[str]:
    """Numbers that are none, and layers of the very same experts that became something else."""
    made = _tensors(read_files(small))
    found = [
        f"compress: writes NaN or Inf in {name}"
        for name, tensor in made.items()
        if tensor.is_floating_point() and not tensor.float().isfinite().all()
    ]
    if mutant.files.get(CONFIG_NAME) != good[CONFIG_NAME]:
        return found
    before, after, expected = _tensors(good), _tensors(mutant.files), _good_output(tuple(sorted(good.items())))
    for layer in range(3):
        stem = f"model.layers.{layer}.mlp.experts."
        names = {name for name in {*before, *after} if name.startswith(stem)}
        unchanged = all(name in before and name in after and same(before[name], after[name]) for name in names)
        own = [name for name in expected if name.startswith(stem)]
        if unchanged and not all(name in made and torch.equal(made[name], expected[name]) for name in own):
            found.append(f"compress: layer {layer} of the same experts is another")
    return found
