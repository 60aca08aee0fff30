"""The Triton kernels of a layer: grouped products, gate/up with activation, the sum over choices, restored weights.

A routed pair is a token and one of its K choices, number ``token * K + choice``; pairs come sorted by expert in
blocks of ``BLOCK_M`` (align.py). Products are in the model's dtype with fp32 sums; what one launch hands to
the next is fp32 or the model's dtype, as its tensor says. Where the contraction is split, a product leaves one slab
for each split and its reader adds them up: no atomics, so a result depends on its inputs alone.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from resmoe_vllm.kernels.gpu.align import block_expert, block_pairs, local_experts
from resmoe_vllm.kernels.gpu.tiles import codes_in_lanes, kept_before, lane_columns, load_tile

# m-blocks that walk over the columns together, so that a weight tile is still in L2 for the next of them
_GROUP_M = tl.constexpr(8)

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Product(NamedTuple):
    """Sizes of one grouped product ``out = A W`` of a launch, the same for every T.

    Attributes:
        a_stride: from one row of A to the next.
        n: columns of ``out``, which is ``[slabs, rows, n]``, contiguous.
        k: columns of A.
        rows: of W as it is stored; those from here on count as zeros.
        columns: likewise.
    """

    a_stride: int
    n: int
    k: int
    rows: int
    columns: int


class ProductSpec(NamedTuple):
    """Compile-time half of a ``Product``.

    Attributes:
        routed: rows are pairs, each with its expert's weight; else all rows have the one weight.
        rows_per_a: output rows that share a row of A: K where A is tokens, else 1.
        transposed: W is stored ``[n, k]``.
        even: W's rows and columns are whole blocks.
        restored: W is restored, of some experts at a time; the first of them is W's first.
    """

    routed: bool
    rows_per_a: int
    transposed: bool
    even: bool = False
    restored: bool = False


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
def apply_function(x, a: tl.constexpr):
    """fp32 in and out; names as in ``FUNCTIONS``. Takes the whole spec: Triton 3.6 passes no string by itself."""
    if a.function == "silu":
        if a.alpha == 1.0:
            out = x * tl.sigmoid(x)
        else:
            out = x * tl.sigmoid(a.alpha * x)
    elif a.function == "gelu":
        out = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif a.function == "relu2":
        positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        out = positive * positive
    else:
        tl.static_assert(a.function == "gelu_tanh")
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        out = x * tl.sigmoid(2.0 * inner)
    return out


@triton.jit
def activate(gate, up, a: tl.constexpr):
    """fp32 in and out: what ``Activation`` says."""
    if not a.gated:
        return apply_function(up, a)
    if a.limited:
        up = tl.clamp(up, -a.limit, a.limit, propagate_nan=tl.PropagateNan.ALL)
        if not a.limit_after:
            gate = tl.minimum(gate, a.limit, propagate_nan=tl.PropagateNan.ALL)
    out = apply_function(gate, a)
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
def _swizzle(program, m_blocks, n_blocks):
    group = program // (_GROUP_M * n_blocks)
    first = group * _GROUP_M
    size = tl.minimum(m_blocks - first, _GROUP_M)
    inside = program - group * _GROUP_M * n_blocks
    return first + inside % size, inside // size


@triton.jit
def _among(local, first_expert, end_expert):
    """The expert, or -1 if it is none of those that are restored now."""
    return tl.where((local >= first_expert) & (local < end_expert), local, -1)


@triton.jit
def _product(
    a, out, p, s: tl.constexpr, t, ts: tl.constexpr, splits, slab, r, program, num_pairs, num_tokens, pair_blocks,
    first_expert, end_expert, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    n_blocks = tl.cdiv(p.n, BLOCK_N)
    chunk = tl.cdiv(tl.cdiv(p.k, BLOCK_K), splits) * BLOCK_K
    if s.routed:
        num_rows = num_pairs
        m_blocks = pair_blocks
    else:
        num_rows = num_tokens
        m_blocks = tl.cdiv(num_tokens, BLOCK_M)
    m_block, place = _swizzle(program, m_blocks, n_blocks * splits)
    n_block = place % n_blocks
    split = place // n_blocks
    local = tl.full((), 0, tl.int32)
    if s.routed:
        local = block_expert(r, m_block, BLOCK_M)
        if s.restored:
            local = _among(local, first_expert, end_expert)
    if local >= 0:
        expert = local.to(tl.int64)
        if s.restored:
            expert -= first_expert
        if s.routed:
            rows = block_pairs(r, m_block, num_pairs, BLOCK_M)
        else:
            rows = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
        row_ok = rows < num_rows
        a_rows = a + (rows // s.rows_per_a).to(tl.int64) * p.a_stride
        n_offsets = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
        begin = split * chunk
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        LANES: tl.constexpr = s.transposed and codes_in_lanes(ts, BLOCK_K)
        for k in range(begin, tl.minimum(begin + chunk, p.k), BLOCK_K):
            k_offsets = k + tl.arange(0, BLOCK_K)
            if LANES:
                k_offsets = tl.max_contiguous(tl.multiple_of(k + lane_columns(BLOCK_K), 4), 4)
            # Splits begin at whole steps, so only A's own end needs a mask; its divisor keeps loads wide.
            if s.even:
                ok = row_ok[:, None]
            else:
                ok = row_ok[:, None] & (k_offsets < p.k)[None, :]
            a_tile = tl.load(a_rows[:, None] + k_offsets[None, :], ok, 0)
            if s.transposed:
                before = tl.zeros((BLOCK_N,), tl.int32)
                w, _ = load_tile(
                    t, ts, expert, n_offsets, k, before, p.rows, p.columns, BLOCK_N, BLOCK_K, DOT, LANES, s.even
                )
                acc = _add_dot(a_tile.to(DOT), tl.trans(w), acc, DOT)
            else:
                if ts.value_bits > 0:
                    before = kept_before(
                        t, expert, k_offsets, k_offsets < p.rows, n_block * BLOCK_N, p.columns, BLOCK_N
                    )
                else:
                    before = tl.zeros((BLOCK_K,), tl.int32)
                w, _ = load_tile(
                    t, ts, expert, k_offsets, n_block * BLOCK_N, before, p.rows, p.columns, BLOCK_K, BLOCK_N, DOT,
                    False, s.even
                )  # fmt: skip
                acc = _add_dot(a_tile.to(DOT), w, acc, DOT)
        out_rows = out + ((slab + split).to(tl.int64) * num_rows + rows.to(tl.int64)) * p.n
        ok = row_ok[:, None] & (n_offsets < p.n)[None, :]
        tl.store(out_rows[:, None] + n_offsets[None, :], acc.to(out.dtype.element_ty), mask=ok)


@triton.jit(
    do_not_specialize=[
        "num_pairs", "num_tokens", "pair_blocks", "first_expert", "end_expert", "first_1", "first_2", "first_3",
        "splits_0", "splits_1", "splits_2", "splits_3", "slab_0", "slab_1", "slab_2", "slab_3"
    ]
)  # fmt: skip
def _products_kernel(
    r, num_pairs, num_tokens, pair_blocks, first_expert, end_expert, first_1, first_2, first_3, splits_0, splits_1,
    splits_2, splits_3, slab_0, slab_1, slab_2, slab_3, a_0, out_0, p_0, s_0: tl.constexpr, t_0,
    ts_0: tl.constexpr, a_1, out_1, p_1, s_1: tl.constexpr, t_1, ts_1: tl.constexpr, a_2, out_2, p_2,
    s_2: tl.constexpr, t_2, ts_2: tl.constexpr, a_3, out_3, p_3, s_3: tl.constexpr, t_3, ts_3: tl.constexpr,
    BLOCK_M: tl.constexpr, TOKEN_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """Up to four products side by side, each from its first program on; those that are not there are None.

    A product's ``splits`` slabs are written from ``slab`` on. Rows come in blocks of ``BLOCK_M`` where each has its
    expert's weight, else of ``TOKEN_M``. Restored weights are those of the experts from ``first_expert`` to
    ``end_expert``.
    """
    program = tl.program_id(0)
    # One if for each and no return: so the products share one piece of shared memory.
    if program < first_1:
        _product(
            a_0, out_0, p_0, s_0, t_0, ts_0, splits_0, slab_0, r, program, num_pairs, num_tokens, pair_blocks,
            first_expert, end_expert, BLOCK_M if s_0.routed else TOKEN_M, BLOCK_N, BLOCK_K, DOT
        )  # fmt: skip
    if s_1 is not None:
        if (program >= first_1) & (program < first_2):
            _product(
                a_1, out_1, p_1, s_1, t_1, ts_1, splits_1, slab_1, r, program - first_1, num_pairs, num_tokens,
                pair_blocks, first_expert, end_expert, BLOCK_M if s_1.routed else TOKEN_M, BLOCK_N, BLOCK_K, DOT
            )  # fmt: skip
    if s_2 is not None:
        if (program >= first_2) & (program < first_3):
            _product(
                a_2, out_2, p_2, s_2, t_2, ts_2, splits_2, slab_2, r, program - first_2, num_pairs, num_tokens,
                pair_blocks, first_expert, end_expert, BLOCK_M if s_2.routed else TOKEN_M, BLOCK_N, BLOCK_K, DOT
            )  # fmt: skip
    if s_3 is not None:
        if program >= first_3:
            _product(
                a_3, out_3, p_3, s_3, t_3, ts_3, splits_3, slab_3, r, program - first_3, num_pairs, num_tokens,
                pair_blocks, first_expert, end_expert, BLOCK_M if s_3.routed else TOKEN_M, BLOCK_N, BLOCK_K, DOT
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
    acc, shrunk, u, us: tl.constexpr, expert, rows, row_ok, i_offsets, rank, SIZE_I: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """Add shrunk U^T to acc."""
    before = tl.zeros((BLOCK_N,), tl.int32)
    shrunk_rows = shrunk + rows.to(tl.int64) * rank.width
    for r in range(0, rank.width, BLOCK_R):
        columns = r + tl.arange(0, BLOCK_R)
        ok = row_ok[:, None] & (columns < rank.width)[None, :]
        s = tl.load(shrunk_rows[:, None] + columns[None, :], mask=ok, other=0)
        w, _ = load_tile(u, us, expert, i_offsets, r, before, SIZE_I, rank.columns, BLOCK_N, BLOCK_R, DOT, False, False)
        acc = _add_dot(s.to(DOT), tl.trans(w), acc, DOT)
    return acc


@triton.jit
def _bias(bias, expert, STRIDE: tl.constexpr, columns, ok):
    """One expert's for every row that is ok: read as the sums lie, for one row it would be moved and spill some."""
    return tl.load(bias + expert * STRIDE + columns[None, :], mask=ok, other=0).to(tl.float32)


class Rank(NamedTuple):
    """Sizes of a low-rank part that gate or up is made of.

    Attributes:
        width: columns of ``x V^T``, a multiple of 64; those without a row of V are zeros.
        columns: of U in memory, at most the width.
    """

    width: int
    columns: int


class SideSpec(NamedTuple):
    """What gate, or up, is made of; 0 and False for what is not there.

    Attributes:
        center_splits: slabs of the center's product.
        low_rank: ``x V^T`` times U.
        bias_stride: from one expert's bias to the next.
        restored: the tile is, of some experts at a time; the first of them is the tile's first.
    """

    center_splits: int
    low_rank: bool
    bias_stride: int
    restored: bool = False


@triton.jit(do_not_specialize=["num_pairs", "num_tokens", "m_blocks", "first_expert", "end_expert"])
def _hidden_kernel(
    x, out, topk_weights, r, num_pairs, num_tokens, m_blocks, first_expert, end_expert, gate_center, up_center,
    gate_shrunk, up_shrunk, gate_bias, up_bias, gs: tl.constexpr, gate_tile, gts: tl.constexpr, gate_rank, gate_u,
    gus: tl.constexpr, us: tl.constexpr, up_tile, uts: tl.constexpr, up_rank, up_u, uus: tl.constexpr,
    SHARED_U: tl.constexpr, TOP_K: tl.constexpr, SIZE_H: tl.constexpr, SIZE_I: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """``weight * activation`` of each pair, ``[P, I]``. One pass over H for tiles, one over the rank for U.

    Of gate and up there may be the center's product ``[splits, T, I]``, ``x V^T`` ``[P, width]``, a bias ``[E, I]``.
    Where a tile is restored, pairs of the experts from ``first_expert`` to ``end_expert`` alone.
    """
    N_BLOCKS: tl.constexpr = (SIZE_I + BLOCK_N - 1) // BLOCK_N
    m_block, n_block = _swizzle(tl.program_id(0), m_blocks, N_BLOCKS)
    local = block_expert(r, m_block, BLOCK_M)
    if gs.restored or us.restored:
        local = _among(local, first_expert, end_expert)
    if local < 0:
        return
    expert = local.to(tl.int64)
    rows = block_pairs(r, m_block, num_pairs, BLOCK_M)
    row_ok = rows < num_pairs
    tokens = rows // TOP_K
    i_offsets = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    gate_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    gate_expert = expert
    up_expert = expert
    if gs.restored:
        gate_expert -= first_expert
    if us.restored:
        up_expert -= first_expert
    if gts is not None or uts is not None:
        x_rows = x + tokens.to(tl.int64) * SIZE_H
        gate_before = tl.zeros((BLOCK_N,), tl.int32)
        up_before = tl.zeros((BLOCK_N,), tl.int32)
        # Short steps are unrolled, so that their loads are on the way together.
        # From 64 rows on several warps multiply the same columns: in lanes each of them would decode them for itself.
        LANES: tl.constexpr = BLOCK_M < 64 and codes_in_lanes(gts, BLOCK_K) and codes_in_lanes(uts, BLOCK_K)
        EVEN: tl.constexpr = SIZE_I % BLOCK_N == 0 and SIZE_H % BLOCK_K == 0
        for h in tl.range(0, SIZE_H, BLOCK_K, loop_unroll_factor=4 if BLOCK_K == 32 else 1):
            h_offsets = h + tl.arange(0, BLOCK_K)
            if LANES:
                h_offsets = tl.max_contiguous(tl.multiple_of(h + lane_columns(BLOCK_K), 4), 4)
            if EVEN:
                ok = row_ok[:, None]
            else:
                ok = row_ok[:, None] & (h_offsets < SIZE_H)[None, :]
            a = tl.load(x_rows[:, None] + h_offsets[None, :], mask=ok, other=0).to(DOT)
            if gts is not None:
                w, gate_before = load_tile(
                    gate_tile, gts, gate_expert, i_offsets, h, gate_before, SIZE_I, SIZE_H, BLOCK_N, BLOCK_K, DOT,
                    LANES, EVEN
                )  # fmt: skip
                gate_acc = _add_dot(a, tl.trans(w), gate_acc, DOT)
            if uts is not None:
                w2, up_before = load_tile(
                    up_tile, uts, up_expert, i_offsets, h, up_before, SIZE_I, SIZE_H, BLOCK_N, BLOCK_K, DOT,
                    LANES, EVEN
                )  # fmt: skip
                up_acc = _add_dot(a, tl.trans(w2), up_acc, DOT)
    if SHARED_U:
        before = tl.zeros((BLOCK_N,), tl.int32)
        gate_rows = gate_shrunk + rows.to(tl.int64) * gate_rank.width
        up_rows = up_shrunk + rows.to(tl.int64) * gate_rank.width
        for r in range(0, gate_rank.width, BLOCK_K):
            columns = r + tl.arange(0, BLOCK_K)
            r_ok = row_ok[:, None] & (columns < gate_rank.width)[None, :]
            sg = tl.load(gate_rows[:, None] + columns[None, :], mask=r_ok, other=0)
            su = tl.load(up_rows[:, None] + columns[None, :], mask=r_ok, other=0)
            u, _ = load_tile(
                gate_u, gus, expert, i_offsets, r, before, SIZE_I, gate_rank.columns, BLOCK_N, BLOCK_K, DOT, False,
                False
            )  # fmt: skip
            gate_acc = _add_dot(sg.to(DOT), tl.trans(u), gate_acc, DOT)
            up_acc = _add_dot(su.to(DOT), tl.trans(u), up_acc, DOT)
    else:
        if gs.low_rank:
            gate_acc = _expand(
                gate_acc, gate_shrunk, gate_u, gus, expert, rows, row_ok, i_offsets, gate_rank, SIZE_I, BLOCK_N,
                BLOCK_K, DOT
            )  # fmt: skip
        if us.low_rank:
            up_acc = _expand(
                up_acc, up_shrunk, up_u, uus, expert, rows, row_ok, i_offsets, up_rank, SIZE_I, BLOCK_N, BLOCK_K,
                DOT
            )  # fmt: skip
    ok = row_ok[:, None] & (i_offsets < SIZE_I)[None, :]
    if gs.center_splits > 0:
        gate_acc += _slabs(gate_center, tokens, i_offsets, ok, num_tokens, SIZE_I, gs.center_splits, BLOCK_M, BLOCK_N)
    if us.center_splits > 0:
        up_acc += _slabs(up_center, tokens, i_offsets, ok, num_tokens, SIZE_I, us.center_splits, BLOCK_M, BLOCK_N)
    if gs.bias_stride > 0:
        gate_acc += _bias(gate_bias, expert, gs.bias_stride, i_offsets, ok)
    if us.bias_stride > 0:
        up_acc += _bias(up_bias, expert, us.bias_stride, i_offsets, ok)
    weight = tl.load(topk_weights + rows, mask=row_ok, other=0).to(tl.float32)
    hidden = activate(gate_acc, up_acc, ACTIVATION) * weight[:, None]
    target = out + rows.to(tl.int64)[:, None] * SIZE_I + i_offsets[None, :]
    tl.store(target, hidden.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["first_expert"])
def _restore_kernel(
    r, first_expert, out, t, s: tl.constexpr, SIZE_I: tl.constexpr, SIZE_H: tl.constexpr, BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """A weight ``[experts, I, H]`` of experts from ``first_expert`` on, whole, as the matrix units take it.

    A program has rows of one expert and goes from the left on, as bitmaps are counted. Experts that no pair has are
    left out.
    """
    place = tl.program_id(1)
    expert = first_expert + place
    blocks = tl.load(r.num_padded) // BLOCK_M
    found = tl.full((), 0, tl.int32)
    for begin in range(0, blocks, STEP):
        numbers = begin + tl.arange(0, STEP)
        found += tl.sum((tl.load(r.block_experts + numbers, mask=numbers < blocks, other=-1) == expert).to(tl.int32), 0)
    if found == 0:
        return
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    before = tl.zeros((ROWS,), tl.int32)
    EVEN: tl.constexpr = SIZE_I % ROWS == 0 and SIZE_H % COLUMNS == 0
    target = out + place.to(tl.int64) * SIZE_I * SIZE_H + rows[:, None] * SIZE_H
    # Unrolled, so that loads of several steps are on the way together.
    for h in tl.range(0, SIZE_H, COLUMNS, loop_unroll_factor=2):
        columns = h + tl.arange(0, COLUMNS)
        tile, before = load_tile(
            t, s, expert.to(tl.int64), rows, h, before, SIZE_I, SIZE_H, ROWS, COLUMNS, DOT, False, EVEN
        )  # fmt: skip
        if EVEN:
            tl.store(target + columns[None, :], tile.to(out.dtype.element_ty))
        else:
            ok = (rows < SIZE_I)[:, None] & (columns < SIZE_H)[None, :]
            tl.store(target + columns[None, :], tile.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["num_pairs", "num_tokens"])
def _combine_kernel(
    out, pairs, whole, bias, topk_weights, topk_ids, pair_map, bias_map, num_pairs, num_tokens, N: tl.constexpr,
    PAIR_SLABS: tl.constexpr, TOKEN_SLABS: tl.constexpr, BIAS_STRIDE: tl.constexpr, TOP_K: tl.constexpr,
    CHOICES: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """One token's columns: its pairs' slabs and weighted biases, of experts that are here, and its own slabs.

    Which experts are here the two maps say, each for its own term.
    """
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = columns < N
    total = tl.zeros((BLOCK_N,), tl.float32)
    if PAIR_SLABS > 0:
        # of one warp, whose lanes have all rows: a sum over warps would pass through shared memory
        choices = tl.arange(0, CHOICES)
        own = token * TOP_K + choices
        found = (local_experts(topk_ids, pair_map, own, choices < TOP_K) >= 0)[:, None] & ok[None, :]
        total += tl.sum(_slabs(pairs, own, columns, found, num_pairs, N, PAIR_SLABS, CHOICES, BLOCK_N), 0)
    if BIAS_STRIDE > 0:
        choice = tl.arange(0, CHOICES)
        pair = token * TOP_K + choice
        expert = local_experts(topk_ids, bias_map, pair, choice < TOP_K)
        here = (expert >= 0)[:, None] & ok[None, :]
        own_bias = tl.load(bias + expert.to(tl.int64)[:, None] * BIAS_STRIDE + columns[None, :], mask=here, other=0)
        weight = tl.load(topk_weights + pair, mask=expert >= 0, other=0).to(tl.float32)
        total += tl.sum(weight[:, None] * own_bias.to(tl.float32), 0)
    for slab in tl.static_range(TOKEN_SLABS):
        row = (tl.full((), slab, tl.int64) * num_tokens + token) * N
        total += tl.load(whole + row + columns, mask=ok, other=0).to(tl.float32)
    tl.store(out + token.to(tl.int64) * N + columns, total.to(out.dtype.element_ty), mask=ok)
