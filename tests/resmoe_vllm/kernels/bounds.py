"""How far a right answer of a kernel may be from the truth, by the sizes of what is added up; all in fp64.

A result that cancels is small while its rounding errors are not, so no share of the result bounds them. Two sums do:

- Additions in fp32: the sum of the absolute products, times an error that grows like the root of their number.
- Roundings to bf16 or fp16 of operands and results: each is at most half a unit of its own number, and they are
  independent, so that the root of the sum of their squares grows no faster than they do. Absolute values would also
  be right, and too many: among 67 products rounded to bf16, no single one could be missed.
- Roundings of what codes are multiplied with to 16 bits, one scale for a block of it: each is at most 2^-15 of the
  block's largest. On the way down a block is rows, whose scales are in.

Both pass through the activation by its slope.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from compress_tools.format.schema import Projection
from resmoe_vllm.kernels.activation import FUNCTIONS, Activation
from resmoe_vllm.kernels.reference import decode_bitmap_ref
from resmoe_vllm.kernels.routing import local_ids
from resmoe_vllm.weights.bound import Coded, LowRankWeights, Matrix, QuantizedWeights, ResMoEWeights

# Largest slopes: silu 1.0998 at 2.4 (with alpha at 2.4 / alpha), gelu 1.1290 at 1.41, gelu_tanh 1.1291; clamping 1.
_SLOPE = 1.13
# Independent errors exceed this many roots of their bounds' squares once in 1500 cases at most (Hoeffding), and that
# only if each is as large as it can be; evenly spread they do it once in 10^11.
_DEVIATIONS = 4
_EPS32 = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Precision:
    """What a kernel rounds to.

    Attributes:
        products: dtype of the operands and results of products; sums are fp32 everywhere. int16: of what codes are
            multiplied with; weights and results are not rounded.
        out: dtype of the layer's result.
    """

    products: torch.dtype
    out: torch.dtype

    @property
    def unit(self) -> float:
        """Largest relative error of an operand; 0 where it stays fp32, whose roundings ``sum_error`` holds."""
        return torch.finfo(self.products).eps / 2 if self.products in (torch.bfloat16, torch.float16) else 0.0

    @property
    def share(self) -> float:
        """Largest error of an operand, as a share of the largest one beside it."""
        return 2**-15 if self.products == torch.int16 else 0.0


_EXACT = Precision(torch.float32, torch.float32)


@dataclass(frozen=True)
class _Product:
    """A product with one expert's matrix of one projection, and how wrong it may be.

    Attributes:
        value: the result.
        size: sum of the absolute products.
        squares: sum of the squares of the largest errors that rounding operands and results gives.
    """

    value: Tensor
    size: Tensor
    squares: Tensor


def sum_error(terms: int) -> float:
    """Largest error of a sum in fp32, kernel's and reference's together, as a share of the absolute values' sum."""
    # Higham and Mary, 2019: errors of n additions grow like the root of n
    return 2 * max(1, terms) ** 0.5 * _EPS32


def sum_bound(sizes: Tensor, terms: int) -> Tensor:
    """Error of an fp32 sum whose absolute terms add up to ``sizes``."""
    return sizes.double() * sum_error(terms)


@dataclass(frozen=True)
class _Hidden:
    """What the activation gives of one expert for every token ``[T, I]``: value, fp32 error, squares of roundings."""

    value: Tensor
    error: Tensor
    squares: Tensor


def _hidden(x: Tensor, weights: ResMoEWeights, expert: int, activation: Activation, precision: Precision) -> _Hidden:
    unit = precision.unit
    up = _product(x.double(), weights, "up_proj", expert, precision)
    error = sum_error(weights.hidden_size + _rank(weights))
    if not activation.gated:
        value = activation(None, up.value)
        slope = _slope(activation, up)
        return _Hidden(
            value,
            error * slope * up.size + 8 * _EPS32 * value.abs(),
            slope**2 * up.squares + (unit * value) ** 2,
        )
    gate = _product(x.double(), weights, "gate_proj", expert, precision)
    value = activation(gate.value, up.value)
    # By the function itself, not clamped after: what is more is a wider bound.
    limit = float("inf") if activation.limit is None else activation.limit
    act = FUNCTIONS[activation.function](gate.value.clamp(max=limit), activation.alpha)
    clamped = up.value.clamp(-limit, limit) + activation.beta
    slope = _slope(activation, gate) * (clamped.abs() + _DEVIATIONS * up.squares.sqrt())
    # and exp, erf or tanh, and three products; of alpha * gate the exponential sees the rounding
    exponent = 0 if activation.alpha == 1 else (activation.alpha * gate.value).abs().clamp(max=100)
    return _Hidden(
        value,
        error * (slope * gate.size + act.abs() * up.size)
        + (8 + exponent) * _EPS32 * (value.abs() + act.abs() * abs(activation.beta)),
        slope**2 * gate.squares + act**2 * up.squares + (unit * value) ** 2,
    )


def _slope(activation: Activation, x: "_Product") -> Tensor | float:
    """Largest slope of the function between what two right kernels may give for ``x``."""
    if activation.function != "relu2":
        return _SLOPE
    return 2 * (x.value.abs() + _DEVIATIONS * x.squares.sqrt() + x.size * _EPS32)


def hidden_bound(x: Tensor, weights: ResMoEWeights, expert: int, activation: Activation) -> Tensor:
    """Largest error of the activation in fp32, before router weights: fp64 ``[T, I]``."""
    return _hidden(x, weights, expert, activation, _EXACT).error


def layer_bound(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    weights: ResMoEWeights,
    activation: Activation,
    precision: Precision,
    expert_map: Tensor | None = None,
) -> Tensor:
    """Largest difference of two right answers of a layer: ``fused_moe_ref``'s and a kernel's.

    Args:
        x: hidden states ``[T, H]``.
        topk_weights: router weights ``[T, K]``.
        topk_ids: global expert ids ``[T, K]``; negative ones are skipped.
        weights: the layer.
        activation: the experts'.
        precision: what the kernel rounds to.
        expert_map: ``[E]`` global -> local expert, -1 elsewhere; None when all experts are here.
    Returns:
        fp64 ``[T, H]``.
    """
    ids, top_k = local_ids(topk_ids, expert_map), topk_ids.shape[1]
    error = sum_error(weights.intermediate_size * top_k + _rank(weights))
    result, bound, squares = (torch.zeros(x.shape, dtype=torch.float64) for _ in range(3))
    for expert in sorted(set(ids.flatten().tolist()) - {-1}):
        share = (topk_weights.double() * (ids == expert)).sum(1, keepdim=True)  # [T, 1]
        hidden = _hidden(x, weights, expert, activation, precision)
        down = _product(hidden.value, weights, "down_proj", expert, precision, transposed=True)
        sizes, matrix_squares = _sizes(weights, "down_proj", expert)
        result += share * down.value
        bound += share.abs() * (hidden.error @ sizes + error * down.size)
        # K: a kernel may round the experts' sum, whose square is at most K times the sum of their squares
        squares += share**2 * (hidden.squares @ matrix_squares + top_k * down.squares)
    bound += _DEVIATIONS * squares.sqrt() + _smallest(precision.products)
    if precision.out == torch.float32:
        return bound
    # both answers are rounded at the end
    unit = torch.finfo(precision.out).eps / 2
    return bound + 2 * unit * (result.abs() + bound) + _smallest(precision.out)


def assert_within(found: Tensor, expected: Tensor, bound: Tensor) -> None:
    """Every element within its own bound; NaN where the truth is NaN, and nowhere else."""
    assert found.shape == expected.shape
    assert torch.equal(found.isnan(), expected.isnan())
    worst = worst_share(found, expected, bound)
    assert worst <= 1, f"an error is {worst:.3g} times its bound"


def worst_share(found: Tensor, expected: Tensor, bound: Tensor) -> float:
    """The largest error as a multiple of its bound; 0 where nothing is wrong, infinite where nothing may be."""
    errors = (found.double() - expected.double()).nan_to_num().abs()
    return (errors / bound.nan_to_num())[errors > 0].max().item() if errors.any() else 0.0


def _smallest(dtype: torch.dtype) -> float:
    """What rounding a number near 0 may be off by: it counts for fp16, whose smallest numbers are 6e-8 apart."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps if dtype == torch.float16 else 0.0


def _rank(weights: ResMoEWeights) -> int:
    return sum(part.rank for part in weights.residual if isinstance(part, LowRankWeights))


def _fp64(matrix: Matrix) -> Tensor:
    return matrix.to(torch.float32).double() if isinstance(matrix, Coded) else matrix.double()


class _Term(NamedTuple):
    """What one expert's matrix is summed of: ``[I, H]``, or the factors ``[I, R]`` and ``[R, H]``; fp64."""

    first: Tensor
    second: Tensor | None
    coded: bool


def _terms(weights: ResMoEWeights, projection: Projection, expert: int) -> list[_Term]:
    terms: list[_Term] = []
    if projection in weights.center:
        center = weights.center[projection]
        terms.append(_Term(_fp64(center), None, isinstance(center, Coded)))
    for part in weights.residual:
        if projection not in part.projections:
            continue
        if isinstance(part, LowRankWeights):
            u, v = part.u[expert], part.v[projection][expert]
            terms.append(_Term(_fp64(u), _fp64(v), isinstance(u, Coded)))
        elif isinstance(part, QuantizedWeights):
            terms.append(_Term(_fp64(part.rows[projection][expert]), None, coded=True))
        else:
            matrix = decode_bitmap_ref(part, projection, expert, weights.hidden_size).double()
            terms.append(_Term(matrix, None, coded=False))
    return terms


def _sizes(weights: ResMoEWeights, projection: Projection, expert: int) -> tuple[Tensor, Tensor]:
    """Sum of the absolute values that one expert's matrix is summed of, and the matrix's squares; ``[I, H]``."""
    terms = _terms(weights, projection, expert)
    sizes = torch.stack([u.abs() if v is None else u.abs() @ v.abs() for u, v, _ in terms]).sum(0)
    return sizes, torch.stack([u if v is None else u @ v for u, v, _ in terms]).sum(0) ** 2


def _share_squares(x: Tensor, matrix: Tensor, transposed: bool) -> Tensor:
    """Squares of what errors of ``x [T, N]``, each as large as x's largest, make of ``x @ matrix``.

    Transposed, rows' scales are in x: the largest is that of x times a row's largest weight, which no row's level may
    exceed more than twofold.
    """
    if not transposed:
        return x.abs().amax(1, keepdim=True) ** 2 * (matrix**2).sum(0)
    largest = 2 * (x.abs() * matrix.abs().amax(1)).amax(1, keepdim=True)
    return (len(matrix) * largest**2).expand(-1, matrix.shape[1])


def _product(
    x: Tensor,
    weights: ResMoEWeights,
    projection: Projection,
    expert: int,
    precision: Precision,
    transposed: bool = False,
) -> _Product:
    """``x [T, H]`` times one expert's ``[I, H]`` transposed; ``x [T, I]`` times ``[I, H]`` if ``transposed``."""
    values, sizes, squares, shares = [], [], [], []
    for u, v, coded in _terms(weights, projection, expert):
        if v is None:
            matrix = u if transposed else u.T
            values.append(x @ matrix)
            sizes.append(x.abs() @ matrix.abs())
            # the weight; twice, for a kernel may round its sum with another; the result
            squares.append(2 * (x**2 @ matrix**2) + values[-1] ** 2)
            shares.append(_share_squares(x, matrix, transposed) * coded)
            continue
        first, second = (u, v) if transposed else (v.T, u.T)
        shrunk = x @ first
        values.append(shrunk @ second)
        sizes.append(x.abs() @ first.abs() @ second.abs())
        # the first factor; what it gives and the second one; the result
        squares.append(x**2 @ first**2 @ second**2 + 2 * (shrunk**2 @ second**2) + values[-1] ** 2)
        shared = _share_squares(x, first, transposed) @ second**2 + _share_squares(shrunk, second, transposed)
        shares.append(shared * coded)
    if projection in weights.biases:
        bias = weights.biases[projection][expert].double()
        values.append(bias.expand_as(values[0]))
        sizes.append(bias.abs().expand_as(sizes[0]))
    rounded = precision.unit**2 * torch.stack(squares).sum(0) + precision.share**2 * torch.stack(shares).sum(0)
    return _Product(torch.stack(values).sum(0), torch.stack(sizes).sum(0), rounded)
