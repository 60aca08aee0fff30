"""A checkpoint to compress, as published: quantised tensors are decoded while they are read."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from compress_tools.architectures.base import NESTED, config_parts
from compress_tools.errors import CheckpointError
from compress_tools.format.loading_guard import GUARD_KEY
from compress_tools.source.files import CheckpointFiles
from compress_tools.source.other_files import why_not_ours
from compress_tools.source.reader import INDEX_NAME, SINGLE_NAME, CheckpointReader
from compress_tools.source.stored_forms import StoredForm, find_forms, is_activation_scale

DECODED_DTYPE, DECODED_BYTES = "BF16", 2


class SourceReader(CheckpointReader):
    """A checkpoint whose quantised matrices appear under their own names, in bf16, and whose config has no block of it.

    Dtypes and names decide what is quantised: a block in config.json that is null, or says what the tensors are not,
    changes nothing.

    Args:
        path: the directory, or what fetches the checkpoint's files into one.
    Attributes:
        forms: the quantised matrices by name.
        left_out: tensors that a decoded checkpoint has no place for, and why.
    Raises:
        CheckpointError: see ``CheckpointReader``; a ResMoE checkpoint; a quantised form that is not read.
    """

    def __init__(self, path: str | Path | CheckpointFiles) -> None:
        super().__init__(path)
        self.forms: dict[str, StoredForm] = {}
        self.left_out: dict[str, str] = {}
        blocks = list(_quantization_blocks(self.config))
        if any(block.get("quant_method") == "resmoe" for block in blocks):
            raise CheckpointError(
                f"{self.path}: is a ResMoE checkpoint already; compress the original, or `resmoe restore` it first"
            )
        named = self.config.get(GUARD_KEY)
        if named not in (None, SINGLE_NAME, INDEX_NAME):
            raise CheckpointError(
                f"{self.path}: config.json: {GUARD_KEY} is {named!r:.60}: transformers would load that, vLLM "
                f"{self.shards[0]}; remove the key, or move the weights to where both look"
            )
        stored = super().names
        try:
            self.forms = find_forms(stored, _Stored(self), _block_size(blocks))
        except CheckpointError as err:
            raise CheckpointError(f"{self.path}: {err}") from err
        parts = {name for form in self.forms.values() for name in form.parts.values()}
        if self.forms or blocks:
            self.left_out = {
                name: "a scale of the source's quantised activations"
                for name in stored
                if is_activation_scale(name) and name not in parts
            }
        shapes = {name for name in stored if name.endswith("_shape") and name.removesuffix("_shape") in self.forms}
        self.left_out |= {name: why for name, why in self.files().items() if why is not None}
        self._names = sorted((set(stored) - parts - shapes - set(self.left_out)) | set(self.forms))
        self.config = _without_blocks(self.config)

    @property
    def names(self) -> list[str]:
        """Names of all tensors, decoded ones under their own, sorted."""
        return list(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self.forms or (name not in self.left_out and super().__contains__(name))

    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU; quantised ones in bf16."""
        form = self.forms.get(name)
        if form is None:
            return super().get(name)
        return form.decode({role: super(SourceReader, self).get(part) for role, part in form.parts.items()})

    def get_row(self, name: str, index: int) -> Tensor:
        """``tensor[index]`` without the rest; quantised ones in bf16."""
        form = self.forms.get(name)
        if form is None:
            return super().get_row(name, index)
        parts = {}
        for role, part in form.parts.items():
            own = super().shape(part)
            if own and own[0] == form.shape[0]:
                parts[role] = super().get_row(part, index)[None]
            else:
                parts[role] = super().get(part)
        return form.decode(parts)[0]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, decoded, without reading it."""
        form = self.forms.get(name)
        return super().shape(name) if form is None else form.shape

    def dtype(self, name: str) -> str:
        """Dtype of a tensor, decoded, as safetensors spells it."""
        return super().dtype(name) if name not in self.forms else DECODED_DTYPE

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor, decoded."""
        form = self.forms.get(name)
        if form is None:
            return super().nbytes(name)
        count = DECODED_BYTES
        for size in form.shape:
            count *= size
        return count

    def shard_of(self, name: str) -> str:
        """The weight file that holds a tensor, or a quantised one's values."""
        form = self.forms.get(name)
        return super().shard_of(name if form is None else form.parts["values"])

    def need(self, names: Iterable[str], *, partly: Collection[str] = ()) -> None:
        """The next reads are of these tensors, and of no others; of a quantised one, of all its parts."""
        super().need(self._stored_names(names), partly=partly)

    def shards_of(self, names: Iterable[str]) -> list[str]:
        """The weight files that hold these tensors, or parts of quantised ones, ascending."""
        return super().shards_of(self._stored_names(names))

    def _stored_names(self, names: Iterable[str]) -> list[str]:
        forms = self.forms
        return [part for name in names for part in (forms[name].parts.values() if name in forms else (name,))]

    def files(self) -> dict[str, str | None]:
        """Files besides config, index and weights: why they are not copied through, or None."""
        found = super().files()
        return {name: why or why_not_ours(name, found) for name, why in found.items()}

    def decoded(self) -> dict[str, int]:
        """How many tensors of each quantised form are decoded."""
        return dict(sorted(Counter(form.title for form in self.forms.values()).items()))


class _Stored:
    """The tensors as they are stored: what ``find_forms`` asks for."""

    def __init__(self, reader: SourceReader) -> None:
        self._reader = reader

    def shape(self, name: str) -> tuple[int, ...]:
        return CheckpointReader.shape(self._reader, name)

    def dtype(self, name: str) -> str:
        return CheckpointReader.dtype(self._reader, name)

    def get(self, name: str) -> Tensor:
        return CheckpointReader.get(self._reader, name)


def _quantization_blocks(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The quantisation blocks of config.json and of its parts."""
    blocks = (part.get("quantization_config") for part in config_parts(config))
    return [block for block in blocks if isinstance(block, dict)]


def _block_size(blocks: list[Mapping[str, Any]]) -> list[int] | None:
    """Rows and columns of an fp8 block, where config.json says it."""
    given = next((block["weight_block_size"] for block in blocks if block.get("weight_block_size")), None)
    if isinstance(given, list) and len(given) == 2 and all(isinstance(size, int) and size > 0 for size in given):
        return given
    return None


def _without_blocks(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    for key in NESTED:
        if isinstance(inner := kept.get(key), dict):
            kept[key] = _without_blocks(inner)
    return kept
