"""Matrices in codes by row, decoded while transformers loads them: its own conversions of names and values."""

import re
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, WeightTransform

from compress_tools.format.rest import ROW_CODES, ROW_SCALES, WEIGHT, decode_rows, rows_fault

_LEAF = WEIGHT.removeprefix(".")
_ANY_CODES, _ANY_SCALES = f"{ROW_CODES}$", f"{ROW_SCALES}$"


class DecodeRows(ConversionOps):
    """Codes and scales to a matrix; ``decoded`` counts them, over all copies that transformers makes of this.

    ``faults`` says what the format forbids in them.

    Args:
        stored: dtype that the matrix had in the source: what codes mean is rounded to it first.
        dtype: the model's.
    """

    def __init__(self, stored: torch.dtype, dtype: torch.dtype) -> None:
        self._stored, self._dtype, self.decoded = stored, dtype, 0
        self.faults: list[str] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "DecodeRows":
        return self

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], **given: Any) -> dict[str, Any]:
        """See transformers: lists of tensors by source pattern; those of codes and scales become one of weights."""
        name = str(given.get("full_layer_name", ""))
        found: dict[str, Any] = {}
        for pattern, codes in input_dict.items():
            if ROW_CODES not in pattern:
                continue
            scales = input_dict[pattern.replace(ROW_CODES, ROW_SCALES)]
            pairs = zip(_as_list(codes), _as_list(scales), strict=True)
            # What comes behind in a chain finds its tensors by the patterns that they were stored under.
            found[_LEAF if pattern == _ANY_CODES else pattern] = [self._decode(name, *pair) for pair in pairs]
        return found

    def _decode(self, name: str, codes: Tensor, scales: Tensor) -> Tensor:
        if fault := rows_fault(codes, scales, self._stored):
            # transformers makes a warning of what is raised here, and a random weight of the tensor.
            self.faults.append(f"{name!r} in codes {fault}")
        self.decoded += 1
        return decode_rows(codes, scales, self._stored).to(self._dtype)


def with_coded_rest(
    conversions: Sequence[WeightTransform], names: Collection[str], decode: DecodeRows
) -> list[WeightTransform]:
    """The same conversions, and those of matrices in codes: first decoded, then treated as their weights would be.

    Args:
        conversions: transformers' of the model.
        names: ``CodedRest.tensors``.
        decode: how they are decoded.
    """
    found: list[WeightTransform] = list(conversions)
    for conversion in conversions:
        sources = [pattern for pattern in conversion.source_patterns if _LEAF in pattern]
        if not any(re.search(pattern, name) for pattern in sources for name in names):
            continue
        if isinstance(conversion, WeightConverter):
            of_rows = [pattern.replace(_LEAF, leaf) for pattern in sources for leaf in (ROW_CODES, ROW_SCALES)]
            found.append(WeightConverter(of_rows, conversion.target_patterns, [decode, *conversion.operations]))
        elif isinstance(conversion, WeightRenaming):
            targets = conversion.target_patterns
            found += [
                WeightRenaming(source.replace(_LEAF, leaf), target.replace(_LEAF, leaf))
                for source, target in zip(sources, targets, strict=True)
                for leaf in (ROW_CODES, ROW_SCALES)
            ]
    return [*found, WeightConverter([_ANY_CODES, _ANY_SCALES], _LEAF, [decode])]


def _as_list(tensors: Any) -> list[Tensor]:
    return tensors if isinstance(tensors, list) else [tensors]
