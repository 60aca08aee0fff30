"""Structured changes of a checkpoint's files: what a stranger, or a bad disk, could make of them."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

from compress_tools.format.tensors import ROLES, is_resmoe_name
from compress_tools.report import REPORT_NAME
from compress_tools.source.reader import CONFIG_NAME, INDEX_NAME
from tests.fuzz.seeds import Files

# What runs when somebody trusts it: a mutant that carries it must never make the file that it names.
CANARY_VARIABLE = "RESMOE_FUZZ_CANARY"
CANARY_CODE = f"import os\nopen(os.environ[{CANARY_VARIABLE!r}], 'w').close()\n"
# os.open(getenv(CANARY), O_CREAT|O_WRONLY) by pickle's own opcodes: `torch.load` without weights_only runs it.
CANARY_PICKLE = (
    b"cposix\nsystem\n(S'touch \"$" + CANARY_VARIABLE.encode() + b"\"'\ntR."
)  # fmt: skip

DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "I64", "I32", "I16", "I8", "U8", "BOOL", "F4", "Q9", "")
BYTES_OF = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
ODD = (None, True, False, -1, 0, 1, 2, 3, 7, 1.5, 1e308, "", "x", "\x00", "../x", [], [1], [[]], {}, {"a": 1})
LARGE = (2**15, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**12, 10**30)
# Patterns of 16 bits: NaN, infinities, the largest and smallest numbers of bfloat16 and float16, minus zero.
WORDS = (0x7FC0, 0x7F80, 0xFF80, 0x7F7F, 0x7C00, 0x7BFF, 0x7E00, 0x0001, 0x8000, 0xFFFF, 0xBF80)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4873\n"


@dataclass(frozen=True)
class Mutant:
    """A changed checkpoint.

    Attributes:
        seed: name of the good checkpoint.
        files: of the changed one.
        changes: what was done, in words.
        kinds: names of the changes.
        ours: every change is of what this project defines; else some are of what any model's loader reads.
    """

    seed: str
    files: Files
    changes: tuple[str, ...]
    kinds: tuple[str, ...]
    ours: bool


class ByteRandom(random.Random):
    """Random choices that a fuzzer's bytes decide; zeros once they are used up."""

    def __new__(cls, content: bytes) -> "ByteRandom":
        return super().__new__(cls)

    def __init__(self, content: bytes) -> None:
        self._left = content
        super().__init__()

    def seed(self, *args: object, **kwargs: object) -> None:
        """Nothing: the bytes are all there is."""

    def getrandbits(self, k: int) -> int:
        """The next bits."""
        count = (k + 7) // 8
        taken, self._left = self._left[:count], self._left[count:]
        return int.from_bytes(taken.ljust(count, b"\0"), "little") % (1 << k)

    def random(self) -> float:
        """The next number below 1."""
        return self.getrandbits(16) / 2**16


class Shard:
    """A weight file taken apart: header entries by name, and bytes."""

    def __init__(self, content: bytes) -> None:
        count = int.from_bytes(content[:8], "little")
        self.header: dict[str, Any] = json.loads(content[8 : 8 + count])
        self.octets = {
            name: content[8 + count + entry["data_offsets"][0] : 8 + count + entry["data_offsets"][1]]
            for name, entry in self.header.items()
            if name != "__metadata__"
        }

    def pack(self) -> bytes:
        """A well-formed file of what the entries and bytes are now."""
        header, parts, end = {}, [], 0
        for name, octets in self.octets.items():
            entry = {**self.header[name], "data_offsets": [end, end + len(octets)]}
            header[name], end = entry, end + len(octets)
            parts.append(octets)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + b"".join(parts)


# A change edits the files and says what it did, and whether that is ours; None: nothing to change.
Change = Callable[[Files, random.Random], tuple[str, bool] | None]


def shards_of(files: Files) -> dict[str, Shard]:
    """The weight files that can still be taken apart."""
    found = {}
    for name, content in files.items():
        if name.endswith(".safetensors"):
            try:
                shard = Shard(content)
            except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
                continue
            if shard.octets:
                found[name] = shard
    return found


def _tensor(files: Files, pick: random.Random) -> tuple[str, Shard, str] | None:
    """File, shard and name; one of ours four times of five."""
    shards = shards_of(files)
    if not shards:
        return None
    every = [(file, name) for file, shard in shards.items() for name in shard.octets]
    own = [place for place in every if is_resmoe_name(place[1])]
    file, name = pick.choice(own if own and pick.random() < 0.8 else every)
    return file, shards[file], name


def _keep_index(files: Files, pick: random.Random) -> None:
    """A careful hand brings the index up to date."""
    if INDEX_NAME in files and pick.random() < 0.7:
        found = {name: file for file, shard in shards_of(files).items() for name in shard.octets}
        files[INDEX_NAME] = json.dumps({"metadata": {}, "weight_map": found}).encode()


def on_a_tensor(*, keep_index: bool = False) -> Callable[[Callable[[Shard, str, random.Random], str | None]], Change]:
    """Make a mutation of what changes one tensor of a shard and says how, or None where there is nothing to change."""

    def mutation_of(change: Callable[[Shard, str, random.Random], str | None]) -> Change:
        @wraps(change)
        def mutate(files: Files, pick: random.Random) -> tuple[str, bool] | None:
            if (place := _tensor(files, pick)) is None:
                return None
            file, shard, name = place
            if (what := change(shard, name, pick)) is None:
                return None
            files[file] = shard.pack()
            if keep_index:
                _keep_index(files, pick)
            return what, is_resmoe_name(name)

        return mutate

    return mutation_of


# Values.


@on_a_tensor()
def set_value(shard: Shard, name: str, pick: random.Random) -> str | None:
    """One number of a tensor, or all, become another pattern of bits."""
    octets = bytearray(shard.octets[name])
    size = BYTES_OF.get(shard.header[name].get("dtype"), 1)
    if len(octets) < size:
        return None
    word = pick.choice(WORDS) if size > 1 else pick.choice((0, 1, 0x80, 0xFF, 0x7F, 0x55))
    pattern = word.to_bytes(2, "little").rjust(size, b"\x00") if size >= 4 else word.to_bytes(size, "little")
    where = pick.choice(("one", "one", "row", "all"))
    count = len(octets) // size
    begin = pick.randrange(count) if where != "all" else 0
    end = count if where == "all" else min(count, begin + (1 if where == "one" else 16))
    octets[begin * size : end * size] = pattern * (end - begin)
    if octets == shard.octets[name]:
        return None
    shard.octets[name] = bytes(octets)
    return f"{name}: {where} at {begin} = {word:#x}"


@on_a_tensor()
def flip_bits(shard: Shard, name: str, pick: random.Random) -> str | None:
    """Some bits of a tensor turned round."""
    octets = bytearray(shard.octets[name])
    if not octets:
        return None
    for _ in range(pick.choice((1, 1, 2, 8))):
        octets[pick.randrange(len(octets))] ^= 1 << pick.randrange(8)
    shard.octets[name] = bytes(octets)
    return f"{name}: bits flipped"


@on_a_tensor()
def noise(shard: Shard, name: str, pick: random.Random) -> str | None:
    """Random bytes in place of a tensor's."""
    shard.octets[name] = pick.randbytes(len(shard.octets[name]))
    return f"{name}: noise"


# Tensors.


@on_a_tensor()
def retype(shard: Shard, name: str, pick: random.Random) -> str | None:
    """Another dtype of the same bytes, or of as many numbers."""
    dtype, old = pick.choice(DTYPES), shard.header[name].get("dtype")
    if dtype == old:
        return None
    shard.header[name]["dtype"] = dtype
    if pick.random() < 0.5:
        count = len(shard.octets[name]) // BYTES_OF.get(old, 1)
        shard.octets[name] = (shard.octets[name] * 8)[: count * BYTES_OF.get(dtype, 1)]
    return f"{name}: {old} to {dtype}"


@on_a_tensor()
def reshape(shard: Shard, name: str, pick: random.Random) -> str | None:
    """Another shape, of as many numbers or of others."""
    old = shard.header[name].get("shape")
    # another change may have made sizes of it that are none
    if not isinstance(old, list) or not old or not all(type(size) is int for size in old):
        return None
    width = BYTES_OF.get(shard.header[name].get("dtype"), 1)
    kind = pick.choice(("turn", "flat", "deep", "less", "more", "none", "zero", "scalar"))
    new = {
        "turn": old[::-1],
        "flat": [len(shard.octets[name]) // width],
        "deep": [1, *old],
        "less": [max(0, old[0] - 1), *old[1:]],
        "more": [old[0] + 1, *old[1:]],
        "none": [0, *old[1:]],
        "zero": [*old[:-1], 0],
        "scalar": [],
    }[kind]
    if new == old:
        return None
    count = width
    for size in new:
        count *= size
    shard.header[name]["shape"] = new
    shard.octets[name] = (shard.octets[name] * 2).ljust(count, b"\0")[:count]
    return f"{name}: {old} to {new}"


@on_a_tensor(keep_index=True)
def rename(shard: Shard, name: str, pick: random.Random) -> str | None:
    """Another layer, expert, projection or suffix, or no name of ours at all."""
    stem, _, suffix = name.rpartition(".")
    other = pick.choice(
        [
            f"{stem}.{pick.choice(sorted(ROLES))}",
            f"{name}.old",
            name.replace(".0.", ".1.", 1),
            name.replace(".experts.0.", ".experts.999.", 1),
            name.replace("layers.0", "layers.7", 1),
            name.replace("gate_proj", "up_proj", 1),
            f"x.{suffix}",
            f"{stem}.\N{SNOWMAN}.{suffix}",
            "x" * 5000,
            "",
        ]
    )
    if other == name:
        return None
    shard.octets = {other if key == name else key: value for key, value in shard.octets.items()}
    shard.header[other] = shard.header.pop(name)
    return f"{name} renamed {other:.80}"


@on_a_tensor(keep_index=True)
def drop(shard: Shard, name: str, pick: random.Random) -> str | None:
    """A tensor is gone."""
    del shard.octets[name]
    return f"{name} dropped"


def add(files: Files, pick: random.Random) -> tuple[str, bool] | None:
    """A tensor more, of our suffixes or not, in this file or another."""
    if (place := _tensor(files, pick)) is None:
        return None
    file, shard, name = place
    stem = name.rpartition(".")[0]
    other = pick.choice([f"{stem}.{pick.choice(sorted(ROLES))}", "extra", "model.layers.0.extra.weight", name])
    if pick.random() < 0.5:
        file = pick.choice(sorted(shards_of(files)))
        shard = shards_of(files)[file]
    if other in shard.octets:
        return None
    shard.octets[other], shard.header[other] = b"\0" * 8, {"dtype": "U8", "shape": [8]}
    files[file] = shard.pack()
    _keep_index(files, pick)
    return f"{other} added", is_resmoe_name(other)


def swap(files: Files, pick: random.Random) -> tuple[str, bool] | None:
    """Two tensors exchange bytes and shapes, or bytes alone where they fit."""
    if (place := _tensor(files, pick)) is None:
        return None
    file, shard, name = place
    other = pick.choice(sorted(shard.octets))
    if shard.octets[other] == shard.octets[name]:
        return None
    octets, header = shard.octets, shard.header
    octets[name], octets[other] = octets[other], octets[name]
    header[name], header[other] = header[other], header[name]
    files[file] = shard.pack()
    return f"{name} and {other} swapped", is_resmoe_name(name) and is_resmoe_name(other)


# Headers and whole files.


def edit_header(files: Files, pick: random.Random) -> tuple[str, bool] | None:
    """One value of a header replaced, dropped or doubled; offsets and sizes among them."""
    file = pick.choice(sorted(name for name in files if name.endswith(".safetensors")))
    content = files[file]
    count = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + count])
    except (ValueError, RecursionError):
        return None
    text = edit_json(header, pick, every=True)
    if text is None:
        return None
    what, header = text
    packed = json.dumps(header).encode()
    files[file] = len(packed).to_bytes(8, "little") + packed + content[8 + count :]
    return f"{file}: header: {what}", True


def break_header(files: Files, pick: random.Random) -> tuple[str, bool] | None:
    """A header that is no JSON, too long, too short, too deep, or says its length wrongly."""
    file = pick.choice(sorted(name for name in files if name.endswith(".safetensors")))
    content = files[file]
    count = int.from_bytes(content[:8], "little")
    kind = pick.choice(("length", "length", "flip", "deep", "double", "utf8", "list", "spaces"))
    header, rest = bytearray(content[8 : 8 + count]), content[8 + count :]
    if not header:
        return None
    if kind == "length":
        wrong = pick.choice([0, 1, count - 1, count + 1, len(content), *LARGE])
        files[file] = (wrong % 2**64).to_bytes(8, "little") + bytes(header) + rest
        return f"{file}: header of {wrong} bytes", True
    if kind == "flip":
        header[pick.randrange(len(header))] ^= 1 << pick.randrange(8)
    elif kind == "deep":
        header = bytearray(b'{"a":' * 20000)
    elif kind == "double":
        header = bytearray(b"{" + bytes(header[1:-1]) + b"," + bytes(header[1:]))
    elif kind == "utf8":
        header[pick.randrange(len(header))] = 0xFF
    elif kind == "list":
        header = bytearray(json.dumps(pick.choice(ODD)).encode())
    else:
        header += b" " * pick.choice((1, 7, 5000))
    files[file] = len(header).to_bytes(8, "little") + bytes(header) + rest
    return f"{file}: header: {kind}", True


def break_file(files: Files, pick: random.Random) -> tuple[str, bool] | None:
    """A file cut, longer, empty, gone, or something else altogether."""
    file = pick.choice(sorted(files))
    kind, content = pick.choice(("cut", "cut", "more", "empty", "gone", "noise", "pointer", "flip", "zip")), files[file]
    if kind == "gone":
        del files[file]
    else:
        flipped = bytearray(content)
        for _ in range(pick.randrange(1, 20)):
            if flipped:
                flipped[pick.randrange(len(flipped))] ^= 1 << pick.randrange(8)
        files[file] = {
            "cut": content[: pick.randrange(len(content) + 1)],
            "more": content + pick.randbytes(pick.randrange(1, 200)),
            "empty": b"",
            "noise": pick.randbytes(200),
            "pointer": POINTER,
            "flip": bytes(flipped),
            "zip": b"PK\3\4" + content[4:],
        }[kind]
    return f"{file}: {kind}", file == REPORT_NAME or file.endswith(".safetensors")


def trap(files: Files, pick: random.Random) -> tuple[str, bool] | None:
    """Code that a loader could run: modules of its own, and pickles in place of weights."""
    try:
        config = json.loads(files[CONFIG_NAME])
    except (KeyError, ValueError):
        return None
    if not isinstance(config, dict):
        return None
    kind = pick.choice(("auto_map", "block", "pickle", "pickles alone"))
    files["trap.py"] = CANARY_CODE.encode()
    mapped = {"AutoConfig": "trap.Config", "AutoModelForCausalLM": "trap.Model", "AutoModel": "trap.Model"}
    if kind == "auto_map":
        config["auto_map"] = mapped
        config["model_type"] = pick.choice([config.get("model_type"), "trapped"])
    elif kind == "block" and isinstance(config.get("quantization_config"), dict):
        config["quantization_config"]["auto_map"] = {"AutoQuantizationConfig": "trap.Config"}
    files[CONFIG_NAME] = json.dumps(config).encode()
    if kind.startswith("pickle"):
        files["pytorch_model.bin"] = CANARY_PICKLE
        files["model-00001-of-00001.pt"] = CANARY_PICKLE
        if kind == "pickles alone":
            for name in [name for name in files if name.endswith(".safetensors") or name == INDEX_NAME]:
                del files[name]
        else:
            config["transformers_weights"] = "pytorch_model.bin"
            files[CONFIG_NAME] = json.dumps(config).encode()
    return f"trap: {kind}", False


# JSON.


def paths_in(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every place in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from paths_in(inner, (*path, key))


def _near(value: object, pick: random.Random) -> object:
    """A value that a careless eye takes for the old one, or anything at all."""
    if pick.random() < 0.4:
        return pick.choice(ODD)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        near = (value - 1, value + 1, 2 * value, -value, value // 2, float(value), str(value), [value])
        return pick.choice([*near, *LARGE, float("nan"), float("inf")])
    if isinstance(value, str):
        words = ("bitmap", "bitmap_rows", "low_rank", "quantized", "trellis", "dense", "gate_proj", "up_proj",
                 "down_proj", "bfloat16", "float16", "float32", "mixtral", "qwen3_moe")  # fmt: skip
        return pick.choice([*words, value + "x", value[:-1], value.upper(), value * 50, f"../{value}", "{layer}"])
    if isinstance(value, list):
        return pick.choice([value[::-1], value[1:], value + value[:1], value * 2, [None], [*value, 99]])
    if isinstance(value, dict):
        return pick.choice([{}, {**value, "more": 1}, list(value), dict(list(value.items())[:-1]), {"0": value}])
    return pick.choice(LARGE)


def edit_json(content: object, pick: random.Random, *, every: bool = False) -> tuple[str, Any] | None:
    """A JSON value with one place in it replaced, dropped or added; None where there is none."""
    places = list(paths_in(content))
    if not places:
        return None
    if every and pick.random() < 0.7:
        deep = [path for path in places if len(path) > 1]
        places = deep or places
    *path, last = pick.choice(places)
    place: Any = content
    for key in path:
        place = place[key]
    old, act = place[last], pick.random()
    where = ".".join(map(str, [*path, last]))[-120:]
    if act < 0.2:
        del place[last]
        return f"{where} dropped", content
    if act < 0.3 and isinstance(place, dict):
        place[pick.choice(("x", "0", "99", "-1", "bits", "group_size", "experts"))] = old
        return f"{where} doubled", content
    new = _near(old, pick)
    if type(new) is type(old) and new == old:
        return None
    place[last] = new
    return f"{where} = {str(new)[:60]!r}", content


def edit_block(files: Files, pick: random.Random) -> tuple[str, bool] | None:
    """The ``quantization_config`` block."""
    try:
        config = json.loads(files[CONFIG_NAME])
        done = edit_json(config["quantization_config"], pick)
    except (KeyError, ValueError, TypeError):
        return None
    if done is None:
        return None
    files[CONFIG_NAME] = json.dumps(config).encode()
    return f"block: {done[0]}", True


def edit_config(files: Files, pick: random.Random) -> tuple[str, bool] | None:
    """Everything else in config.json."""
    try:
        config = json.loads(files[CONFIG_NAME])
        block = config.pop("quantization_config", None)
    except (KeyError, ValueError, TypeError, AttributeError):
        return None
    done = edit_json(config, pick)
    if done is None:
        return None
    files[CONFIG_NAME] = json.dumps({**done[1], "quantization_config": block}).encode()
    return f"config: {done[0]}", False


def edit_sizes(files: Files, pick: random.Random) -> tuple[str, bool] | None:
    """A size in the block and in the rest of config.json at once."""
    try:
        config = json.loads(files[CONFIG_NAME])
        block = config["quantization_config"]
        key = pick.choice(("hidden_size", "intermediate_size", "num_experts"))
        old = block[key]
        value = _near(old, pick)
        block[key] = value
    except (KeyError, ValueError, TypeError):
        return None
    for name in [key, "num_local_experts", "n_routed_experts", "moe_intermediate_size"]:
        if config.get(name) == old:
            config[name] = value
    files[CONFIG_NAME] = json.dumps(config).encode()
    return f"config and block: {key} = {str(value)[:60]}", False


def edit_index(files: Files, pick: random.Random) -> tuple[str, bool] | None:
    """The index: a name moved, left out, or elsewhere on the disk."""
    try:
        index = json.loads(files[INDEX_NAME])
        weight_map = index["weight_map"]
        name = pick.choice(sorted(weight_map))
    except (KeyError, ValueError, TypeError, IndexError):
        return None
    place = pick.choice(
        ("../model.safetensors", "/etc/passwd", "config.json", "a\0b", "x.safetensors", "pytorch_model.bin", ".", "",
         None, 3, {}, pick.choice(sorted(map(str, weight_map.values()))))
    )  # fmt: skip
    act = pick.random()
    if act < 0.2:
        del weight_map[name]
    elif act < 0.3:
        index = pick.choice(ODD)
    elif act < 0.4:
        index["weight_map"] = pick.choice(ODD)
    elif act < 0.5:
        weight_map["gone"] = place
    else:
        weight_map[name] = place
    files[INDEX_NAME] = json.dumps(index).encode()
    # transformers reads the index before it asks for a quantizer.
    return f"index: {name} in {place!r}", False


def edit_report(files: Files, pick: random.Random) -> tuple[str, bool] | None:
    """The report beside the weights."""
    try:
        report = json.loads(files[REPORT_NAME])
    except (KeyError, ValueError):
        return None
    done = edit_json(report, pick)
    if done is None:
        return None
    files[REPORT_NAME] = json.dumps(done[1]).encode()
    return f"report: {done[0]}", True


# Those that come often stand more than once.
CHANGES: tuple[Change, ...] = (
    *(set_value, set_value, set_value, flip_bits, flip_bits, noise),
    *(retype, reshape, reshape, rename, rename, drop, add, swap),
    *(edit_header, edit_header, edit_header, break_header, break_header, break_file, trap),
    *(edit_block, edit_block, edit_block, edit_block, edit_config, edit_sizes, edit_index, edit_index, edit_report),
)


def mutate(name: str, files: Files, pick: random.Random, kinds_of: Sequence[Change] = CHANGES) -> Mutant:
    """Change a checkpoint: once, mostly.

    Args:
        name: of the good checkpoint.
        files: of it; not changed.
        pick: decides.
        kinds_of: changes to choose from.
    """
    made, changes, kinds, ours = dict(files), [], [], True
    wanted = pick.choice((1, 1, 1, 2, 3))
    for _ in range(12):
        if len(changes) == wanted or not any(file.endswith(".safetensors") for file in made):
            break
        change = pick.choice(kinds_of)
        if (done := change(made, pick)) is not None:
            changes.append(done[0])
            kinds.append(change.__name__)
            ours = ours and done[1]
    if REPORT_NAME in made and "edit_report" not in kinds and pick.random() < 0.8:
        # With the report's own checksums every change of weights would be found by them alone.
        del made[REPORT_NAME]
    return Mutant(name, made, tuple(changes), tuple(kinds), ours)
