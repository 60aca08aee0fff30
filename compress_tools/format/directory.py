"""A checkpoint directory's headers against its format block, before any tensor is read or any memory is taken."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from compress_tools.errors import CheckpointError, FormatError
from compress_tools.format.dtypes import SAFETENSORS_NAMES
from compress_tools.format.parts.base import SCALE_DTYPE
from compress_tools.format.plain_tensors import dtype_fault
from compress_tools.format.rest import ROW_CODES_DTYPE, row_names
from compress_tools.format.schema import ResMoEFormat
from compress_tools.format.shard_file import StoredTensor, is_file_name, read_header
from compress_tools.format.tensors import is_resmoe_name, layer_tensors
from compress_tools.text_file import in_words, read_json_object

INDEX_NAME = "model.safetensors.index.json"
# What config.json calls numbers of layers, of which a model builds as many; far beyond any; parts lie within parts.
_COUNT = re.compile(r"(?:layers?|blocks?|depths?|stages)$")
_MOST_LAYERS = 4096
_DEEPEST = 8


def read_weight_map(index: Path) -> dict[str, str]:
    """Weight files by the names of their tensors, as an index has them.

    Raises:
        CheckpointError: it names none, or a file that is not beside it.
    """
    weight_map: dict[str, str] | None = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map; expected one from tensor names to weight files")
    for name, shard in weight_map.items():
        if not is_file_name(shard):
            raise CheckpointError(f"{index}: {name!r}: expected a weight file beside it, found {shard!r:.60}")
    return weight_map


def read_headers(path: Path) -> dict[str, StoredTensor]:
    """All tensors of the weight files that a server loads: those that the index names, or else all beside it.

    Args:
        path: the directory.
    Returns:
        by name; empty where there is no weight file.
    Raises:
        CheckpointError: an index or a weight file is damaged, missing or elsewhere.
    """
    index, named = path / INDEX_NAME, set[str]()
    if index.exists():
        weight_map = read_weight_map(index)
        files, named = [path / shard for shard in sorted(set(weight_map.values()))], set(weight_map)
    else:
        files = sorted(path.glob("*.safetensors"))
    found: dict[str, StoredTensor] = {}
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: is missing or no file; expected a weight file; download it again")
        try:
            # Checks that offsets, shapes and the file's length agree.
            with safe_open(file, framework="pt", device="cpu"):
                found |= read_header(file)
        except (OSError, SafetensorError) as err:
            raise CheckpointError(f"{file}: truncated or corrupt shard: {in_words(err)}; download it again") from err
    if missing := sorted(named - set(found)):
        raise CheckpointError(
            f"{path}: {len(missing)} tensors of {INDEX_NAME} are not in their shards, first {missing[0]!r}"
        )
    return found


def check_headers(fmt: ResMoEFormat, headers: Mapping[str, StoredTensor], where: str) -> None:
    """Every tensor that the block names is there, of its shape and dtype, and no other of ResMoE's.

    Others hold floating-point numbers where weights do.

    Args:
        fmt: the checkpoint's format block.
        headers: its tensors by name.
        where: names the checkpoint in errors.
    Raises:
        FormatError: names the first that is missing, different or too many, or a weight that holds no such numbers.
    """
    # Every expert has a tensor; a damaged count must not be counted up to.
    if fmt.num_experts > len(headers):
        raise FormatError(
            f"{where}: config.json counts {fmt.num_experts} experts, in all there are {len(headers)} tensors"
        )
    expected: set[str] = set()
    for layer in fmt.layers:
        for name, spec in layer_tensors(fmt, layer).items():
            expected.add(name)
            if name not in headers:
                raise FormatError(f"{where}: layer {layer}: tensor {name!r} is missing")
            found = (headers[name].shape, headers[name].dtype)
            if found != (spec.shape, SAFETENSORS_NAMES[spec.dtype]):
                raise FormatError(
                    f"{where}: {name!r} is {found[1]} {list(found[0])}, the config says "
                    f"{SAFETENSORS_NAMES[spec.dtype]} {list(spec.shape)}"
                )
    expected.update(_checked_rest(fmt, headers, where))
    extra = sorted(name for name in headers if is_resmoe_name(name) and name not in expected)
    if extra:
        raise FormatError(f"{where}: {len(extra)} tensors that the config does not name, first {extra[0]!r}")
    if fault := dtype_fault(headers):
        raise FormatError(f"{where}: {fault}")


def check_layer_count(config: Any, headers: Mapping[str, StoredTensor], where: str) -> None:
    """A model with more layers than tensors is not built, which would take as long as the number is large.

    Args:
        config: transformers' config of the model.
        headers: the checkpoint's tensors by name; none where another file than those that are looked at holds them.
        where: names the checkpoint in errors.
    Raises:
        CheckpointError: it says that there are more.
    """
    count = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if headers and isinstance(count, int) and count > len(headers):
        raise CheckpointError(
            f"{where}: config.json counts {count} layers, in all there are {len(headers)} tensors; download it again"
        )
    check_counts(vars(config), len(headers), where)


def check_counts(config: Mapping[str, Any], tensors: int, where: str) -> None:
    """No part of a model, a tower or a draft either, has more layers than there are tensors, and than any model has.

    Args:
        config: config.json, or a config's attributes.
        tensors: how many there are.
        where: names the checkpoint in errors.
    Raises:
        CheckpointError: names the key.
    """
    for key, number in _counts(config):
        if number > max(tensors, _MOST_LAYERS):
            raise CheckpointError(
                f"{where}: config.json counts {number} as {key}, in all there are {tensors} tensors; download it again"
            )


def _counts(values: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str, int]]:
    """Numbers of layers of all parts of a model."""
    for key, value in values.items():
        if isinstance(value, int) and _COUNT.search(str(key)):
            yield str(key), value
        inner = value if isinstance(value, dict) else vars(value) if hasattr(value, "model_type") else None
        if inner is not None and depth < _DEEPEST:
            yield from _counts(inner, depth + 1)


def _checked_rest(fmt: ResMoEFormat, headers: Mapping[str, StoredTensor], where: str) -> Iterator[str]:
    """Names of the tensors of all matrices in codes; their shapes fit each other."""
    for name in sorted(fmt.rest_tensors):
        if name in headers:
            raise FormatError(f"{where}: {name!r} is there beside its codes; the config says that codes are all")
        for own in row_names(name):
            if own not in headers:
                raise FormatError(f"{where}: tensor {own!r} is missing")
            yield own
        codes, scales = row_names(name)
        shape = headers[codes].shape
        if len(shape) != 2 or 0 in shape:
            raise FormatError(f"{where}: {codes!r} has shape {list(shape)}, expected two dimensions, none of them 0")
        for own, dtype, size in ((codes, ROW_CODES_DTYPE, shape), (scales, SCALE_DTYPE, (shape[0], 1))):
            found = (headers[own].dtype, headers[own].shape)
            if found != (SAFETENSORS_NAMES[dtype], size):
                raise FormatError(
                    f"{where}: {own!r} is {found[0]} {list(found[1])}, expected {SAFETENSORS_NAMES[dtype]} {list(size)}"
                )
