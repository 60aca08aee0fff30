"""The three Triton kernels of a layer: grouped products, gate/up with activation, and the sum over choices.

A routed pair is a token and one of its K choices, number ``token * K + choice``; pairs come sorted by expert in
blocks of ``BLOCK_M`` (align.py). Products are in the model's dtype with fp32 sums; what one launch hands to
the next is fp32 or the model's dtype, as its tensor says. Where the contraction is split, a product leaves one slab
for each split and its reader adds them up: no atomics, so a result depends on its inputs alone.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resmoe_vllm.kernels.gpu.align import local_experts
from resmoe_vllm.kernels.gpu.tiles import kept_before, load_tile

# m-blocks that walk over the columns together, so that a weight tile is still in L2 for the next of them
_GROUP_M = tl.constexpr(8)

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Product(NamedTuple):
    """One grouped product ``out = A W`` of a launch. Counts that depend on T are the kernel's own arguments.

    Attributes:
        a: A's first element; row r begins at ``r * a_stride``.
        out: ``[splits, rows, n]``, contiguous.
    """

    a: Tensor
    a_stride: int
    out: Tensor


class ProductSpec(NamedTuple):
    """Compile-time half of a ``Product``.

    Attributes:
        routed: rows are pairs, each with its expert's weight; else all rows have the one weight.
        rows_per_a: output rows that share a row of A: K where A is tokens, else 1.
        terms: A is the sum of this many terms: an earlier product's slabs ``[terms, P, k]``, or a token's pairs.
        by_token: the terms are a token's pairs ``[T, terms, k]``, skipped where their expert is not here.
        transposed: W is stored ``[n, k]``.
        n: columns of ``out``.
        k: contracted.
        splits: of k.
    """

    routed: bool
    rows_per_a: int
    terms: int
    by_token: bool
    transposed: bool
    n: int
    k: int
    splits: int


class Routing(NamedTuple):
    """Sorted pairs (``reference.align_ref``), and what decides whether a pair counts."""

    sorted_pairs: Tensor
    block_experts: Tensor
    num_padded: Tensor
    topk_ids: Tensor
    expert_map: Tensor | None


class ActivationSpec(NamedTuple):
    """``Activation`` at compile time; ``limited`` says whether ``limit`` counts."""

    function: str
    gated: bool
    limited: bool
    limit: float
    alpha: float
    beta: float
    limit_after: bool


@triton.jit
def apply_function(x, FUNCTION: tl.constexpr, ALPHA: tl.constexpr):
    """fp32 in and out; names as in ``FUNCTIONS``."""
    if FUNCTION == "silu":
        if ALPHA == 1.0:
            out = x * tl.sigmoid(x)
        else:
            out = x * tl.sigmoid(ALPHA * x)
    elif FUNCTION == "gelu":
        out = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif FUNCTION == "relu2":
        positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        out = positive * positive
    else:
        tl.static_assert(FUNCTION == "gelu_tanh")
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        out = x * tl.sigmoid(2.0 * inner)
    return out


@triton.jit
def activate(gate, up, a: tl.constexpr):
    """fp32 in and out: what ``Activation`` says."""
    if not a.gated:
        return apply_function(up, a.function, a.alpha)
    if a.limited:
        up = tl.clamp(up, -a.limit, a.limit, propagate_nan=tl.PropagateNan.ALL)
        if not a.limit_after:
            gate = tl.minimum(gate, a.limit, propagate_nan=tl.PropagateNan.ALL)
    out = apply_function(gate, a.function, a.alpha)
    if a.limited and a.limit_after:
        out = tl.minimum(out, a.limit, propagate_nan=tl.PropagateNan.ALL)
    if a.beta != 0.0:
        up += a.beta
    return out * up


@triton.jit
def _add_dot(a, b, acc, DOT: tl.constexpr):
    """fp32 operands stay fp32: TF32 would round them to 10 bits."""
    if tl.float32 == DOT:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def _swizzle(program, m_blocks, N_BLOCKS: tl.constexpr):
    group = program // (_GROUP_M * N_BLOCKS)
    first = group * _GROUP_M
    size = tl.minimum(m_blocks - first, _GROUP_M)
    inside = program - group * _GROUP_M * N_BLOCKS
    return first + inside % size, inside // size


@triton.jit
def _product(
    p, s: tl.constexpr, t, ts: tl.constexpr, routing, program, num_pairs, num_tokens, pair_blocks, TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    N_BLOCKS: tl.constexpr = (s.n + BLOCK_N - 1) // BLOCK_N
    K_STEPS: tl.constexpr = (s.k + BLOCK_K - 1) // BLOCK_K
    CHUNK: tl.constexpr = (K_STEPS + s.splits - 1) // s.splits * BLOCK_K
    if s.routed:
        num_rows = num_pairs
        m_blocks = pair_blocks
    else:
        num_rows = num_tokens
        m_blocks = (num_tokens + BLOCK_M - 1) // BLOCK_M
    m_block, place = _swizzle(program, m_blocks, N_BLOCKS * s.splits)
    n_block = place % N_BLOCKS
    split = place // N_BLOCKS
    wanted = True
    if s.routed:
        wanted = m_block * BLOCK_M < tl.load(routing.num_padded)
    if wanted:
        slots = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
        if s.routed:
            expert = tl.load(routing.block_experts + m_block).to(tl.int64)
            rows = tl.load(routing.sorted_pairs + slots)
        else:
            expert = tl.full((), 0, tl.int64)
            rows = slots
        row_ok = rows < num_rows
        a_rows = p.a + (rows // s.rows_per_a).to(tl.int64) * p.a_stride
        n_offsets = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
        begin = split * CHUNK
        end = tl.minimum(begin + CHUNK, s.k)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if s.transposed:
            before = tl.zeros((BLOCK_N,), tl.int32)
            if ts.value_bits > 0:
                before = kept_before(t, expert, n_offsets, n_offsets < s.n, begin, s.k, BLOCK_N)
        else:
            before = tl.zeros((BLOCK_K,), tl.int32)
        for k in range(begin, end, BLOCK_K):
            k_offsets = k + tl.arange(0, BLOCK_K)
            a_ok = row_ok[:, None] & (k_offsets < end)[None, :]
            # A token's one pair may be skipped, too, and nothing was written for it.
            if s.terms == 1 and not s.by_token:
                a = tl.load(a_rows[:, None] + k_offsets[None, :], mask=a_ok, other=0)
            else:
                total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
                TERMS: tl.constexpr = s.terms
                for term in tl.static_range(TERMS):
                    term_ok = a_ok
                    step = tl.full((), term, tl.int64) * s.k
                    if not s.by_token:
                        step *= num_pairs
                    else:
                        found = local_experts(routing.topk_ids, routing.expert_map, rows * TOP_K + term, row_ok)
                        term_ok = a_ok & (found >= 0)[:, None]
                    total += tl.load(a_rows[:, None] + step + k_offsets[None, :], mask=term_ok, other=0).to(tl.float32)
                a = total
            if s.transposed:
                w, before = load_tile(t, ts, expert, n_offsets, k, before, s.n, s.k, BLOCK_N, BLOCK_K, DOT)
                acc = _add_dot(a.to(DOT), tl.trans(w), acc, DOT)
            else:
                if ts.value_bits > 0:
                    before = kept_before(t, expert, k_offsets, k_offsets < s.k, n_block * BLOCK_N, s.n, BLOCK_K)
                w, _ = load_tile(t, ts, expert, k_offsets, n_block * BLOCK_N, before, s.k, s.n, BLOCK_K, BLOCK_N, DOT)
                acc = _add_dot(a.to(DOT), w, acc, DOT)
        out = p.out + (split.to(tl.int64) * num_rows + rows.to(tl.int64)) * s.n
        ok = row_ok[:, None] & (n_offsets < s.n)[None, :]
        tl.store(out[:, None] + n_offsets[None, :], acc.to(p.out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["num_pairs", "num_tokens", "pair_blocks", "first_1", "first_2", "first_3"])
def _products_kernel(
    routing, num_pairs, num_tokens, pair_blocks, first_1, first_2, first_3, p0, s0: tl.constexpr, t0,
    ts0: tl.constexpr, p1, s1: tl.constexpr, t1, ts1: tl.constexpr, p2, s2: tl.constexpr, t2, ts2: tl.constexpr, p3,
    s3: tl.constexpr, t3, ts3: tl.constexpr, TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """Up to four products side by side, each from its first program on; those that are not there are None."""
    program = tl.program_id(0)
    # One if for each and no return: so the products share one piece of shared memory.
    if program < first_1:
        _product(
            p0, s0, t0, ts0, routing, program, num_pairs, num_tokens, pair_blocks, TOP_K, BLOCK_M,
            BLOCK_N, BLOCK_K, DOT
        )  # fmt: skip
    if s1 is not None:
        if (program >= first_1) & (program < first_2):
            _product(
                p1, s1, t1, ts1, routing, program - first_1, num_pairs, num_tokens, pair_blocks, TOP_K, BLOCK_M,
                BLOCK_N, BLOCK_K, DOT
            )  # fmt: skip
    if s2 is not None:
        if (program >= first_2) & (program < first_3):
            _product(
                p2, s2, t2, ts2, routing, program - first_2, num_pairs, num_tokens, pair_blocks, TOP_K, BLOCK_M,
                BLOCK_N, BLOCK_K, DOT
            )  # fmt: skip
    if s3 is not None:
        if program >= first_3:
            _product(
                p3, s3, t3, ts3, routing, program - first_3, num_pairs, num_tokens, pair_blocks, TOP_K, BLOCK_M,
                BLOCK_N, BLOCK_K, DOT
            )  # fmt: skip


@triton.jit
def _slabs(start, rows, columns, ok, num_rows, n: tl.constexpr, SPLITS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Sum of a product's slabs: fp32 ``[M, N]`` at the given rows and columns."""
    total = tl.zeros((M, N), tl.float32)
    for split in tl.static_range(SPLITS):
        row = (tl.full((), split, tl.int64) * num_rows + rows.to(tl.int64)) * n
        total += tl.load(start + row[:, None] + columns[None, :], mask=ok, other=0).to(tl.float32)
    return total


@triton.jit
def _expand(
    acc, shrunk, u, us: tl.constexpr, expert, rows, row_ok, i_offsets, num_pairs, SIZE_I: tl.constexpr,
    RANK: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    DOT: tl.constexpr
):  # fmt: skip
    """Add shrunk U^T to acc."""
    before = tl.zeros((BLOCK_N,), tl.int32)
    for r in range(0, RANK, BLOCK_R):
        columns = r + tl.arange(0, BLOCK_R)
        ok = row_ok[:, None] & (columns < RANK)[None, :]
        s = _slabs(shrunk, rows, columns, ok, num_pairs, RANK, SPLITS, BLOCK_M, BLOCK_R)
        w, _ = load_tile(u, us, expert, i_offsets, r, before, SIZE_I, RANK, BLOCK_N, BLOCK_R, DOT)
        acc = _add_dot(s.to(DOT), tl.trans(w), acc, DOT)
    return acc


@triton.jit
def _bias(bias, expert, STRIDE: tl.constexpr, columns, ok):
    """One expert's for every row that is ok: read as the sums lie, for one row it would be moved and spill some."""
    return tl.load(bias + expert * STRIDE + columns[None, :], mask=ok, other=0).to(tl.float32)


class Side(NamedTuple):
    """What gate, or up, is made of; None for terms that are not there.

    Attributes:
        center: the center's product ``[splits, T, I]``.
        shrunk: ``x V^T``, ``[splits, P, R]``.
        bias: ``[E, I]``.
    """

    center: Tensor | None
    shrunk: Tensor | None
    bias: Tensor | None


class SideSpec(NamedTuple):
    """Compile-time half of a ``Side``; 0 for what is not there."""

    center_splits: int
    rank: int
    shrunk_splits: int
    bias_stride: int


@triton.jit(do_not_specialize=["num_pairs", "num_tokens", "m_blocks"])
def _hidden_kernel(
    x, out, topk_weights, routing, num_pairs, num_tokens, m_blocks, gate, gs: tl.constexpr, gate_tile,
    gts: tl.constexpr, gate_u, gus: tl.constexpr, up, us: tl.constexpr, up_tile, uts: tl.constexpr, up_u,
    uus: tl.constexpr, SHARED_U: tl.constexpr, TOP_K: tl.constexpr, SIZE_H: tl.constexpr, SIZE_I: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """``weight * activation`` of each pair, ``[P, I]``. One pass over H for tiles, one over the rank for U."""
    N_BLOCKS: tl.constexpr = (SIZE_I + BLOCK_N - 1) // BLOCK_N
    m_block, n_block = _swizzle(tl.program_id(0), m_blocks, N_BLOCKS)
    if m_block * BLOCK_M >= tl.load(routing.num_padded):
        return
    rows = tl.load(routing.sorted_pairs + m_block * BLOCK_M + tl.arange(0, BLOCK_M))
    row_ok = rows < num_pairs
    expert = tl.load(routing.block_experts + m_block).to(tl.int64)
    tokens = rows // TOP_K
    i_offsets = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    gate_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if gts is not None or uts is not None:
        x_rows = x + tokens.to(tl.int64) * SIZE_H
        gate_before = tl.zeros((BLOCK_N,), tl.int32)
        up_before = tl.zeros((BLOCK_N,), tl.int32)
        # Short steps are unrolled, so that their loads are on the way together.
        for h in tl.range(0, SIZE_H, BLOCK_K, loop_unroll_factor=4 if BLOCK_K == 32 else 1):
            h_offsets = h + tl.arange(0, BLOCK_K)
            ok = row_ok[:, None] & (h_offsets < SIZE_H)[None, :]
            a = tl.load(x_rows[:, None] + h_offsets[None, :], mask=ok, other=0).to(DOT)
            if gts is not None:
                w, gate_before = load_tile(
                    gate_tile, gts, expert, i_offsets, h, gate_before, SIZE_I, SIZE_H, BLOCK_N, BLOCK_K, DOT
                )  # fmt: skip
                gate_acc = _add_dot(a, tl.trans(w), gate_acc, DOT)
            if uts is not None:
                w2, up_before = load_tile(
                    up_tile, uts, expert, i_offsets, h, up_before, SIZE_I, SIZE_H, BLOCK_N, BLOCK_K, DOT
                )  # fmt: skip
                up_acc = _add_dot(a, tl.trans(w2), up_acc, DOT)
    if SHARED_U:
        before = tl.zeros((BLOCK_N,), tl.int32)
        for r in range(0, gs.rank, BLOCK_K):
            columns = r + tl.arange(0, BLOCK_K)
            r_ok = row_ok[:, None] & (columns < gs.rank)[None, :]
            sg = _slabs(gate.shrunk, rows, columns, r_ok, num_pairs, gs.rank, gs.shrunk_splits, BLOCK_M, BLOCK_K)
            su = _slabs(up.shrunk, rows, columns, r_ok, num_pairs, us.rank, us.shrunk_splits, BLOCK_M, BLOCK_K)
            u, _ = load_tile(gate_u, gus, expert, i_offsets, r, before, SIZE_I, gs.rank, BLOCK_N, BLOCK_K, DOT)
            gate_acc = _add_dot(sg.to(DOT), tl.trans(u), gate_acc, DOT)
            up_acc = _add_dot(su.to(DOT), tl.trans(u), up_acc, DOT)
    else:
        if gs.rank > 0:
            gate_acc = _expand(
                gate_acc, gate.shrunk, gate_u, gus, expert, rows, row_ok, i_offsets, num_pairs, SIZE_I, gs.rank,
                gs.shrunk_splits, BLOCK_M, BLOCK_N, BLOCK_K, DOT
            )  # fmt: skip
        if us.rank > 0:
            up_acc = _expand(
                up_acc, up.shrunk, up_u, uus, expert, rows, row_ok, i_offsets, num_pairs, SIZE_I, us.rank,
                us.shrunk_splits, BLOCK_M, BLOCK_N, BLOCK_K, DOT
            )  # fmt: skip
    ok = row_ok[:, None] & (i_offsets < SIZE_I)[None, :]
    if gs.center_splits > 0:
        gate_acc += _slabs(gate.center, tokens, i_offsets, ok, num_tokens, SIZE_I, gs.center_splits, BLOCK_M, BLOCK_N)
    if us.center_splits > 0:
        up_acc += _slabs(up.center, tokens, i_offsets, ok, num_tokens, SIZE_I, us.center_splits, BLOCK_M, BLOCK_N)
    if gs.bias_stride > 0:
        gate_acc += _bias(gate.bias, expert, gs.bias_stride, i_offsets, ok)
    if us.bias_stride > 0:
        up_acc += _bias(up.bias, expert, us.bias_stride, i_offsets, ok)
    weight = tl.load(topk_weights + rows, mask=row_ok, other=0).to(tl.float32)
    hidden = activate(gate_acc, up_acc, ACTIVATION) * weight[:, None]
    target = out + rows.to(tl.int64)[:, None] * SIZE_I + i_offsets[None, :]
    tl.store(target, hidden.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["num_pairs", "num_tokens"])
def _combine_kernel(
    out, pairs, whole, bias, topk_weights, topk_ids, expert_map, num_pairs, num_tokens, N: tl.constexpr,
    PAIR_SLABS: tl.constexpr, TOKEN_SLABS: tl.constexpr, BIAS_STRIDE: tl.constexpr, TOP_K: tl.constexpr,
    CHOICES: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """One token's columns: its pairs' slabs and weighted biases, of experts that are here, and its own slabs."""
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = columns < N
    total = tl.zeros((BLOCK_N,), tl.float32)
    if PAIR_SLABS > 0:
        choices = tl.arange(0, CHOICES)
        own = token * TOP_K + choices
        found = (local_experts(topk_ids, expert_map, own, choices < TOP_K) >= 0)[:, None] & ok[None, :]
        total += tl.sum(_slabs(pairs, own, columns, found, num_pairs, N, PAIR_SLABS, CHOICES, BLOCK_N), 0)
    if BIAS_STRIDE > 0:
        choice = tl.arange(0, CHOICES)
        pair = token * TOP_K + choice
        expert = local_experts(topk_ids, expert_map, pair, choice < TOP_K)
        here = (expert >= 0)[:, None] & ok[None, :]
        own_bias = tl.load(bias + expert.to(tl.int64)[:, None] * BIAS_STRIDE + columns[None, :], mask=here, other=0)
        weight = tl.load(topk_weights + pair, mask=expert >= 0, other=0).to(tl.float32)
        total += tl.sum(weight[:, None] * own_bias.to(tl.float32), 0)
    for slab in tl.static_range(TOKEN_SLABS):
        row = (tl.full((), slab, tl.int64) * num_tokens + token) * N
        total += tl.load(whole + row + columns, mask=ok, other=0).to(tl.float32)
    tl.store(out + token.to(tl.int64) * N + columns, total.to(out.dtype.element_ty), mask=ok)
