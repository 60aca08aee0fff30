"""Leading left singular vectors by the route that costs least, its error within 0.1 % of the exact truncation's.

Two routes, both over the Gram matrix of the smaller side:

- ``eigh``: the whole spectrum, float64.
- ``filter``: randomised subspace iteration with a Chebyshev polynomial of the Gram matrix in place of plain powers
  (Zhou, Saad, Tiago, Chelikowsky 2006), which damps everything below the wanted singular values at the least degree.
  A flat spectrum, which is what residuals of unrelated experts have, needs 10 or more plain power iterations for
  0.1 %, and a degree of 5 here. The cut between wanted and unwanted comes from a Lanczos estimate of the spectrum.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from compress_tools.numerics.products import product, squared_norm

# Columns beyond the wanted rank, and how far beyond those the filter's cut lies; with the growth below they keep the
# excess error under 0.1 % on flat spectra (test_svd.py, and `python -m benchmarks.compress`).
OVERSAMPLING = 1.3
EXTRA_COLUMNS = 32
CUT_BEYOND = 1.1

# Excess error over the exact truncation's that the filter's degree is chosen for, by an estimate that errs high.
_TARGET_EXCESS = 2e-4
_MAX_DEGREE = 24

# In fp32, directions amplified 1e5 times less than the strongest are still known to 1 %; then orthonormalise.
_MAX_GROWTH = 1e5

# eigh of an n x n float64 matrix takes as long as this many n x n x n fp32 products (measured: 19 at n = 1408).
_EIGH_PRODUCTS = 19.0

# A tail below this share of the energy is near fp32's rounding of a Gram matrix: float64 then.
_MIN_FP32_TAIL = 1e-3

# Seeds of its own: weights made by torch from the user's seed would be the very vectors that start here.
_STREAM = 0x5EED0000

_LANCZOS_STEPS = 48

# Random vectors, by the size from which on so few will do: of a large matrix one sees more of the spectrum.
_LANCZOS_STARTS = {8192: 1, 4096: 4, 0: 8}


def left_singular_vectors(matrix: Tensor, rank: int, seed: int = 0, route: str | None = None) -> Tensor:
    """The ``rank`` leading left singular vectors.

    Args:
        matrix: ``[I, D]`` fp32.
        rank: 1..min(I, D).
        seed: of the random start; the same seed gives the same bytes.
        route: ``eigh`` or ``filter``; None picks the cheaper one.
    Returns:
        ``[I, rank]`` fp32, orthonormal columns, largest singular value first.
    """
    route = route or cheaper_route(min(matrix.shape), rank)
    if route == "filter":
        left, tail = _filtered(matrix, rank, seed)
        if tail >= _MIN_FP32_TAIL:
            return left
    return _by_eigh(matrix, rank)


def cheaper_route(size: int, rank: int) -> str:
    """``eigh`` or ``filter`` for a Gram matrix ``[size, size]``, by their count of fp32 products."""
    width = OVERSAMPLING * rank + EXTRA_COLUMNS
    if width * CUT_BEYOND >= 0.8 * size:
        return "eigh"
    # The Gram matrix itself: half a float64 product more (a float64 product takes as long as two).
    by_eigh = _EIGH_PRODUCTS * size**3 + size**3
    by_filter = 2 * 6 * size**2 * width + 20 * size * width**2 + _EIGH_PRODUCTS * width**3
    return "filter" if by_filter < by_eigh else "eigh"


def tail_energy(matrix: Tensor, rank: int) -> float:
    """Energy that the best rank-``rank`` approximation loses, exact up to float64 rounding; for checks."""
    values = torch.linalg.eigvalsh(_gram(_narrow(matrix), torch.float64))
    return float(values[: len(values) - rank].clamp(min=0).sum())


def _narrow(matrix: Tensor) -> Tensor:
    """The matrix with its smaller side first."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def _by_eigh(matrix: Tensor, rank: int) -> Tensor:
    vectors: Tensor = torch.linalg.eigh(_gram(_narrow(matrix), torch.float64))[1]
    leading = vectors[:, -rank:].flip(1)
    if matrix.shape[0] <= matrix.shape[1]:
        return leading.float()
    # Right vectors v give u = M v / |M v|; null directions are completed by QR.
    left = torch.cat([product(block.double(), leading) for block in torch.split(matrix, 2048)])
    orthonormal: Tensor = torch.linalg.qr(left)[0]
    return orthonormal.float()


def _gram(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """``M M^T``, one triangle of blocks computed and mirrored; no copy of M in another dtype exists as a whole."""
    size = len(matrix)
    total = torch.empty(size, size, dtype=dtype, device=matrix.device)
    edges = [*range(0, size, max(256, -(-size // 16))), size]
    for start, stop in itertools.pairwise(edges):
        # Block rows against everything from their own diagonal on; wide matrices by column blocks.
        rows = total.new_zeros(stop - start, size - start)
        for columns in range(0, matrix.shape[1], 4096):
            part = matrix[start:, columns : columns + 4096].to(dtype)
            rows += product(part[: stop - start], part.T)
        total[start:stop, start:] = rows
        total[start:, start:stop] = rows.T
    return total


def _filtered(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, float]:
    """Left vectors by filtered subspace iteration, and the share of the energy that they leave."""
    gram = _gram(_narrow(matrix), torch.float32)
    size, width = len(gram), min(len(gram), int(OVERSAMPLING * rank) + EXTRA_COLUMNS)
    generator = torch.Generator(device="cpu").manual_seed(_STREAM + seed)
    spectrum = _spectrum(gram, generator)
    cut = spectrum.at(min(size, int(CUT_BEYOND * width)))
    basis = torch.randn(size, width, generator=generator).to(gram.device)
    basis = _chebyshev(gram, basis, _parts(spectrum, rank, width, cut), cut)
    del gram
    if matrix.shape[0] <= matrix.shape[1]:
        image = product(basis.T, matrix)  # [width, D]
        values, rotation = torch.linalg.eigh(product(image, image.T).double())
        left = product(basis, rotation[:, -rank:].flip(1).float())
    else:
        image = product(matrix, basis)  # [I, width]
        values, rotation = torch.linalg.eigh(product(image.T, image).double())
        kept = values[-rank:].flip(0).clamp(min=torch.finfo(torch.float64).tiny)
        left = product(image, (rotation[:, -rank:].flip(1) / kept.sqrt()).float())
    energy = squared_norm(matrix)
    tail = 1 - values[-rank:].sum().item() / energy if energy else 0.0
    return left, tail


@dataclass(frozen=True)
class _Spectrum:
    """Estimated eigenvalues: ``count[k]`` of them near ``value[k]``, largest first; float64."""

    value: Tensor
    count: Tensor

    def at(self, rank: int) -> float:
        """The eigenvalue of a rank."""
        return self.value[min(int((self.count.cumsum(0) < rank).sum()), len(self.value) - 1)].item()

    def split(self, rank: int) -> tuple["_Spectrum", "_Spectrum"]:
        """The leading ``rank`` eigenvalues, and the others."""
        leading = (rank - (self.count.cumsum(0) - self.count)).clamp(min=0).minimum(self.count)
        return _Spectrum(self.value, leading), _Spectrum(self.value, self.count - leading)


def _spectrum(gram: Tensor, generator: torch.Generator) -> _Spectrum:
    """Stochastic Lanczos quadrature: a few products with a few random vectors."""
    size = len(gram)
    # One vector to a row: products with a few contiguous vectors are the fastest so.
    starts = next(count for least, count in _LANCZOS_STARTS.items() if size >= least)
    block = torch.randn(starts, size, generator=generator).to(gram.device)
    current = block / block.norm(dim=1, keepdim=True)
    previous, below = torch.zeros_like(current), torch.zeros(starts, 1, device=gram.device)
    diagonal, off = [], []
    for _ in range(min(_LANCZOS_STEPS, size)):
        image = (gram.mv(current[0])[None] if starts == 1 else (gram @ current.T).T) - previous * below
        diagonal.append((image * current).sum(1))
        image -= current * diagonal[-1][:, None]
        below = image.norm(dim=1, keepdim=True).clamp(min=1e-30)
        off.append(below[:, 0])
        previous, current = current, image / below
    alpha, beta = torch.stack(diagonal, 1).double().cpu(), torch.stack(off[:-1], 1).double().cpu()
    tridiagonal = torch.diag_embed(alpha) + torch.diag_embed(beta, 1) + torch.diag_embed(beta, -1)
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    order = nodes.flatten().argsort(descending=True)
    return _Spectrum(
        nodes.flatten()[order].clamp(min=0),
        vectors[:, 0, :].square().flatten()[order] * size / starts,
    )


def _parts(spectrum: _Spectrum, rank: int, width: int, cut: float) -> list[int]:
    """Degrees of the Chebyshev polynomials to apply one after another, with a QR between.

    A wanted direction of eigenvalue ``a`` loses about ``(a - cut) * (n - width) / (2 (width - rank)) / p(a)^2`` to
    the damped ones, p at most 1 on them with mean square 1/2.
    """
    if cut <= 0:
        return [1]
    leading, rest = spectrum.split(rank)
    tail = (rest.value * rest.count).sum().item()
    crowd = (spectrum.count.sum().item() - width) / (2 * (width - rank))
    over = (leading.value - cut).clamp(min=0)
    x = (2 * leading.value / cut - 1).clamp(min=1)
    most = _growth(2 * spectrum.value[0].item() / cut - 1)
    longest = 1
    while longest < _MAX_DEGREE and most ** (longest + 1) < _MAX_GROWTH:
        longest += 1
    parts = [0]
    amplified = torch.ones_like(x)
    for _ in range(_MAX_DEGREE):
        if parts[-1] == longest:
            amplified = amplified * torch.cosh(parts[-1] * torch.acosh(x))
            parts.append(0)
        parts[-1] += 1
        gain = (amplified * torch.cosh(parts[-1] * torch.acosh(x))).clamp(max=1e100)
        lost = (over * leading.count / gain.square()).sum().item() * crowd
        if lost <= _TARGET_EXCESS * tail:
            break
    return parts


def _growth(x: float) -> float:
    """Growth of Chebyshev polynomials at ``x`` from one degree to the next."""
    return x + (x * x - 1) ** 0.5 if x > 1 else 1.0


def _chebyshev(gram: Tensor, basis: Tensor, parts: list[int], cut: float) -> Tensor:
    """Orthonormal basis of ``p(gram) @ basis``, p Chebyshev polynomials of the given degrees on [0, cut]."""
    half = cut / 2 if cut > 0 else 1.0
    for degree in parts:
        before, now, free = basis, product(gram, basis).div_(half).sub_(basis), torch.empty_like(basis)
        for _ in range(degree - 1):
            following = product(gram, now, free).mul_(2 / half).sub_(now, alpha=2).sub_(before)
            before, now, free = now, following, before
            scale = now.norm() / now.shape[1] ** 0.5
            before.div_(scale)
            now.div_(scale)
        basis = torch.linalg.qr(now)[0]
    return basis
