"""Expert merging, the baseline that keeps no residual: one expert in the place of several.

The average of all experts as they are; the average after Git Re-Basin's matching or after the barycenter's; and
M-SMoE (arXiv:2310.01334): experts grouped around the most used ones by their routers' likeness, each group merged
after alignment, weighted by use. The last one needs data, and is the only method here that sees any.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compress_tools.center.barycenter import CenterKind, CenterOptions, find_center
from compress_tools.numerics.products import squared_distance


@dataclass(frozen=True)
class RouterUse:
    """What one layer's router did on calibration tokens.

    Attributes:
        logits: ``[T, E]`` fp32, before the softmax.
        frequency: share of the chosen places that each expert got, ``[E]``; sums to 1.
    """

    logits: Tensor
    frequency: Tensor


@dataclass(frozen=True)
class Merged:
    """One layer with fewer experts.

    Attributes:
        centers: design matrices ``[G, I, P*H]`` fp32.
        group: the center that stands for each expert, ``[E]`` int64.
        squared_error: ``sum_k ||T_k W_k - center||_F^2``.
    """

    centers: Tensor
    group: Tensor
    squared_error: float


def merge_all(design: Tensor, kind: CenterKind) -> Merged:
    """One center for all experts of ``design`` ``[E, I, P*H]``; ``kind`` as in ``CenterOptions``."""
    found = find_center(design, CenterOptions(kind))
    return Merged(found.center[None], torch.zeros(len(design), dtype=torch.int64), found.objective[-1])


def merge_groups(design: Tensor, use: RouterUse, num_groups: int) -> Merged:
    """M-SMoE's grouping and merging of ``design`` ``[E, I, P*H]`` into ``num_groups`` experts.

    Departure from the paper: every layer gets as many groups, where it spreads them over layers by use.
    """
    leaders = use.frequency.argsort(descending=True, stable=True)[:num_groups]
    columns = torch.nn.functional.normalize(use.logits.T, dim=1)  # [E, T]
    group = (columns @ columns[leaders].T).argmax(dim=1)
    group[leaders] = torch.arange(num_groups)
    centers, squared_error = [], 0.0
    for number, leader in enumerate(leaders.tolist()):
        # The leader first: Git Re-Basin's matching takes the first one's row order.
        members = [leader, *(e for e in (group == number).nonzero()[:, 0].tolist() if e != leader)]
        perm = find_center(design[members], CenterOptions("git-rebasin")).perm
        aligned = [design[e][order].float() for e, order in zip(members, perm, strict=True)]
        weights = use.frequency[members].clamp(min=1e-6)  # a group that nothing chose is still an average
        center = sum(w * rows for w, rows in zip((weights / weights.sum()).tolist(), aligned, strict=True))
        squared_error += sum(squared_distance(rows, center) for rows in aligned)
        centers.append(center)
    return Merged(torch.stack(centers), group, squared_error)
