"""The fused layer on a GPU: a handful of Triton launches, every coder, weights read as they are stored.

1. align: pairs sorted by expert.
2. first: ``x C^T`` of the center's gate and up, once per token, beside ``x V^T`` of the low-rank residuals; only where
   there is either.
3. hidden: ``a = weight * activation`` of each pair; decodes bitmaps and codes, multiplies by U, adds biases.
4. shrink: ``a U``; only for a low-rank down projection.
5. mix: each token's summed ``a``; only for a down projection with a center of its own.
6. last: the center's down product of the sum, beside the residual's of each pair.
7. combine: each token's sum, and its experts' biases of down.

A layer with several groups of experts takes 1, 3, 4 and its part of 2 and 6 for each; the center, 5 and 7 once.
A lone token takes neither 1, as each of its pairs is a block, nor 5: the center's down product is taken of its pairs.

Three strategies for tiles that are decoded, same result (``block_sizes.Strategy``): few tokens take the center's
product once per token; more add the center to the decoded tile and take one product. Many restore weights to a scratch
(scratch.py) before 3, and before 6, and take products of plain weights; where the scratch doesn't hold all experts,
some at a time, with launches of their own. All that kernels are compiled for
depends on the layer and the class of T alone (``block_sizes.TokenClass``), so they are compiled, and their launches
kept, before the first request; nothing is read back, so a CUDA graph may hold them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress_tools.errors import KernelUnsupportedError
from resmoe_vllm.kernels.activation import FUNCTIONS, Activation
from resmoe_vllm.kernels.gpu.align import Routing, align, max_blocks
from resmoe_vllm.kernels.gpu.block_sizes import FEW_TOKENS, Blocks, Config, Strategy, TokenClass
from resmoe_vllm.kernels.gpu.kernels import (
    TRITON_DTYPES,
    ActivationSpec,
    Product,
    ProductSpec,
    Rank,
    SideSpec,
    _combine_kernel,
    _hidden_kernel,
    _products_kernel,
    _restore_kernel,
)
from resmoe_vllm.kernels.gpu.plans import GroupPlan, LayerPlan, Plan, Weight
from resmoe_vllm.kernels.gpu.scratch import chunk_experts, matrices, scratch, scratch_bytes
from resmoe_vllm.kernels.gpu.tiles import PLAIN, Tile, TileSpec

# Values of one slab in a program of ``combine``, one warp, and the fewest and most columns: few tokens have more slabs.
FEW_COMBINED, MANY_COMBINED = (512, 32, 128), (2048, 64, 256)
# that one launch takes
MAX_PRODUCTS = 4
# The reader of slabs adds them up unrolled: with eight, ptxas spilled thousands of bytes.
MAX_SPLITS = 4
# Pointers are compiled for as multiples of it.
ALIGNMENT = 16
# blocks of pairs that an expert is looked for in at once
RESTORE_STEP = 1024

NOTHING = (None, None)
# experts, the first and behind the last; None for all
_Chunk = tuple[int, int] | None
_ALL: tuple[_Chunk, ...] = (None,)


def run_plan(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    plan: LayerPlan,
    activation: Activation,
    expert_map: Tensor | None,
    config: Config,
) -> Tensor:
    """One layer, once: ``LayerLaunches`` that nobody keeps."""
    launches = LayerLaunches(plan, activation, TokenClass(len(x), config), _share(plan, expert_map))
    return launches(*checked(x, topk_weights, topk_ids, plan, activation), expert_map)


def _share(plan: LayerPlan, expert_map: Tensor | None) -> float:
    """Of the layer's experts that are on this rank."""
    return plan.experts / (plan.experts if expert_map is None else len(expert_map))


def checked(
    x: Tensor, topk_weights: Tensor, topk_ids: Tensor, plan: LayerPlan, activation: Activation
) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs as kernels are compiled for: contiguous, aligned, weights fp32, ids int32.

    Raises:
        KernelUnsupportedError: activation, dtype or sizes that the kernels don't have.
    """
    if activation.function not in FUNCTIONS or x.dtype not in TRITON_DTYPES:
        raise KernelUnsupportedError(f"resmoe's GPU kernels have no {activation.function!r} in {x.dtype}")
    if x.dim() != 2 or x.shape[1] != plan.hidden or not len(x) == len(topk_ids) == len(topk_weights):
        raise KernelUnsupportedError(
            f"expected x [T, {plan.hidden}] and T rows of topk, found x {list(x.shape)}, topk_ids "
            f"{list(topk_ids.shape)} and topk_weights {list(topk_weights.shape)}"
        )
    return (
        _aligned(x.contiguous()),
        _aligned(topk_weights.to(torch.float32).contiguous()),
        _aligned(topk_ids.to(torch.int32).contiguous()),
    )


def _aligned(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


@dataclass(frozen=True)
class _Job:
    """A product before it has its place in a launch: what is the same in every call, and its share of the slabs.

    Attributes:
        center_of_pairs: its rows are pairs, although all have the one weight.
    """

    weight: Weight
    spec: ProductSpec
    product: Product
    splits: int = 1
    slab: int = 0
    center_of_pairs: bool = False

    @property
    def pairs(self) -> bool:
        """Whether its rows are pairs."""
        return self.spec.routed or self.center_of_pairs


class _Products:
    """One launch of ``_products_kernel``, the longest programs first.

    Args:
        jobs: up to ``MAX_PRODUCTS``.
        blocks: of all of them.
    """

    def __init__(self, jobs: Sequence[_Job], blocks: Blocks) -> None:
        jobs = [replace(job, spec=job.spec._replace(even=_is_even(job, blocks))) for job in jobs]
        self.jobs, self.blocks = jobs, blocks
        # what the kernel takes of a job, but for its tensors; and its programs for each block of rows
        self.constants = [(job.product, job.spec, *job.weight) for job in jobs]
        self.programs = [_ceil_div(job.product.n, blocks.n) * job.splits for job in jobs]
        self.order = sorted(range(len(jobs)), key=lambda place: -jobs[place].product.k // jobs[place].splits)
        ordered = [jobs[place] for place in self.order]
        missing = (0,) * (MAX_PRODUCTS - len(jobs))
        self.slab_arguments = (*(job.splits for job in ordered), *missing, *(job.slab for job in ordered), *missing)
        self.absent = (None,) * 6 * len(missing)
        self.absent_ends = len(missing)
        self.center_of_pairs = any(job.center_of_pairs for job in jobs)

    @property
    def slabs(self) -> int:
        """Of the products of pairs."""
        return sum(job.splits for job in self.jobs if job.pairs)


@dataclass(frozen=True)
class _Restored:
    """Weights of a group that are restored together.

    Attributes:
        weights: what they are restored from, None for one that isn't.
        plain: the same restored, in the scratch, ``[experts, I, H]``.
        chunks: experts at a time.
    """

    weights: tuple[Weight | None, ...]
    plain: tuple[Weight | None, ...]
    chunks: tuple[_Chunk, ...]


class LayerLaunches:
    """A layer's launches for one class of token counts: all that does not change from call to call is made here.

    Args:
        plan: the layer.
        activation: the experts'.
        token_class: block sizes, and the token count that contractions are split for.
        share: of the model's experts that are on this rank.
    """

    def __init__(self, plan: LayerPlan, activation: Activation, token_class: TokenClass, share: float = 1.0) -> None:
        self.plan, self.activation = plan, _spec(activation)
        self.config, self.tokens, self.share = token_class.config, token_class.tokens, share
        # What goes from launch to launch is small beside the weights while tokens are few.
        self.few = token_class.tokens <= FEW_TOKENS
        self.lone = token_class.tokens == 1 and self.config.strategy != Strategy.RESTORED
        self.top_k, self.choices, self.dtype, self.combine_columns = 0, 0, torch.float32, 0
        self.kept: dict[object, Any] = {}

    def __call__(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor | None = None) -> Tensor:
        """One call.

        Args:
            x: ``[T, H]``, fp32, bf16 or fp16; this and the next two as ``checked`` gives them.
            topk_weights: fp32 ``[T, K]``.
            topk_ids: global expert ids, int32 ``[T, K]``; negative ones are skipped.
            expert_map: int32 ``[E]`` global -> local, -1 elsewhere; None when all experts are here.
        Returns:
            ``[T, H]``, x's dtype, fresh.
        """
        if topk_ids.numel() == 0:
            return torch.zeros_like(x)
        return self.call(x, topk_weights, topk_ids, expert_map).run()

    def call(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor | None) -> "_Call":
        """One call, its pairs sorted."""
        if (topk_ids.shape[1], x.dtype) != (self.top_k, self.dtype):
            self._prepare(topk_ids.shape[1], x.dtype, x.device)
        return _Call(self, x, topk_weights, topk_ids, expert_map)

    def _prepare(self, top_k: int, dtype: torch.dtype, device: torch.device) -> None:
        """Products of each launch, and into how many slabs they are split; where restored weights stand."""
        self.top_k, self.dtype = top_k, dtype
        self.choices = triton.next_power_of_2(top_k)
        values, fewest, most = FEW_COMBINED if self.few else MANY_COMBINED
        self.combine_columns = min(most, max(fewest, values // self.choices))
        self.kept.clear()
        groups = self.plan.groups
        self.restored_sides = [self._restored((group.gate, group.up), group.experts, device) for group in groups]
        self.restored_down = [self._restored((group.down,), group.experts, device) for group in groups]
        self.slab_dtype = torch.float32 if self.few else dtype
        # The interpreter's bf16 products are wrong, so there all are taken in fp32.
        self.dot = tl.float32 if triton.knobs.runtime.interpret else TRITON_DTYPES[dtype]
        size_i, size_h = self.plan.intermediate, self.plan.hidden
        self.first: list[_Products] = []
        self.shrink: list[_Products] = []
        self.last: list[_Products] = []
        self.sides: list[tuple[Plan, Plan]] = []
        self.centers = tuple(
            next((side.center for side in sides if side.center is not None), None)
            for sides in zip(*((group.gate, group.up, group.down) for group in self.plan.groups), strict=True)
        )
        # The center's down product is taken of pairs, if they fill no more than the block that their sum does.
        self.center_of_pairs = (
            self.lone and len(self.plan.groups) == 1 and top_k <= self.config.token_rows and self.centers[2] is not None
        )
        for number, group in enumerate(self.plan.groups):
            centers = [
                _Job(center, ProductSpec(False, 1, True), Product(size_h, size_i, size_h, size_i, size_h))
                for center in self.centers[:2]
                if center is not None and number == 0
            ]
            pairs = [
                _Job(f.v, ProductSpec(True, top_k, True), Product(size_h, f.width, size_h, f.rank, size_h))
                for f in (group.gate.factors, group.up.factors)
                if f is not None
            ]
            # Pairs' products are the next one's A, where a sum of slabs would stop the pipeline: not split.
            self.first.append(self._split(centers, pairs, self.config.first, group, split_pairs=False))
            pairs, shrinks = [], []
            if group.down.tile is not None:
                product = Product(size_i, size_h, size_i, size_i, size_h)
                plain = self.restored_down[number].plain[0]
                spec = ProductSpec(True, 1, False, restored=plain is not None)
                pairs.append(_Job(plain or group.down.tile, spec, product))
            if (f := group.down.factors) is not None:
                product = Product(size_i, f.width, size_i, size_i, f.columns)
                shrinks.append(_Job(f.u, ProductSpec(True, 1, False), product))
                pairs.append(_Job(f.v, ProductSpec(True, 1, False), Product(f.width, size_h, f.width, f.rank, size_h)))
            self.shrink.append(_Products(shrinks, self.config.shrink))
            center = self.centers[2] if number == 0 else None
            product = Product(size_i, size_h, size_i, size_i, size_h)
            spec = ProductSpec(False, 1, False)
            of_pairs = self.center_of_pairs
            centers = [] if center is None else [_Job(center, spec, product, center_of_pairs=of_pairs)]
            self.last.append(self._split(centers, pairs, self.config.last, group, split_pairs=True))
        self._even_out()
        # what is launched again for restored weights of more experts
        self.more = [
            _Products([job for job in products.jobs if job.spec.restored], products.blocks) for products in self.last
        ]

    def _restored(self, plans: tuple[Plan, ...], experts: int, device: torch.device) -> _Restored:
        """Which weights of a group are restored, and where to."""
        wanted = self.config.strategy == Strategy.RESTORED
        weights = tuple(plan.tile if wanted and plan.is_decoded else None for plan in plans)
        count = sum(weight is not None for weight in weights)
        if not count:
            return _Restored(weights, weights, _ALL)
        size_i, size_h, itemsize = self.plan.intermediate, self.plan.hidden, self.dtype.itemsize
        # as much as gate and up of any group could take
        memory = scratch(device, scratch_bytes(2, self.plan.experts, size_i * size_h, itemsize))
        some = chunk_experts(count, experts, size_i * size_h, itemsize)
        found = iter(matrices(memory, count, some, (size_i, size_h), self.dtype))
        plain = []
        for weight in weights:
            own = None if weight is None else next(found)
            tile = None if own is None else (Tile(own=own, own_stride=own.stride(0)), TileSpec(own_bits=PLAIN))
            plain.append(tile)
        chunks = tuple((first, min(first + some, experts)) for first in range(0, experts, some))
        return _Restored(weights, tuple(plain), chunks)

    def _split(
        self, centers: list[_Job], pairs: list[_Job], blocks: Blocks, group: GroupPlan, *, split_pairs: bool
    ) -> _Products:
        """Each job's splits and first slab, for about as many programs as are wanted."""
        jobs = [*centers, *pairs]
        grids = [self._blocks(job, group) * _ceil_div(job.product.n, blocks.n) for job in jobs]
        wanted = triton.next_power_of_2(max(1, self.config.programs // max(1, sum(grids))))
        made, slab = [], 0
        for job in jobs:
            # The center's down product takes more steps than those of factors beside it, and all wait for its last.
            longest = self.few and split_pairs and not job.spec.routed and self.config.programs > 1
            splits = MAX_SPLITS if longest else wanted
            splits = min(splits, MAX_SPLITS, _power_below(_ceil_div(job.product.k, blocks.k)))
            if not job.pairs:
                made.append(replace(job, splits=splits))
                continue
            splits = splits if split_pairs else 1
            made.append(replace(job, splits=splits, slab=slab if split_pairs else 0))
            slab += splits
        return _Products(made, blocks)

    def _blocks(self, job: _Job, group: GroupPlan) -> int:
        """Blocks of rows that a job of this class has, as far as tokens spread evenly over experts."""
        if not job.spec.routed:
            return -(-self.tokens // self.config.token_rows)
        pairs = self.tokens * self.top_k * self.share * group.experts / max(1, self.plan.experts)
        return max_blocks(max(1, round(pairs)), self.config.block_m, max(1, group.experts))

    def _even_out(self) -> None:
        """Every group's pairs have as many slabs as those of the one with most: a split without steps gives zeros."""
        self.pair_slabs = max(products.slabs for products in self.last)
        for number, products in enumerate(self.last):
            missing = self.pair_slabs - products.slabs
            if not products.slabs or not missing:
                continue
            jobs = list(products.jobs)
            jobs[-1] = replace(jobs[-1], splits=jobs[-1].splits + missing)
            self.last[number] = _Products(jobs, products.blocks)

    def launch(self, key: object, kernel: Any, grid: tuple[int, int, int], *arguments: object, **options: int) -> None:
        """Launch, by Triton's own dispatch the first time, then as it was compiled."""
        compiled = self.kept.get(key)
        if compiled is None:
            self.kept[key] = kernel[grid](*arguments, **options)
        else:
            compiled[grid](*arguments)


class _Call:
    """One call: tensors, routing and counts that its launches share."""

    def __init__(
        self,
        launches: LayerLaunches,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        expert_map: Tensor | None,
    ) -> None:
        self.launches, self.plan, self.x = launches, launches.plan, x
        self.topk_weights, self.topk_ids, self.expert_map = topk_weights, topk_ids, expert_map
        self.tokens, self.pairs = len(x), topk_ids.numel()
        self.routings = [self._align(number, group) for number, group in enumerate(self.plan.groups)]

    def run(self) -> Tensor:
        """``[T, H]``."""
        launches, plan = self.launches, self.plan
        hidden = self.hidden()
        shrunk = [self.shrink(number, hidden) for number in range(len(plan.groups))]
        mixed = None
        if launches.centers[2] is not None and not launches.center_of_pairs:
            mixed = self.empty(self.tokens, plan.intermediate)
            self.combine("mix", mixed, hidden, 1, None, 0, pair_map=self._several(plan.summed))
        return self.down(hidden, mixed, shrunk)

    def _align(self, number: int, group: GroupPlan) -> Routing:
        own = self.expert_map if group.expert_map is None else group.expert_map
        if self.launches.lone:
            return Routing(self.topk_ids, expert_map=own)
        launch = partial(self.launches.launch, ("align", number, own is None))
        sorted_pairs, blocks, length = align(self.topk_ids, self.launches.config.block_m, group.experts, own, launch)
        return Routing(blocks, sorted_pairs, length)

    def hidden(self) -> Tensor:
        """``[P, I]``: launches 2 and 3."""
        hidden = self.empty(self.pairs, self.plan.intermediate)
        centers: list[Tensor | None] = [None, None]
        for number, group in enumerate(self.plan.groups):
            products = self.launches.first[number]
            outs = [self._out(job) for job in products.jobs]
            self.products("first", number, products, [self.x] * len(outs), outs)
            made = iter(outs)
            if number == 0:
                centers = [None if center is None else next(made) for center in self.launches.centers[:2]]
            shrunk = [None if side.factors is None else next(made) for side in (group.gate, group.up)]
            restored = self.launches.restored_sides[number]
            for chunk in restored.chunks:
                self._restore("sides", number, restored, chunk)
                self._hidden(number, hidden, centers, shrunk, restored.plain, chunk)
        return hidden

    def _restore(self, name: str, number: int, restored: _Restored, chunk: _Chunk) -> None:
        """Weights of some experts, or of none, into the scratch."""
        if chunk is None:
            return
        launches, plan, routing = self.launches, self.plan, self.routings[number]
        blocks = launches.config.restore
        first, end = chunk
        for place, (weight, plain) in enumerate(zip(restored.weights, restored.plain, strict=True)):
            if weight is None or plain is None:
                continue
            launches.launch(
                ("restore", name, place, number),
                _restore_kernel,
                (_ceil_div(plan.intermediate, blocks.n), end - first, 1),
                routing,
                first,
                plain[0].own,
                *weight,
                plan.intermediate,
                plan.hidden,
                launches.config.block_m,
                blocks.n,
                blocks.k,
                RESTORE_STEP,
                launches.dot,
                num_warps=blocks.warps,
                num_stages=blocks.stages,
            )

    def _hidden(
        self,
        number: int,
        hidden: Tensor,
        centers: list[Tensor | None],
        shrunk: list[Tensor | None],
        restored: Sequence[Weight | None],
        chunk: _Chunk,
    ) -> None:
        launches, group, routing = self.launches, self.plan.groups[number], self.routings[number]
        blocks, sides = launches.config.hidden, (group.gate, group.up)
        # One group may hold the center in its tiles, the next not.
        centers = [slabs if side.center is not None else None for side, slabs in zip(sides, centers, strict=True)]
        m_blocks = routing.block_experts.numel()
        static: list[object] = []
        for side, slabs, plain in zip(sides, centers, restored, strict=True):
            factors, bias = side.factors, side.bias
            splits = 0 if slabs is None else len(slabs)
            stride = 0 if bias is None else bias.stride(0)
            static += [SideSpec(splits, factors is not None, stride, restored=plain is not None)]
            static += plain or side.tile or NOTHING
            static += (None, *NOTHING) if factors is None else (Rank(factors.width, factors.columns), *factors.u)
        gate, up = group.gate.factors, group.up.factors
        launches.launch(
            ("hidden", number, self.expert_map is None),
            _hidden_kernel,
            (m_blocks * _ceil_div(self.plan.intermediate, blocks.n), 1, 1),
            self.x,
            hidden,
            self.topk_weights,
            routing,
            self.pairs,
            self.tokens,
            m_blocks,
            *(chunk or NOTHING),
            *centers,
            *shrunk,
            group.gate.bias,
            group.up.bias,
            *static,
            gate is not None and up is not None and gate.part == up.part,
            launches.top_k,
            self.plan.hidden,
            self.plan.intermediate,
            launches.activation,
            launches.config.block_m,
            blocks.n,
            blocks.k,
            launches.dot,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )

    def shrink(self, number: int, hidden: Tensor) -> Tensor | None:
        """``a U`` of a group: launch 4."""
        products = self.launches.shrink[number]
        if not products.jobs:
            return None
        out = self._out(products.jobs[0])
        self.products("shrink", number, products, [hidden], [out])
        return out

    def down(self, hidden: Tensor, mixed: Tensor | None, shrunk: list[Tensor | None]) -> Tensor:
        """``[T, H]``: launches 6 and 7."""
        launches, plan = self.launches, self.plan
        size_h = plan.hidden
        pair_slabs = token_slabs = None
        if launches.pair_slabs:
            pair_slabs = self.empty(launches.pair_slabs, self.pairs, size_h, dtype=launches.slab_dtype)
        for number, products in enumerate(launches.last):
            restored = launches.restored_down[number]
            sources: list[Tensor | None] = []
            outs: list[Tensor | None] = []
            for job in products.jobs:
                if not job.pairs:
                    token_slabs = self._out(job)
                    sources.append(mixed)
                    outs.append(token_slabs)
                else:
                    factors = plan.groups[number].down.factors
                    sources.append(shrunk[number] if factors is not None and job.weight is factors.v else hidden)
                    outs.append(pair_slabs)
            for place, chunk in enumerate(restored.chunks):
                self._restore("down", number, restored, chunk)
                if place == 0:
                    self.products("last", number, products, sources, outs, chunk)
                else:
                    self.products("more", number, launches.more[number], [hidden], [pair_slabs], chunk)
        out = torch.empty_like(self.x)
        token_count = 0 if token_slabs is None else len(token_slabs)
        self.combine(
            "combine",
            out,
            pair_slabs,
            launches.pair_slabs,
            token_slabs,
            token_count,
            pair_map=self._several(plan.paired),
            bias=plan.down_bias,
        )
        return out

    def products(
        self,
        name: str,
        number: int,
        products: _Products,
        sources: Sequence[Tensor | None],
        outs: Sequence[Tensor | None],
        chunk: _Chunk = None,
    ) -> None:
        """One launch, or none where there is no job; restored weights are those of some experts."""
        if not products.jobs:
            return
        launches, blocks = self.launches, products.blocks
        routing = self.routings[number]
        m_blocks = routing.block_experts.numel()
        unrouted_rows = self.pairs if products.center_of_pairs else self.tokens
        token_m = launches.config.token_rows
        token_blocks = -(-unrouted_rows // token_m)
        arguments: list[object] = []
        ends: list[int] = []
        end = 0
        for place in products.order:
            arguments += (sources[place], outs[place], *products.constants[place])
            end += (m_blocks if products.jobs[place].spec.routed else token_blocks) * products.programs[place]
            ends.append(end)
        ends += [end] * products.absent_ends
        launches.launch(
            (name, number, self.expert_map is None),
            _products_kernel,
            (end, 1, 1),
            routing,
            self.pairs,
            unrouted_rows,
            m_blocks,
            *(chunk or NOTHING),
            *ends[:-1],
            *products.slab_arguments,
            *arguments,
            *products.absent,
            launches.config.block_m,
            token_m,
            blocks.n,
            blocks.k,
            launches.dot,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )

    def combine(
        self,
        name: str,
        out: Tensor,
        pairs: Tensor | None,
        pair_slabs: int,
        whole: Tensor | None,
        token_slabs: int,
        *,
        pair_map: Tensor | None,
        bias: Tensor | None = None,
    ) -> None:
        """Sum into ``out`` ``[T, N]``: slabs ``[S, P, N]`` over a token's pairs, ``[S, T, N]``, weighted biases."""
        launches, size_n = self.launches, out.shape[1]
        columns = launches.combine_columns
        launches.launch(
            (name, self.expert_map is None),
            _combine_kernel,
            (self.tokens, _ceil_div(size_n, columns), 1),
            out,
            pairs,
            whole,
            bias,
            self.topk_weights,
            self.topk_ids,
            pair_map,
            # of several groups the biases lie by global expert
            self.expert_map if len(self.plan.groups) == 1 else None,
            self.pairs,
            self.tokens,
            size_n,
            pair_slabs,
            token_slabs,
            0 if bias is None else bias.stride(0),
            launches.top_k,
            launches.choices,
            columns,
            num_warps=1,
        )

    def _out(self, job: _Job) -> Tensor:
        """Slabs of a product of tokens; of pairs the next product's A, in the model's dtype."""
        if job.spec.routed:
            return self.empty(self.pairs, job.product.n)
        return self.empty(job.splits, self.tokens, job.product.n, dtype=self.launches.slab_dtype)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Fresh memory on x's device, in its dtype if no other is given."""
        return torch.empty(shape, dtype=dtype or self.x.dtype, device=self.x.device)

    def _several(self, own: Tensor | None) -> Tensor | None:
        """The layer's own map of some of its experts, or the caller's."""
        return self.expert_map if own is None else own


def _spec(activation: Activation) -> ActivationSpec:
    return ActivationSpec(
        activation.function,
        activation.gated,
        activation.limit is not None,
        0.0 if activation.limit is None else activation.limit,
        activation.alpha,
        activation.beta,
        activation.limit_after,
    )


def _is_even(job: _Job, blocks: Blocks) -> bool:
    """Whether a product's weight consists of whole blocks."""
    product = job.product
    rows, columns = (blocks.n, blocks.k) if job.spec.transposed else (blocks.k, blocks.n)
    whole = product.rows == (product.n if job.spec.transposed else product.k)
    return whole and product.rows % rows == 0 and product.columns % columns == 0 and product.k % blocks.k == 0


def _ceil_div(count: int, size: int) -> int:
    """Triton's own takes the host two microseconds."""
    return -(-count // size)


def _power_below(steps: int) -> int:
    """Largest power of two that leaves every split two of these steps, or 1."""
    return 1 << max(0, (steps // 2).bit_length() - 1)
