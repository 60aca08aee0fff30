"""The fused layer on a GPU: four to seven Triton launches, every coder, weights read as they are stored.

1. align: pairs sorted by expert.
2. first: ``x C^T`` of the center's gate and up, once per token, beside ``x V^T`` of the low-rank residuals; only where
   there is either.
3. hidden: ``a = weight * activation`` of each pair; decodes bitmaps and codes, multiplies by U, adds biases.
4. shrink: ``a U``; only for a low-rank down projection.
5. last: the residual's down product of each pair beside the center's, of the token's summed ``a``; for many tokens
   that sum is a launch of its own before.
6. combine: each token's sum, and its experts' biases of down.

Two strategies for tiles that are decoded, same result (``Config.restore``): few tokens take the center's product
once per token; many add the center to the decoded tile and take one product. Shapes depend on T, K and the layer
alone and nothing is read back, so a CUDA graph may hold it.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress_tools.errors import KernelUnsupportedError
from resmoe_vllm.kernels.activation import FUNCTIONS, Activation
from resmoe_vllm.kernels.gpu.align import align
from resmoe_vllm.kernels.gpu.block_sizes import FEW_TOKENS, Blocks, Config
from resmoe_vllm.kernels.gpu.kernels import (
    TRITON_DTYPES,
    ActivationSpec,
    Product,
    ProductSpec,
    Routing,
    Side,
    SideSpec,
    _combine_kernel,
    _hidden_kernel,
    _products_kernel,
)
from resmoe_vllm.kernels.gpu.tiles import Tile, TileSpec

COMBINE_COLUMNS = 512
# that one launch takes
MAX_PRODUCTS = 4
# The reader of slabs adds them up unrolled: with eight, ptxas spilled thousands of bytes.
MAX_SPLITS = 4

Weight = tuple[Tile, TileSpec]
NOTHING = (None, None)


@dataclass(frozen=True)
class Factors:
    """``U V`` of one projection; ``part`` tells whether two projections share U."""

    u: Weight
    v: Weight
    rank: int
    part: int


@dataclass(frozen=True)
class Plan:
    """One projection: what is multiplied once per token, what for each pair.

    Attributes:
        center: once per token; None where there is none or the tile holds it.
        tile: for each pair.
        factors: for each pair.
        bias: ``[E, I]``, of down ``[E, H]``.
    """

    center: Weight | None
    tile: Weight | None
    factors: Factors | None
    bias: Tensor | None = None

    @property
    def bias_stride(self) -> int:
        """From one expert's bias to the next; 0 where there is none."""
        return 0 if self.bias is None else self.bias.stride(0)


@dataclass(frozen=True)
class LayerPlan:
    """A layer's weights as the kernels take them; E experts, I rows, H columns."""

    gate: Plan
    up: Plan
    down: Plan
    experts: int
    intermediate: int
    hidden: int


def run_plan(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    plan: LayerPlan,
    activation: Activation,
    expert_map: Tensor | None,
    config: Config,
) -> Tensor:
    """One layer.

    Args:
        x: ``[T, H]``, fp32, bf16 or fp16.
        topk_weights: ``[T, K]``.
        topk_ids: global expert ids ``[T, K]``, int; negative ones are skipped.
        plan: the layer.
        activation: the experts'.
        expert_map: int ``[E]`` global -> local, -1 elsewhere; None when all experts are here.
        config: block sizes.
    Returns:
        ``[T, H]``, x's dtype, fresh.
    Raises:
        KernelUnsupportedError: activation, dtype or sizes that the kernels don't have.
    """
    _check(x, topk_weights, topk_ids, plan, activation)
    if topk_ids.numel() == 0:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    x, topk_weights, topk_ids = x.contiguous(), topk_weights.contiguous(), topk_ids.contiguous()
    run = _Run(x, topk_ids, expert_map, plan, config)
    hidden = run.hidden(topk_weights, activation)
    return run.down(hidden, topk_weights)


def _check(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, plan: LayerPlan, activation: Activation) -> None:
    if activation.function not in FUNCTIONS or x.dtype not in TRITON_DTYPES:
        raise KernelUnsupportedError(f"resmoe's GPU kernels have no {activation.function!r} in {x.dtype}")
    if x.dim() != 2 or x.shape[1] != plan.hidden or not len(x) == len(topk_ids) == len(topk_weights):
        raise KernelUnsupportedError(
            f"expected x [T, {plan.hidden}] and T rows of topk, found x {list(x.shape)}, topk_ids "
            f"{list(topk_ids.shape)} and topk_weights {list(topk_weights.shape)}"
        )


@dataclass(frozen=True)
class _Job:
    """A product before it has its place in a launch."""

    a: Tensor
    a_stride: int
    weight: Weight
    spec: ProductSpec


class _Run:
    """One call: tensors, routing and sizes that all launches share."""

    def __init__(self, x: Tensor, topk_ids: Tensor, expert_map: Tensor | None, plan: LayerPlan, config: Config) -> None:
        self.x, self.plan, self.config = x, plan, config
        self.tokens, self.top_k = topk_ids.shape
        self.pairs = topk_ids.numel()
        sorted_pairs = align(topk_ids, config.block_m, plan.experts, expert_map)
        self.routing = Routing(*sorted_pairs, topk_ids, expert_map)
        self.m_blocks = len(self.routing.block_experts)
        # What goes from launch to launch is small beside the weights while tokens are few.
        self.slab_dtype = torch.float32 if self.tokens <= FEW_TOKENS else x.dtype
        # The interpreter's bf16 products are wrong, so there all are taken in fp32.
        self.dot = tl.float32 if triton.knobs.runtime.interpret else TRITON_DTYPES[x.dtype]

    def hidden(self, topk_weights: Tensor, activation: Activation) -> Tensor:
        """``[P, I]``: launches 2 and 3."""
        plan, blocks = self.plan, self.config.hidden
        size_i, size_h = plan.intermediate, plan.hidden
        jobs: list[_Job] = []
        for side in (plan.gate, plan.up):
            if side.center is not None:
                spec = ProductSpec(False, 1, 1, False, True, size_i, size_h, 1)
                jobs.append(_Job(self.x, size_h, side.center, spec))
            if side.factors is not None:
                spec = ProductSpec(True, self.top_k, 1, False, True, side.factors.rank, size_h, 1)
                jobs.append(_Job(self.x, size_h, side.factors.v, spec))
        slabs = iter(self.products(jobs, self.config.first))
        sides: list[tuple[Side, SideSpec]] = []
        for side in (plan.gate, plan.up):
            center = None if side.center is None else next(slabs)
            shrunk = None if side.factors is None else next(slabs)
            rank = 0 if side.factors is None else side.factors.rank
            splits = (0 if center is None else len(center), rank, 0 if shrunk is None else len(shrunk))
            sides.append((Side(center, shrunk, side.bias), SideSpec(*splits, side.bias_stride)))
        (gate, gate_spec), (up, up_spec) = sides
        factors = plan.gate.factors, plan.up.factors
        hidden = torch.empty(self.pairs, size_i, dtype=self.x.dtype, device=self.x.device)
        _hidden_kernel[(self.m_blocks * triton.cdiv(size_i, blocks.n),)](
            self.x,
            hidden,
            topk_weights,
            self.routing,
            self.pairs,
            self.tokens,
            self.m_blocks,
            gate,
            gate_spec,
            *(plan.gate.tile or NOTHING),
            *(NOTHING if factors[0] is None else factors[0].u),
            up,
            up_spec,
            *(plan.up.tile or NOTHING),
            *(NOTHING if factors[1] is None else factors[1].u),
            SHARED_U=factors[0] is not None and factors[1] is not None and factors[0].part == factors[1].part,
            SIZE_H=size_h,
            SIZE_I=size_i,
            ACTIVATION=_spec(activation),
            **self.launch_options(blocks),
        )
        return hidden

    def down(self, hidden: Tensor, topk_weights: Tensor) -> Tensor:
        """``[T, H]``: launches 4 to 6."""
        plan = self.plan.down
        size_i, size_h = self.plan.intermediate, self.plan.hidden
        pair_jobs: list[_Job] = []
        if plan.tile is not None:
            spec = ProductSpec(True, 1, 1, False, False, size_h, size_i, 1)
            pair_jobs.append(_Job(hidden, size_i, plan.tile, spec))
        if plan.factors is not None:
            rank = plan.factors.rank
            spec = ProductSpec(True, 1, 1, False, False, rank, size_i, 1)
            (shrunk,) = self.products([_Job(hidden, size_i, plan.factors.u, spec)], self.config.shrink)
            spec = ProductSpec(True, 1, len(shrunk), False, False, size_h, rank, 1)
            pair_jobs.append(_Job(shrunk, rank, plan.factors.v, spec))
        token_jobs = [] if plan.center is None else [self._center_down(hidden, plan.center)]
        slabs = self.products([*pair_jobs, *token_jobs], self.config.last, joined=len(pair_jobs))
        out = torch.empty_like(self.x)
        pair_slabs = slabs[0] if pair_jobs else None
        self.combine(out, pair_slabs, slabs[-1] if token_jobs else None, topk_weights)
        return out

    def _center_down(self, hidden: Tensor, center: Weight) -> _Job:
        """The center's down product of each token's summed ``hidden``."""
        size_i, size_h = self.plan.intermediate, self.plan.hidden
        if self.tokens <= FEW_TOKENS:
            # summed by every program that reads it: cheaper than a launch
            spec = ProductSpec(False, 1, self.top_k, True, False, size_h, size_i, 1)
            return _Job(hidden, self.top_k * size_i, center, spec)
        mixed = torch.empty(self.tokens, size_i, dtype=hidden.dtype, device=hidden.device)
        self.combine(mixed, hidden[None], None)
        return _Job(mixed, size_i, center, ProductSpec(False, 1, 1, False, False, size_h, size_i, 1))

    def products(self, jobs: list[_Job], blocks: Blocks, joined: int = 0) -> list[Tensor]:
        """One launch; slabs ``[splits, rows, n]`` of each job, those of the first ``joined`` in one tensor."""
        if not jobs:
            return []
        grids = [self._blocks(job) * triton.cdiv(job.spec.n, blocks.n) for job in jobs]
        # powers of two: every other number is compiled anew
        wanted = triton.next_power_of_2(max(1, self.config.programs // sum(grids)))
        splits = [min(wanted, MAX_SPLITS, _power_below(triton.cdiv(job.spec.k, blocks.k))) for job in jobs]
        groups = [splits[:joined], *([split] for split in splits[joined:])] if joined else [[s] for s in splits]
        heads = [jobs[0], *jobs[joined:]] if joined else jobs
        made = [self._slabs(sum(group), head) for group, head in zip(groups, heads, strict=True)]
        views = [view for slabs, group in zip(made, groups, strict=True) for view in slabs.split(group)]
        arguments: list[object] = []
        ends = [0]
        for job, view, split, grid in zip(jobs, views, splits, grids, strict=True):
            arguments += [Product(job.a, job.a_stride, view), job.spec._replace(splits=split), *job.weight]
            ends.append(ends[-1] + grid * split)
        arguments += [None] * (4 * MAX_PRODUCTS - len(arguments))
        firsts = [*ends[1:], *([ends[-1]] * MAX_PRODUCTS)][: MAX_PRODUCTS - 1]
        _products_kernel[(ends[-1],)](
            self.routing,
            self.pairs,
            self.tokens,
            self.m_blocks,
            *firsts,
            *arguments,
            **self.launch_options(blocks),
        )
        return made

    def launch_options(self, blocks: Blocks) -> dict[str, object]:
        """Sizes that every kernel of products takes."""
        return {
            "TOP_K": self.top_k,
            "BLOCK_M": self.config.block_m,
            "BLOCK_N": blocks.n,
            "BLOCK_K": blocks.k,
            "DOT": self.dot,
            "num_warps": blocks.warps,
            "num_stages": blocks.stages,
        }

    def _slabs(self, count: int, job: _Job) -> Tensor:
        rows = self.pairs if job.spec.routed else self.tokens
        return torch.empty(count, rows, job.spec.n, dtype=self.slab_dtype, device=self.x.device)

    def _blocks(self, job: _Job) -> int:
        return self.m_blocks if job.spec.routed else triton.cdiv(self.tokens, self.config.block_m)

    def combine(
        self,
        out: Tensor,
        pair_slabs: Tensor | None,
        token_slabs: Tensor | None,
        topk_weights: Tensor | None = None,
    ) -> None:
        """Sum into ``out`` ``[T, N]``: slabs ``[S, P, N]`` over a token's pairs, ``[S, T, N]``.

        With ``topk_weights`` ``[T, K]`` also the experts' biases of down, where they have some.
        """
        size_n = out.shape[1]
        down = self.plan.down
        _combine_kernel[(self.tokens, triton.cdiv(size_n, COMBINE_COLUMNS))](
            out,
            pair_slabs,
            token_slabs,
            down.bias,
            topk_weights,
            self.routing.topk_ids,
            self.routing.expert_map,
            self.pairs,
            self.tokens,
            N=size_n,
            PAIR_SLABS=0 if pair_slabs is None else len(pair_slabs),
            TOKEN_SLABS=0 if token_slabs is None else len(token_slabs),
            BIAS_STRIDE=0 if topk_weights is None else down.bias_stride,
            TOP_K=self.top_k,
            CHOICES=triton.next_power_of_2(self.top_k),
            BLOCK_N=COMBINE_COLUMNS,
            num_warps=4,
        )


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


def _power_below(steps: int) -> int:
    """Largest power of two that leaves every split two of these steps, or 1."""
    return 1 << max(0, (steps // 2).bit_length() - 1)
