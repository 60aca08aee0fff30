"""How long measuring a layer will roughly take, said before the first one has shown it.

The rates are one core's of an AMD Zen processor (2 cores, AVX-512), measured on random matrices; a device is faster.
They leave out reading, and how soon a center's iterations end.
"""

from collections.abc import Iterable

from compress_tools.config import CompressionConfig
from compress_tools.planner.candidates import Coder, Sizes
from compress_tools.planner.measure import LOW_RANK_EXPERTS, Sample

# Weights that quantising or pruning codes: 6.7 to 19 million a second over all bits and groups.
CODED_PER_S = 1e7
# Products of an [m, n] residual's factors, m <= n, over m^2 * n: 0.1 s for 512 x 1536, 2.4 to 9.8 s for 2048 x 6144.
FACTORED_PER_S = 4e9
# Multiplications of cost matrices.
MULTIPLIED_PER_S = 4e10
# Times that every expert is matched to a center, by kind; barycenters of unrelated experts take the most.
MATCHINGS = {"barycenter": 8, "git-rebasin": 1}


def layer_seconds(sizes: Sizes, coders: Iterable[Coder], config: CompressionConfig, sample: Sample) -> float:
    """Estimated seconds of one layer: centers and candidates.

    Args:
        sizes: of the model.
        coders: the menu.
        config: which center; how many workers.
        sample: how much of a layer is measured.
    """
    width = sizes.hidden_size * len(sizes.projections)
    experts = min(sample.experts or sizes.num_experts, sizes.num_experts)
    rows = min(sample.rows or sizes.rows, sizes.rows)
    whole = experts == sizes.num_experts and rows == sizes.rows
    matching = MATCHINGS.get(config.center, 0) * sizes.num_experts * sizes.rows**2 * width / MULTIPLIED_PER_S
    coding = factoring = 0.0
    short, long = sorted((sizes.rows, width))
    for coder in coders:
        if coder.factorises:
            taken = experts if whole else min(experts, LOW_RANK_EXPERTS)
            factoring += len(coder.centers) * taken * short**2 * long / FACTORED_PER_S
        else:
            coding += len(coder.centers) * experts * rows * width / CODED_PER_S
    return (matching + coding + factoring) / min(config.workers, sizes.num_experts)
