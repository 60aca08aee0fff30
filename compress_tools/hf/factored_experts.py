"""The routed experts of one layer as a torch module whose residuals stay compressed (for transformers).

Plain torch, any device: a truth to compare with and a way to run families that vLLM can't. Speed is vLLM's job.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import reduce

import torch
from torch import Tensor, nn

from compress_tools.format.codec import decode_residual, restore_center, restore_expert
from compress_tools.format.parts.base import Rows, StoredTensors
from compress_tools.format.schema import LayerSpec, LowRankResidual, Projection
from compress_tools.format.tensors import BIAS, follows_model_dtype

# {gate_proj (if there is one) and up_proj: [T, I]} -> [T, I]
GateFunction = Callable[[Mapping[Projection, Tensor]], Tensor]
Key = tuple[Projection, str]


class FactoredExperts(nn.Module):
    """Center once per token, residual per routed expert, added before the activation (arXiv:2503.06881).

    Args:
        spec: the layer's spec.
        hidden_size: H.
        intermediate_size: I.
        shared: shared tensors by (projection, suffix).
        experts: each expert's stored tensors by (projection, suffix).
        gate_function: the activation, from the products of gate and up to the down projection's input.
        dtype: dtype of what is stored in the checkpoint's dtype; masks, codes and scales stay as stored.
    """

    def __init__(
        self,
        spec: LayerSpec,
        hidden_size: int,
        intermediate_size: int,
        shared: StoredTensors,
        experts: list[StoredTensors],
        gate_function: GateFunction,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.spec, self.num_experts = spec, len(experts)
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.gate_function = gate_function
        self._shared_keys = tuple(shared)
        for key, tensor in shared.items():
            self.register_buffer(_buffer_name(key), _as(key, tensor, dtype))
        # expert -> (its group, its row in the group's tensors)
        self._places: dict[int, tuple[int, int]] = {}
        self._expert_keys: list[tuple[Key, ...]] = []
        for number, group in enumerate(spec.expert_groups(len(experts))):
            self._expert_keys.append(tuple(experts[group.experts[0]]))
            for row, expert in enumerate(group.experts):
                self._places[expert] = number, row
            for key in self._expert_keys[number]:
                stacked = torch.stack([_as(key, experts[expert][key], dtype) for expert in group.experts])
                self.register_buffer(_buffer_name(key, number), stacked)

    def shared(self) -> StoredTensors:
        """The layer's shared tensors."""
        return {key: getattr(self, _buffer_name(key)) for key in self._shared_keys}

    def stored(self, expert: int) -> StoredTensors:
        """One expert's stored tensors."""
        number, row = self._places[expert]
        return {key: getattr(self, _buffer_name(key, number))[row] for key in self._expert_keys[number]}

    def restored(self, expert: int) -> Rows:
        """One restored expert, fp32 ``[I, H]`` rows for each projection."""
        return restore_expert(self.spec.of_expert(expert), self.shared(), self.stored(expert), self.hidden_size)

    def _center(self, dtype: torch.dtype) -> Rows:
        return restore_center(self.spec, self.shared(), self.hidden_size, dtype)

    def biases(self, expert: int) -> dict[Projection, Tensor]:
        """One expert's biases; empty without."""
        return {p: tensor for (p, suffix), tensor in self.stored(expert).items() if suffix == BIAS}

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Weighted sum of the routed experts.

        Args:
            hidden_states: ``[T, H]``.
            topk_ids: ``[T, K]`` int64; E or more means "no expert".
            topk_weights: ``[T, K]``.
        Returns:
            ``[T, H]`` in the dtype of ``hidden_states``; products in that dtype, in fp32 for fp16, sums in fp32.
        """
        # fp16 ends at 65504, which products with a center or a factor can pass where their sum does not.
        dtype = hidden_states.dtype
        if dtype == torch.float16:
            hidden_states = hidden_states.float()
        center = self._center(hidden_states.dtype)
        inner = [p for p in self.spec.projections if p != "down_proj"]
        common = {p: (hidden_states @ center[p].T).float() for p in inner if p in center}
        mixed = torch.zeros(len(hidden_states), self.intermediate_size, device=hidden_states.device)
        output = torch.zeros(hidden_states.shape, device=hidden_states.device)
        for expert in sorted(set(topk_ids[topk_ids < self.num_experts].tolist())):
            tokens, slots = (topk_ids == expert).nonzero(as_tuple=True)
            x, weight = hidden_states[tokens], topk_weights[tokens, slots, None].float()
            products = _ExpertProducts(self, expert, x.dtype)
            biases = self.biases(expert)
            before: dict[Projection, Tensor] = {}
            for p in inner:
                value = products.into(p, x)
                value = value + common[p][tokens] if p in common else value
                before[p] = value + biases[p].float() if p in biases else value
            activated = self.gate_function(before) * weight
            mixed.index_add_(0, tokens, activated)
            out = products.out_of("down_proj", activated.to(x.dtype))
            if "down_proj" in biases:
                out = out + weight * biases["down_proj"].float()
            output.index_add_(0, tokens, out)
        if "down_proj" in center:
            output += (mixed.to(hidden_states.dtype) @ center["down_proj"]).float()
        return output.to(dtype)


class _ExpertProducts:
    """Products with one expert's residual: through the factors where all parts are low rank, else decoded."""

    def __init__(self, layer: FactoredExperts, expert: int, dtype: torch.dtype) -> None:
        self._stored = layer.stored(expert)
        self._spec, self._hidden_size, self._dtype = layer.spec.of_expert(expert), layer.hidden_size, dtype
        self._low_rank = [part for part in self._spec.residual if isinstance(part, LowRankResidual)]
        self._factored = len(self._low_rank) == len(self._spec.residual)
        if not self._factored:
            decoded = decode_residual(self._spec, self._stored, layer.hidden_size)
            self._decoded = {p: rows.to(dtype) for p, rows in decoded.items()}

    def into(self, projection: Projection, x: Tensor) -> Tensor:
        """``x [T, H]`` times the residual of gate or up: ``[T, I]`` fp32."""
        if not self._factored:
            return (x @ self._decoded[projection].T).float()
        return _sum((x @ v.T) @ u.T for u, v in self._factors(projection)).float()

    def out_of(self, projection: Projection, a: Tensor) -> Tensor:
        """``a [T, I]`` times the residual of down: ``[T, H]`` fp32."""
        if not self._factored:
            return (a @ self._decoded[projection]).float()
        return _sum((a @ u) @ v for u, v in self._factors(projection)).float()

    def _factors(self, projection: Projection) -> list[tuple[Tensor, Tensor]]:
        return [
            (
                part.left_factor(self._stored).to(self._dtype),
                part.right_factor(self._stored, projection, self._hidden_size).to(self._dtype),
            )
            for part in self._low_rank
            if projection in part.projections
        ]


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, terms)


def _buffer_name(key: Key, group: int | None = None) -> str:
    name = "_".join(key)
    return name if group is None else f"{name}_{group}"


def _as(key: Key, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if follows_model_dtype(key[1]) else tensor
