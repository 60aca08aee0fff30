"""Checkpoint tensors -> stacked parameters of one layer on one rank, every tensor checked and counted.

vLLM drops unmatched names under ``experts.`` in silence and doesn't check completeness of quantised models,
so both are done here. Tensor parallelism slices rows (the intermediate dimension); expert parallelism keeps
local experts. A layer of several groups of experts has parameters for each group; vLLM knows those of the first
group that has a suffix, and their loader hands each tensor to its expert's group.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compress_tools.errors import ConfigError, FormatError
from compress_tools.format.schema import ResMoEFormat
from compress_tools.format.tensors import CENTER_EXPERT, follows_model_dtype, tensor_name
from resmoe_vllm.weights import huge_pages
from resmoe_vllm.weights.bound import ResMoEWeights
from resmoe_vllm.weights.dummy import dummy_tensors
from resmoe_vllm.weights.group_loader import GroupLoader
from resmoe_vllm.weights.layout import projection_of_shard


@dataclass(frozen=True)
class BoundGroup:
    """The loaded weights of one group of experts, as a kernel takes them.

    Attributes:
        weights: views of the layer's parameters.
        expert_map: the group's own int32 ``[E]``, global expert -> row, -1 elsewhere; None where the layer has one
            group: vLLM's own map is right.
    """

    weights: ResMoEWeights
    expert_map: Tensor | None


class LayerLoader:
    """Creates the parameters of one compressed layer and fills them.

    Args:
        fmt: the checkpoint's format block.
        index: decoder layer index.
        local_expert: global expert index -> local one, -1 when another rank's.
        tp_size: ranks that share the rows of every expert.
        tp_rank: this rank's place among them.
        padded: see ``LayerLayout``.
    """

    def __init__(
        self,
        fmt: ResMoEFormat,
        index: int,
        local_expert: Callable[[int], int],
        tp_size: int = 1,
        tp_rank: int = 0,
        *,
        padded: bool = False,
    ) -> None:
        self.fmt, self.index = fmt, index
        self.projection_of_shard = projection_of_shard(fmt)
        # Kernels are bound to the loaded tensors: set once nothing may come any more.
        self.finished = False
        layer = fmt.layers[index]
        self.groups: list[GroupLoader] = []
        self.group_of: dict[int, GroupLoader] = {}
        for number, group in enumerate(layer.expert_groups(fmt.num_experts)):
            here = sorted((expert for expert in group.experts if local_expert(expert) >= 0), key=local_expert)
            rows = {expert: row for row, expert in enumerate(here)}
            loader = GroupLoader(
                fmt,
                index,
                layer.of_group(group),
                group.experts,
                rows,
                owns_shared=number == 0,
                tp_size=tp_size,
                tp_rank=tp_rank,
                padded=padded,
            )
            self.groups.append(loader)
            self.group_of |= dict.fromkeys(group.experts, loader)

    def create_params(self, layer: torch.nn.Module, dtype: torch.dtype) -> None:
        """Register the layer's parameters on the default device.

        Args:
            layer: their owner.
            dtype: the model's; center, values and factors are held in it.
        """
        taken: set[str] = set()
        for number, group in enumerate(self.groups):
            attributes = {}
            for name, (columns, stored_dtype, shared) in group.layout.params.items():
                attributes[name] = name if shared or name not in taken else f"{name}_{number}"
                if shared and number > 0:
                    group.params[name] = self.groups[0].params[name]
                    continue
                kind = dtype if follows_model_dtype(name.split("_", 1)[1]) else getattr(torch, stored_dtype)
                shape = 1 if shared else len(group.rows), columns
                tensor = huge_pages.empty(shape, kind, torch.get_default_device())
                param = torch.nn.Parameter(tensor, requires_grad=False)
                # Where vLLM looks for it.
                vars(param)["weight_loader"] = self._loader(name)
                layer.register_parameter(attributes[name], param)
                group.params[name] = param
            taken |= set(group.layout.params)
            if len(self.groups) > 1:
                rows = [group.rows.get(expert, -1) for expert in range(self.fmt.num_experts)]
                expert_map = torch.tensor(rows, dtype=torch.int32)
                layer.register_buffer(_expert_map_name(number), expert_map, persistent=False)

    def _loader(self, name: str) -> Callable[..., bool | None]:
        """``load`` for one parameter: a function, as vLLM asks loaders for their names and signatures."""
        bound = partial(self.load, name)

        def weight_loader(
            param: torch.nn.Parameter,
            loaded_weight: Tensor,
            weight_name: str = "",
            shard_id: str = "",
            expert_id: int = CENTER_EXPERT,
            return_success: bool = False,  # noqa: FBT001, FBT002  as vLLM calls it
        ) -> bool | None:
            return bound(param, loaded_weight, weight_name, shard_id, expert_id, return_success)

        return weight_loader

    def bind(self, layer: torch.nn.Module) -> tuple[BoundGroup, ...]:
        """The groups that have experts on this rank; called after loading, which may still replace parameters."""
        return tuple(
            BoundGroup(
                group.layout.bind([group.params[name] for name in group.layout.params]),
                getattr(layer, _expert_map_name(number)) if len(self.groups) > 1 else None,
            )
            for number, group in enumerate(self.groups)
            if group.rows
        )

    # vLLM calls it by position and by these names.
    def load(
        self,
        name: str,
        param: torch.nn.Parameter,  # noqa: ARG002
        loaded_weight: Tensor,
        weight_name: str = "",
        shard_id: str = "",
        expert_id: int = CENTER_EXPERT,
        return_success: bool = False,  # noqa: FBT001, FBT002
    ) -> bool | None:
        """VLLM's weight loader of the parameter ``name``: check one tensor and put this rank's part in place.

        Args:
            name: parameter name in the group's layout, bound by ``create_params``.
            param: the parameter that vLLM found; the tensor's own may be another group's.
            loaded_weight: the stored tensor.
            weight_name: vLLM's name of it; only for messages.
            shard_id: "w1" gate, or up of experts without one, "w3" up, "w2" down.
            expert_id: global expert index.
            return_success: vLLM asks whether the tensor was this rank's.
        Returns:
            whether it was, or None when not asked.
        Raises:
            ConfigError: the layer was complete before: weights are reloaded.
            FormatError: not a tensor of this layer, loaded before, or of a wrong shape or dtype.
        """
        if self.finished:
            raise ConfigError(
                f"layer {self.index}: resmoe doesn't support reloading weights in a running engine; start vLLM again"
            )
        if shard_id not in self.projection_of_shard:
            raise FormatError(f"{weight_name or name}: this model's loader doesn't say which expert tensor it loads")
        projection, suffix = self.projection_of_shard[shard_id], name.split("_", 1)[1]
        group = self.group_of[expert_id]
        spec = group.stored.get((projection, suffix))
        if spec is None or (spec.expert is None and expert_id != CENTER_EXPERT):
            stored_name = tensor_name(self.fmt, self.index, expert_id, projection, suffix)
            raise FormatError(f"{stored_name}: quantization_config has no such tensor in layer {self.index}")
        if spec.expert is None:
            group = self.groups[0]
        row = 0 if spec.expert is None else group.rows.get(expert_id, -1)
        if row >= 0:
            group.put(spec, row, expert_id, loaded_weight)
        return row >= 0 if return_success else None

    def loader_of(self, suffix: str, shard_id: str) -> Callable[..., bool | None]:
        """A weight loader of one suffix and shard, for a model whose own loader says neither.

        Args:
            suffix: of the stored tensors.
            shard_id: as in ``load``.
        """

        def load(
            param: torch.nn.Parameter,
            loaded_weight: Tensor,
            weight_name: str = "",
            expert_id: int = CENTER_EXPERT,
            **options: Any,
        ) -> bool | None:
            success = bool(options.get("return_success"))
            return self.load(f"w_{suffix}", param, loaded_weight, weight_name, shard_id, expert_id, success)

        return load

    def check_complete(self) -> None:
        """Called after loading.

        Raises:
            FormatError: tensors are missing; names the first.
        """
        missing = [name for group in self.groups for name in group.missing()]
        if missing:
            total = sum(group.num_places for group in self.groups)
            raise FormatError(
                f"layer {self.index}: {len(missing)} of {total} tensors are missing, "
                f"first {missing[0]}; the checkpoint is incomplete, download or compress it again"
            )

    def load_dummies(self) -> None:
        """Load small random values and evenly spread masks, as if stored (``--load-format dummy``)."""
        for group in self.groups:
            tensors = dummy_tensors(self.fmt, group.spec)
            for spec in group.own_specs():
                if spec.expert is None:
                    group.put(spec, 0, CENTER_EXPERT, tensors[spec.projection, spec.suffix])
                    continue
                for expert, row in group.rows.items():
                    group.put(spec, row, expert, tensors[spec.projection, spec.suffix])


def _expert_map_name(group: int) -> str:
    """Attribute of the layer that holds a group's map of experts."""
    return f"resmoe_expert_map_{group}"
