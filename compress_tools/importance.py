"""What an error of each weight of an expert counts, as `resmoe calibrate` measured it on a text.

To first order, and on average over tokens, an error ``d`` of weight ``(i, j)`` of an expert's matrix changes the
layer's output by ``d**2`` times

- gate and up, ``[I, H]``: ``E[w**2 * s_i**2 * x_j**2]``, with ``w`` the router's weight, ``x`` the expert's input and
  ``s_i`` what a unit of row i's product moves the output by: ``|down_i| * u_i * act'(g_i)`` of gate's,
  ``|down_i| * act(g_i)`` of up's;
- down transposed, ``[I, H]``: ``E[w**2 * a_i**2]``, ``a`` the activated product: a row's alone.

That is kept as a number for each row and one for each column, whose product stands for the mean of the product.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress_tools.architectures.experts import MoESizes
from compress_tools.errors import CheckpointError
from compress_tools.format.schema import Projection
from compress_tools.format.shard_file import file_checksum
from compress_tools.text_file import in_words

# The file's one entry of metadata, a JSON object: safetensors puts several in no order.
METADATA_KEY, VERSION = "resmoe_calibration", 1
COLUMNS, COUNTS, ROUTING, OUTPUT, COEFFICIENT = "columns", "counts", "routing", "output", "coefficient"

# What few tokens say of an expert is drawn towards its layer's mean, as if so many tokens more had said that.
PRIOR_TOKENS = 32
# An expert counts at least as if every token went to it with this share of the experts' mean squared router weight. A
# calibration is a sample: an expert that it does not reach is used by other texts, and must not be dropped for free.
LEAST_ROUTING = 0.01


def tensor_key(layer: int, what: str) -> str:
    """Name of a tensor in the file."""
    return f"layer.{layer}.{what}"


def source_digest(fingerprint: Mapping[str, str]) -> str:
    """A source's identity, in one word."""
    return hashlib.sha256(json.dumps(dict(fingerprint), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Importance:
    """What errors of one expert count: of weight ``(i, j)`` of a projection ``rows[i] * columns[j]``.

    Attributes:
        rows: by projection, fp32 ``[I]``, above 0.
        columns: fp32 ``[H]``, above 0, by projection; those of ``down_proj`` count alike, and are not in it.
    """

    rows: Mapping[Projection, Tensor]
    columns: Mapping[Projection, Tensor]

    def permuted(self, perm: Tensor) -> "Importance":
        """Of these rows, in this order."""
        return Importance({p: own[perm] for p, own in self.rows.items()}, self.columns)

    def weighed(self, projection: Projection, matrix: Tensor) -> Tensor:
        """``[I, H]`` times the roots: its squares are what each entry counts."""
        weighed = matrix * self.rows[projection].to(matrix.device).sqrt().unsqueeze(1)
        columns = self.columns.get(projection)
        return weighed if columns is None else weighed * columns.to(matrix.device).sqrt()


@dataclass(frozen=True)
class LayerImportance:
    """What errors of one layer's experts count.

    Attributes:
        rows: by projection, fp32 ``[E, I]``; the router's weights are in them.
        columns: fp32 ``[E, H]``, of gate and up.
        energy: what the layer's experts put out, squared and with the router's weights: what errors are relative to.
        unrouted: experts that count by ``LEAST_ROUTING``, since the text routes less to them.
        coefficient: what KL a unit of relative error in all of the layer's weights costs; None where not measured.
    """

    rows: Mapping[Projection, Tensor]
    columns: Tensor
    energy: float
    unrouted: tuple[int, ...]
    coefficient: float | None

    def expert(self, expert: int) -> Importance:
        """Of one expert, its rows in the source's order."""
        rows: dict[Projection, Tensor] = {p: own[expert] for p, own in self.rows.items()}
        return Importance(rows, {p: self.columns[expert] for p in rows if p != "down_proj"})

    @cached_property
    def center(self) -> Importance:
        """Of a center: experts' columns by their part in the output; its rows count alike."""
        shares = self.rows["up_proj"].mean(1)
        columns = (shares / shares.sum()) @ self.columns
        flat = torch.ones(self.rows["up_proj"].shape[1])
        return Importance(dict.fromkeys(self.rows, flat), {p: columns for p in self.rows if p != "down_proj"})


class CalibrationFile:
    """A file of `resmoe calibrate`.

    Args:
        path: the file.
    Raises:
        CheckpointError: not readable, or not such a file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self._opened() as file:
            text = (file.metadata() or {}).get(METADATA_KEY, "null")
            self._names = frozenset(file.keys())
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict) or content.get("version") != VERSION:
            found = f": found version {content.get('version')!r:.20}" if isinstance(content, dict) else ""
            raise CheckpointError(f"--calibration {path}: is not of `resmoe calibrate`, version {VERSION}{found}")
        self.metadata: dict[str, Any] = content

    def digest(self) -> str:
        """Of the whole file.

        Raises:
            CheckpointError: not readable.
        """
        try:
            return file_checksum(self.path)
        except OSError as err:
            raise CheckpointError(f"--calibration {self.path}: not readable: {in_words(err)}") from err

    def check_source(self, fingerprint: Mapping[str, str]) -> None:
        """Refuse a file that was made from another model.

        Raises:
            CheckpointError: it was.
        """
        if self.metadata.get("source") != source_digest(fingerprint):
            raise CheckpointError(
                f"--calibration {self.path}: was made from other weights than this source's; calibrate this one"
            )

    def holds(self, layer: int) -> bool:
        """Whether the layer was measured; layers for multi-token prediction are not, as the model does not run them."""
        return tensor_key(layer, COLUMNS) in self._names

    def lacks(self, layer: int, drafts: Collection[int]) -> bool:
        """Whether the layer is one for multi-token prediction that was not measured: its errors count alike."""
        return layer in drafts and not self.holds(layer)

    def layer(self, layer: int, projections: Collection[Projection], sizes: MoESizes) -> LayerImportance:
        """Read one layer; what few tokens said is drawn towards the layer's mean.

        Args:
            layer: index.
            projections: of the experts.
            sizes: E, H, I.
        Raises:
            CheckpointError: not there, of another shape, or not finite.
        """
        with self._opened() as file:

            def read(what: str, *shape: int) -> Tensor:
                name = tensor_key(layer, what)
                if name not in self._names:
                    raise CheckpointError(f"--calibration {self.path}: holds no {name!r}")
                tensor: Tensor = file.get_tensor(name).float()
                if tuple(tensor.shape) != shape or not tensor.isfinite().all() or (tensor < 0).any():
                    raise CheckpointError(
                        f"--calibration {self.path}: {name!r} has shape {list(tensor.shape)}, expected {list(shape)}, "
                        "finite and not negative"
                    )
                return tensor

            counts, routing, output = (read(what, sizes.num_experts) for what in (COUNTS, ROUTING, OUTPUT))
            own_columns = read(COLUMNS, sizes.num_experts, sizes.hidden_size)
            own_rows = {p: read(p, sizes.num_experts, sizes.intermediate_size) for p in projections}
            measured = tensor_key(layer, COEFFICIENT) in self._names
            coefficient = float(read(COEFFICIENT)) if measured else None
        if not (routing.sum() > 0 and output.sum() > 0):
            raise CheckpointError(f"--calibration {self.path}: layer {layer}: no token reached an expert")
        least = LEAST_ROUTING * routing.mean()
        used = routing.clamp_min(float(least))

        def drawn(values: Tensor, mean: Tensor) -> Tensor:
            """Towards the mean, by how many tokens there were."""
            given = counts.view(-1, *[1] * (values.dim() - 1))
            floor = mean.mean() * torch.finfo(torch.float32).eps
            return ((given * values + PRIOR_TOKENS * mean) / (given + PRIOR_TOKENS)).clamp_min(float(floor))

        shares = routing / routing.sum()
        output = drawn(output, (shares * output).sum())
        return LayerImportance(
            {p: used[:, None] * drawn(own, (shares @ own).mean()) for p, own in own_rows.items()},
            drawn(own_columns, shares @ own_columns),
            float((used * output).sum()),
            tuple((routing < least).nonzero().flatten().tolist()),
            coefficient,
        )

    def _opened(self) -> Any:
        try:
            return safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as err:
            why = in_words(err) if isinstance(err, OSError) else str(err)
            raise CheckpointError(f"--calibration {self.path}: not readable: {why}") from err


def opened_calibration(path: str | Path, fingerprint: Mapping[str, str]) -> CalibrationFile:
    """A file that was made from the source of this fingerprint.

    Raises:
        CheckpointError: not readable, not such a file, or of another source.
    """
    file = CalibrationFile(path)
    file.check_source(fingerprint)
    return file


def is_calibration(path: str | Path) -> bool:
    """Whether a file is one of `resmoe calibrate`, and no file of layers' inputs, or none at all."""
    try:
        with safe_open(path, framework="pt") as file:
            return METADATA_KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False
