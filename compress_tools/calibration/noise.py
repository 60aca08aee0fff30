"""What a layer's errors cost: noise on its experts, and the KL between what the model then predicts and what it did.

Perplexity moves linearly with the squared error of a layer relative to its weights (arXiv:2411.17525): the coefficient
is the KL for each unit of it.
"""

import torch
from torch import Tensor, nn

from compress_tools.format.schema import Projection
from compress_tools.hf.dense_experts import expert_of

# Squared size of the noise relative to each matrix: between what 3 and 4 bits lose, where the law holds well.
NOISE = 0.02
# Tokens that each layer's noise is tried on.
TOKENS = 4096
_STREAM = 0x5EED1000


def add_noise(dense: nn.Module, projections: tuple[Projection, ...], num_experts: int, layer: int, seed: int) -> None:
    """Gaussian noise of ``NOISE`` times each matrix's squared norm, on average, in place."""
    generator = torch.Generator().manual_seed(_STREAM + (seed << 20) + layer)
    for expert in range(num_experts):
        weights = expert_of(dense, expert)
        for projection in projections:
            matrix = weights.matrix(projection)
            size = (NOISE * matrix.float().square().mean()).sqrt()
            matrix.add_((size * torch.randn(matrix.shape, generator=generator)).to(matrix.dtype))


def mean_kl(clean: Tensor, noisy: Tensor) -> float:
    """KL(clean || noisy) in nats, the mean over positions of logits ``[N, L, V]``."""
    before, after = clean.double().log_softmax(-1), noisy.double().log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean())
