"""Sums over the tokens that each expert of a layer gets: what ``importance`` makes of them stands there."""

from typing import Any

import torch
from torch import Tensor, nn

from compress_tools.architectures.experts import ExpertWeights
from compress_tools.errors import UnsupportedArchitectureError
from compress_tools.format.schema import Projection
from compress_tools.hf.dense_experts import expert_of, gate_function, takes_rows
from compress_tools.importance import COLUMNS, COUNTS, OUTPUT, ROUTING


class LayerStatistics:
    """One layer's sums, filled by the calls that its experts module gets.

    Args:
        dense: transformers' experts module.
        projections: of the experts.
        num_experts: E.
        rows: I.
        columns: H.
    """

    def __init__(
        self, dense: nn.Module, projections: tuple[Projection, ...], num_experts: int, rows: int, columns: int
    ) -> None:
        self._dense, self._activate = dense, gate_function(dense)
        self._counts, self._routing, self._output = (torch.zeros(num_experts, dtype=torch.float64) for _ in range(3))
        self._columns = torch.zeros(num_experts, columns, dtype=torch.float64)
        self._rows = {p: torch.zeros(num_experts, rows, dtype=torch.float64) for p in projections}
        self._tokens = 0

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a call of the module: see ``nn.Module.register_forward_pre_hook``."""
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if takes_rows(module) and len(tensors) == 1:
            self._add_rows(tensors[0])
            return
        floats = [tensor for tensor in tensors if tensor.is_floating_point()]
        whole = [tensor for tensor in tensors if not tensor.is_floating_point()]
        if len(tensors) != 3 or len(whole) != 1 or floats[1].shape != whole[0].shape:
            raise UnsupportedArchitectureError(
                f"{type(module).__name__} of this transformers takes no inputs [T, H], chosen experts [T, K] and their "
                "weights [T, K]; what reaches each expert can't be told"
            )
        hidden, weights = floats
        self._tokens += len(hidden)
        for expert in range(len(self._counts)):
            tokens, slots = (whole[0] == expert).nonzero(as_tuple=True)
            if len(tokens):
                self._add(expert, hidden[tokens], weights[tokens, slots])

    def _add_rows(self, rows: Tensor) -> None:
        """Llama-4: all tokens for each expert, router weights on them, zeros where it is not chosen."""
        blocks = rows.view(len(self._counts), -1, rows.shape[-1])
        self._tokens += blocks.shape[1]
        for expert, block in enumerate(blocks):
            chosen = block[(block != 0).any(1)]
            if len(chosen):
                self._add(expert, chosen, chosen.new_ones(len(chosen)))

    def _add(self, expert: int, x: Tensor, weights: Tensor) -> None:
        """Tokens ``[N, H]`` of one expert, and the router's weights ``[N]``."""
        own = expert_of(self._dense, expert)
        activated, slopes = self._through(own, x)
        squares = weights.float().square()  # [N]
        reach = own.down.float().square().sum(0)  # [I]
        self._counts[expert] += len(x)
        self._routing[expert] += squares.sum()
        self._columns[expert] += squares @ x.float().square()
        self._rows["down_proj"][expert] += squares @ activated.float().square()
        for projection, slope in slopes.items():
            self._rows[projection][expert] += reach * (squares @ slope.float().square())
        output = activated @ own.down.T
        if "down_proj" in own.biases:
            output = output + own.biases["down_proj"]
        self._output[expert] += squares @ output.float().square().sum(1)

    def _through(self, own: ExpertWeights, x: Tensor) -> tuple[Tensor, dict[Projection, Tensor]]:
        """The down projection's input ``[N, I]``, and its derivative by the products of gate and up."""
        before: dict[Projection, Tensor] = {}
        for projection in self._rows:
            if projection != "down_proj":
                product = x @ own.matrix(projection).T
                product = product + own.biases[projection] if projection in own.biases else product
                before[projection] = product.detach()
        with torch.enable_grad():
            for product in before.values():
                product.requires_grad_()
            activated = self._activate(before)
            slopes = torch.autograd.grad(activated.sum(), list(before.values()))
        return activated.detach(), dict(zip(before, slopes, strict=True))

    def tensors(self) -> dict[str, Tensor]:
        """What is kept, by the names of ``importance``: means over tokens, weighed by the router's squared weights."""
        routed = self._routing.clamp_min(torch.finfo(torch.float64).tiny)
        found = {COLUMNS: self._columns / routed[:, None], OUTPUT: self._output / routed}
        found |= {p: own / routed[:, None] for p, own in self._rows.items()}
        found[ROUTING] = self._routing / max(self._tokens, 1)
        return {name: tensor.float() for name, tensor in found.items()} | {COUNTS: self._counts.long()}
