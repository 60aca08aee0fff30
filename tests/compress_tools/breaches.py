"""Random breaches of a checkpoint: a tensor or file dropped, renamed, doubled, retyped, reshaped, cut, or edited.

Each takes a directory and a seeded generator, changes one thing, and says what it did; None where it found nothing to
change.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress_tools.source.reader import INDEX_NAME

Breach = Callable[[Path, random.Random], str | None]

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
VALUES = (None, True, -1, 0, 1, 3, 10**12, 1e308, "", "x", "\x00", [], [1], {}, {"a": 1})
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4873\n"


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def all_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def edit_tensors(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    kept = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(kept, file, metadata={"format": "pt"})


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def update_index(folder: Path) -> None:
    """Make the index say what the shards hold."""
    if (folder / INDEX_NAME).is_file():
        found = {name: file.name for file in weight_files(folder) for name in load_file(file)}
        edit_json(folder / INDEX_NAME, lambda index: index.update(weight_map=found))


def some_tensor(folder: Path, pick: random.Random) -> tuple[Path, str]:
    file = pick.choice([file for file in weight_files(folder) if load_file(file)])
    return file, pick.choice(sorted(load_file(file)))


# Tensors. A careful hand brings the index up to date, a careless one does not.


def drop_tensor(folder: Path, pick: random.Random) -> str:
    file, name = some_tensor(folder, pick)
    edit_tensors(file, lambda tensors: tensors.pop(name))
    if pick.random() < 0.7:
        update_index(folder)
    return f"dropped {name}"


def rename_tensor(folder: Path, pick: random.Random) -> str:
    file, name = some_tensor(folder, pick)
    other = pick.choice([f"{name}.old", f"old.{name}", name.replace("0", "7"), name.replace("weight", "weigth_")])
    other = f"{name}_" if other == name else other
    edit_tensors(file, lambda tensors: tensors.update({other: tensors.pop(name)}))
    if pick.random() < 0.7:
        update_index(folder)
    return f"renamed {name} to {other}"


def retype_tensor(folder: Path, pick: random.Random) -> str | None:
    file, name = some_tensor(folder, pick)
    dtype = pick.choice(DTYPES)
    if load_file(file)[name].dtype == dtype:
        return None
    edit_tensors(file, lambda tensors: tensors.update({name: tensors[name].float().to(dtype)}))
    return f"retyped {name} to {dtype}"


def reshape_tensor(folder: Path, pick: random.Random) -> str | None:
    file, name = some_tensor(folder, pick)
    tensor = load_file(file)[name]
    shapes = [tensor.reshape(-1), tensor[None], tensor[..., None], tensor[:-1], tensor.flatten()[:0], tensor.T]
    other = pick.choice(shapes) if tensor.dim() else tensor[None]
    if other.shape == tensor.shape:
        return None
    edit_tensors(file, lambda tensors: tensors.update({name: other}))
    return f"reshaped {name} from {list(tensor.shape)} to {list(other.shape)}"


def double_tensor(folder: Path, pick: random.Random) -> str | None:
    file, name = some_tensor(folder, pick)
    others = [other for other in weight_files(folder) if other != file]
    if not others:
        return None
    other, factor = pick.choice(others), pick.choice([1, -1])
    tensor = load_file(file)[name]
    double = tensor if factor == 1 else (-tensor.float()).to(tensor.dtype)
    edit_tensors(other, lambda tensors: tensors.update({name: double}))
    return f"doubled {name} into {other.name}, times {factor}"


def move_tensor(folder: Path, pick: random.Random) -> str | None:
    file, name = some_tensor(folder, pick)
    others = [other for other in weight_files(folder) if other != file]
    if not others:
        return None
    other, tensor = pick.choice(others), load_file(file)[name]
    edit_tensors(file, lambda tensors: tensors.pop(name))
    edit_tensors(other, lambda tensors: tensors.update({name: tensor}))
    return f"moved {name} to {other.name}"


def swap_tensors(folder: Path, pick: random.Random) -> str | None:
    file, name = some_tensor(folder, pick)
    tensors = load_file(file)
    alike = [
        other
        for other in sorted(tensors)
        if (tensors[other].shape, tensors[other].dtype) == (tensors[name].shape, tensors[name].dtype)
        and not torch.equal(tensors[other].float(), tensors[name].float())
    ]
    if not alike:
        return None
    other = pick.choice(alike)
    edit_tensors(file, lambda tensors: tensors.update({name: tensors[other], other: tensors[name].clone()}))
    return f"swapped {name} and {other}"


def spoil_tensor(folder: Path, pick: random.Random) -> str | None:
    file, name = some_tensor(folder, pick)
    tensor = load_file(file)[name]
    if not tensor.is_floating_point() or tensor.itemsize < 2 or not tensor.numel():
        return None
    value = pick.choice([float("nan"), float("inf")])
    edit_tensors(file, lambda tensors: tensors[name].view(-1).__setitem__(pick.randrange(tensor.numel()), value))
    return f"put {value} into {name}"


def add_tensor(folder: Path, pick: random.Random) -> str:
    file, name = some_tensor(folder, pick)
    other = pick.choice(["extra", "model.layers.0.extra.weight", f"{name}.resmoe_values", "model.layers.9.x.weight"])
    edit_tensors(file, lambda tensors: tensors.update({other: torch.ones(2)}))
    if pick.random() < 0.5:
        update_index(folder)
    return f"added {other}"


# Files.


def drop_file(folder: Path, pick: random.Random) -> str:
    file = pick.choice(all_files(folder))
    file.unlink()
    return f"dropped {file.relative_to(folder)}"


def rename_file(folder: Path, pick: random.Random) -> str:
    file = pick.choice(all_files(folder))
    other = file.with_name(pick.choice([f"{file.name}.bak", f"old-{file.name}", "model.safetensors", "README.md"]))
    if other.exists():
        other = file.with_name(f"{file.name}.bak")
    file.rename(other)
    return f"renamed {file.relative_to(folder)} to {other.name}"


def double_file(folder: Path, pick: random.Random) -> str:
    file = pick.choice(all_files(folder))
    names = [f"copy-{file.name}", "model.safetensors", "model-00009-of-00009.safetensors", "SOURCE_README.md"]
    other = file.with_name(pick.choice(names))
    if other.exists():
        other = file.with_name(f"copy-{file.name}")
    shutil.copyfile(file, other)
    return f"copied {file.relative_to(folder)} to {other.name}"


def replace_file(folder: Path, pick: random.Random) -> str:
    file = pick.choice(all_files(folder))
    kind, content = pick.choice(["directory", "link", "pointer", "empty", "noise", "cut", "flipped"]), file.read_bytes()
    file.unlink()
    if kind == "directory":
        file.mkdir()
    elif kind == "link":
        file.symlink_to(folder / "nothing")
    else:
        changed = bytearray(content)
        for _ in range(8 if content else 0):
            changed[pick.randrange(len(changed))] ^= 1 << pick.randrange(8)
        cut = content[: pick.randrange(len(content) + 1)]
        kinds = {"pointer": POINTER, "empty": b"", "noise": pick.randbytes(200), "cut": cut, "flipped": bytes(changed)}
        file.write_bytes(kinds[kind])
    return f"{kind} in place of {file.relative_to(folder)}"


# Index and config.


def edit_index(folder: Path, pick: random.Random) -> str | None:
    file = folder / INDEX_NAME
    if not file.is_file():
        return None
    weight_map = json.loads(file.read_text())["weight_map"]
    name, other = pick.choice(sorted(weight_map)), pick.choice(sorted(set(weight_map.values())))
    shard = pick.choice(sorted(set(weight_map.values())))
    changes: dict[str, Callable[[dict[str, Any]], object]] = {
        f"{name} left out": lambda index: index["weight_map"].pop(name),
        f"{name} in {other}": lambda index: index["weight_map"].update({name: other}),
        f"{name} in a file that is not there": lambda index: index["weight_map"].update({name: "x.safetensors"}),
        "a tensor that is not there": lambda index: index["weight_map"].update({"gone": other}),
        f"{shard} left out": lambda index: index.update(
            weight_map={key: value for key, value in index["weight_map"].items() if value != shard}
        ),
        "no map": lambda index: index.pop("weight_map"),
        "an odd map": lambda index: index.update(weight_map=pick.choice(VALUES)),
        f"odd place of {name}": lambda index: index["weight_map"].update({name: pick.choice(VALUES)}),
    }
    what = pick.choice(sorted(changes))
    if what == f"{name} in {other}" and weight_map[name] == other:
        return None
    edit_json(file, changes[what])
    return f"index: {what}"


def paths_in(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from paths_in(inner, (*path, key))


def edit_config(folder: Path, pick: random.Random) -> str | None:
    file = folder / "config.json"
    content = json.loads(file.read_text())
    *path, last = pick.choice(list(paths_in(content)))
    value, drop = pick.choice(VALUES), pick.random() < 0.4
    place = content
    for key in path:
        place = place[key]
    if not drop and type(place[last]) is type(value) and place[last] == value:
        return None
    if drop:
        del place[last]
    else:
        place[last] = value
    file.write_text(json.dumps(content))
    return f"config: {'.'.join(map(str, [*path, last]))} {'dropped' if drop else f'= {value!r}'}"


BREACHES: tuple[Breach, ...] = (
    drop_tensor,
    rename_tensor,
    retype_tensor,
    reshape_tensor,
    double_tensor,
    move_tensor,
    swap_tensors,
    spoil_tensor,
    add_tensor,
    drop_file,
    rename_file,
    double_file,
    replace_file,
    edit_index,
    edit_config,
)


def breach(folder: Path, seed: int) -> str:
    """Change one thing of a checkpoint; every kind of change has its turn."""
    pick = random.Random(seed)
    for number in range(len(BREACHES)):
        if done := BREACHES[(seed + number) % len(BREACHES)](folder, pick):
            return done
    raise AssertionError("nothing to change")
