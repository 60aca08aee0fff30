"""Layers beside the routed experts whose matrices a checkpoint may hold in 8-bit codes by row (SPEC.md, 3.3).

Which of a model's layers are in codes is not looked up by name, since names differ between checkpoint and model: each
layer can take codes and plain weights, holds memory for neither, and is what was loaded into it. A CPU keeps codes and
multiplies with them. A GPU keeps them where vLLM has a weight-only kernel for the layer; otherwise they are decoded
once they are loaded, and the layer is vLLM's own. The log says which.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from compress_tools.errors import CheckpointError, FormatError
from compress_tools.format.dtypes import DTYPES
from compress_tools.format.parts.base import SCALE_DTYPE
from compress_tools.format.rest import LEVELS, ROW_CODES, ROW_SCALES, decode_rows, rows_fault
from resmoe_vllm.compat import (
    LinearMethodBase,
    ParallelLMHead,
    QuantizeMethodBase,
    embeddings_are_tied,
    is_dummy_load,
    platform_device,
    weight_only_kernel,
)
from resmoe_vllm.kernels.cpu.rows8 import kernel_name
from resmoe_vllm.plain_layers import PlainEmbeddingMethod, PlainLinearMethod
from resmoe_vllm.weights import huge_pages

# No code that may be stored: what still holds it was not loaded.
UNLOADED = -LEVELS - 1
Say = Callable[[str], None]
# A module of vLLM's: it has attributes that nn.Module's type does not know.
Layer = Any


class Pending(nn.Parameter):
    """A parameter that has a shape, and no memory until something is loaded into it.

    Its loader can be asked for, taken away and replaced, as models do with loaders of their own.

    Args:
        shape: of the whole.
        dtype: of the values.
        fill: what is there where nothing is loaded.
        weight: whose loader this one's tensors are loaded by, as what slices rows of weights slices rows of codes;
            None: this is the weight.
    """

    fill: float
    of: "Pending | None"
    loaded: bool
    own_loader: Any
    input_dim: int
    output_dim: int

    def __new__(  # noqa: D102  the class says it
        cls, shape: tuple[int, ...], dtype: torch.dtype, fill: float, weight: "Pending | None" = None
    ) -> Self:
        made = super().__new__(cls, torch.zeros((), dtype=dtype).expand(shape), requires_grad=False)
        made.fill, made.of, made.loaded, made.own_loader = fill, weight, False, None
        return made

    @property
    def weight_loader(self) -> Any:
        """What vLLM calls with this, a stored tensor, and where it belongs."""
        if self.own_loader is None:
            raise AttributeError("weight_loader")
        return self._load

    @weight_loader.setter
    def weight_loader(self, loader: Any) -> None:
        self.own_loader = loader

    @weight_loader.deleter
    def weight_loader(self) -> None:
        self.own_loader = None

    def materialize(self) -> None:
        """Get memory."""
        if not self.loaded:
            self.data = huge_pages.empty(tuple(self.shape), self.dtype, self.device).fill_(self.fill)
            self.loaded = True

    def _load(self, _param: nn.Parameter, stored: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.materialize()
        loader = (self if self.of is None else self.of).own_loader
        return loader(self, stored, *args, **kwargs)


class Rows:
    """What one layer is loaded into; a tied output layer shares its embedding's.

    Args:
        shape: ``[N, K]`` on this rank.
        dtype: the model's.
        attributes: what loaders need to know of a weight, its loader among it.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, attributes: dict[str, Any]) -> None:
        nan = float("nan")
        self.dtype = dtype
        self.weight = Pending(shape, dtype, nan)
        self.codes = Pending(shape, torch.int8, UNLOADED, self.weight)
        self.scales = Pending((shape[0], 1), DTYPES[SCALE_DTYPE], nan, self.weight)
        for name, value in {"output_dim": 0, **attributes}.items():
            for parameter in (self.weight, self.codes, self.scales):
                setattr(parameter, name, value)
        for parameter in (self.weight, self.codes):
            parameter.input_dim = 1
        self.decoded: nn.Parameter | None = None
        if is_dummy_load():
            # Every layer as if in codes; vLLM fills what has floating-point numbers.
            self.codes.materialize()
            self.codes.data.random_(-LEVELS, LEVELS + 1)
            self.scales.materialize()

    def register(self, layer: Layer) -> None:
        """Make the parameters a layer's."""
        layer.register_parameter("weight", self.weight)
        layer.register_parameter(ROW_CODES, self.codes)
        layer.register_parameter(ROW_SCALES, self.scales)

    def release(self, layer: Layer) -> None:
        """Leave a layer with the plain parameters ``weight`` and, where it is in codes, ``weight_scale``."""
        for name in (ROW_CODES, ROW_SCALES):
            delattr(layer, name)
        del layer.weight
        if self.is_coded:
            layer.weight = nn.Parameter(self.codes.data, requires_grad=False)
            layer.weight_scale = nn.Parameter(self.scales.data, requires_grad=False)
        else:
            layer.weight = nn.Parameter(self.weight.data, requires_grad=False)

    @property
    def is_coded(self) -> bool:
        """Codes were loaded."""
        return self.codes.loaded

    def check(self, prefix: str) -> None:
        """Raises CheckpointError unless a whole weight was loaded, in one form; FormatError if it is none."""
        if self.is_coded and self.weight.loaded:
            raise CheckpointError(
                f"{prefix}: a part of it is in 8-bit codes in the checkpoint and a part is not; compress again, or "
                "`resmoe restore` it"
            )
        if self.is_coded != self.scales.loaded or not (self.is_coded or self.weight.loaded):
            raise CheckpointError(f"{prefix}: its weight is not in the checkpoint, or in part")
        if self.is_coded and (fault := rows_fault(self.codes.data, self.scales.data, self.dtype)):
            if bool((self.codes.data == UNLOADED).any()) or bool(self.scales.data.isnan().any()):
                raise CheckpointError(f"{prefix}: not all of its codes are in the checkpoint")
            raise FormatError(
                f"{prefix}: its weight in codes {fault}; the checkpoint is damaged, download or compress it again"
            )

    def restored(self) -> nn.Parameter:
        """The weight that codes mean, made once."""
        if self.decoded is None:
            weight = decode_rows(self.codes.data, self.scales.data, self.dtype)
            self.decoded = nn.Parameter(weight, requires_grad=False)
        return self.decoded


class _CodedMethod(QuantizeMethodBase):
    """What linear layers and embeddings have in common.

    Args:
        prefix: the layer's name in the model, for errors.
        plain: vLLM's own method, which takes over where the layer is not kept in codes.
        say: told how layers are kept; each sentence once for an engine.
    """

    def __init__(self, prefix: str, plain: PlainLinearMethod | PlainEmbeddingMethod, say: Say) -> None:
        super().__init__()
        self._prefix, self._plain, self._say = prefix, plain, say
        self._kernel: Any = None
        self._full_shape = (0, 0)

    def create_weights(
        self,
        layer: Layer,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """See vLLM's."""
        self._full_shape = (input_size, output_size)
        layer.resmoe_rows = Rows(
            (sum(output_partition_sizes), input_size_per_partition), params_dtype, extra_weight_attrs
        )
        layer.resmoe_rows.register(layer)

    def process_weights_after_loading(self, layer: Layer) -> None:
        """Keep the codes, or decode them; or leave the layer to vLLM.

        Raises:
            CheckpointError: nothing was loaded, or not all.
        """
        rows: Rows = layer.resmoe_rows
        if not (rows.is_coded or rows.weight.loaded) and self._may_be_absent():
            rows.weight.materialize()
            rows.weight.data.zero_()
        rows.check(self._prefix)
        rows.release(layer)
        if not rows.is_coded:
            self._leave_to_vllm(layer)
        elif platform_device() == "cpu":
            self._say(f"attention, dense layers and embeddings are held in 8 bits: {kernel_name()} multiplies")
        else:
            self._keep_on_gpu(layer, rows)

    def apply(self, layer: Layer, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x [..., K]`` times the layer's ``[N, K]``."""
        if self._kernel is not None:
            made: Tensor = self._kernel.apply_weights(layer, x, bias)
            return made
        flat = x.reshape(-1, x.shape[-1])
        out: Tensor = torch.ops.resmoe.rows8(flat, layer.weight, layer.weight_scale, bias)
        return out.view(*x.shape[:-1], out.shape[-1])

    def _may_be_absent(self) -> bool:
        return False

    def _leave_to_vllm(self, layer: Layer) -> None:
        layer.quant_method = self._plain
        self._plain.process_weights_after_loading(layer)

    def _keep_on_gpu(self, layer: Layer, rows: Rows) -> None:
        columns, outputs = rows.codes.shape[1], rows.codes.shape[0]
        found = weight_only_kernel(self._full_shape, (columns, outputs), rows.dtype) if columns % 4 == 0 else None
        if found is None:
            self._restore(layer, rows)
            return
        self._say(f"layers in 8-bit codes are held in 8 bits: vLLM's {type(found).__name__} multiplies")
        # Four codes to an int32, the first lowest, each 128 more than it stands for.
        packed = (layer.weight.data.view(torch.uint8) ^ 128).contiguous().view(torch.int32)
        scales = layer.weight_scale.data.to(rows.dtype)
        del layer.weight, layer.weight_scale
        layer.weight_packed = nn.Parameter(packed, requires_grad=False)
        layer.weight_scale = nn.Parameter(scales, requires_grad=False)
        # As vLLM's own loaders leave them.
        for parameter in (layer.weight_packed, layer.weight_scale):
            parameter.input_dim, parameter.output_dim = 1, 0
        layer.weight_packed.packed_dim = 1
        layer.params_dtype = rows.dtype
        self._kernel = found
        found.process_weights_after_loading(layer)
        del layer.resmoe_rows

    def _restore(self, layer: Layer, rows: Rows) -> None:
        self._say(f"layers in 8-bit codes without a kernel of vLLM's are restored to {rows.dtype} as they are loaded")
        del layer.weight, layer.weight_scale
        layer.weight = rows.restored()
        self._leave_to_vllm(layer)


class CodedLinearMethod(_CodedMethod, LinearMethodBase):
    """A linear layer."""

    def __init__(self, prefix: str, say: Say) -> None:
        super().__init__(prefix, PlainLinearMethod(prefix), say)


class CodedEmbeddingMethod(_CodedMethod):
    """The embedding of tokens, or the vocabulary's output layer.

    Args:
        prefix: the layer's name in the model, for errors.
        say: see ``_CodedMethod``.
        is_a_drafts: a draft's need not be stored: vLLM puts the model's in its place.
    """

    def __init__(self, prefix: str, say: Say, *, is_a_drafts: bool) -> None:
        super().__init__(prefix or "the embedding", PlainEmbeddingMethod(prefix), say)
        self._is_a_drafts = is_a_drafts
        self._tied = embeddings_are_tied()

    def embedding(self, layer: Layer, input_: Tensor) -> Tensor:
        """Rows of the tokens ``[...]`` to ``[..., H]``."""
        scales = nn.functional.embedding(input_, layer.weight_scale)
        return (nn.functional.embedding(input_, layer.weight).float() * scales.float()).to(layer.params_dtype)

    def tie_weights(self, layer: Layer, embed_tokens: Layer) -> Layer:
        """Make an output layer's weights its embedding's."""
        layer.resmoe_rows = embed_tokens.resmoe_rows
        layer.resmoe_rows.register(layer)
        return layer

    def _may_be_absent(self) -> bool:
        return self._is_a_drafts

    def _keep_on_gpu(self, layer: Layer, rows: Rows) -> None:
        if self._tied:
            # Its kernel's order of codes is not the one that tokens' rows are read in.
            self._restore(layer, rows)
        elif isinstance(layer, ParallelLMHead):
            super()._keep_on_gpu(layer, rows)
        else:
            self._say("the embedding is held in 8 bits: rows of tokens are decoded as they are read")
