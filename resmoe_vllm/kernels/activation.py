"""What stands between an expert's products with gate and up and its down projection."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

from compress_tools.errors import KernelUnsupportedError

# f by name, of its argument and alpha, which SiLU alone has.
FUNCTIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "silu": lambda x, alpha: silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x),
    "gelu": lambda x, _: gelu(x),
    "gelu_tanh": lambda x, _: gelu(x, approximate="tanh"),
    "relu2": lambda x, _: relu(x).square(),
}


@dataclass(frozen=True)
class Activation:
    """``f(min(gate, limit)) * (clamp(up, -limit, limit) + beta)``; without a gate ``f(up)``.

    Attributes:
        function: f, one of ``FUNCTIONS``.
        gated: experts have a gate; the other attributes are theirs alone.
        limit: None: nothing is clamped.
        alpha: of SiLU, ``x * sigmoid(alpha * x)``.
        beta: added to up.
        limit_after: gate's limit is that of ``f(gate)``, as Step's models have it.
    """

    function: str
    gated: bool = True
    limit: float | None = None
    alpha: float = 1.0
    beta: float = 0.0
    limit_after: bool = False

    def __call__(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """Elementwise.

        Args:
            gate: gate's products; None without a gate.
            up: up's products.
        """
        function = FUNCTIONS[self.function]
        if gate is None:
            return function(up, self.alpha)
        if self.limit is not None:
            up = up.clamp(-self.limit, self.limit)
            gate = gate if self.limit_after else gate.clamp(max=self.limit)
        out = function(gate, self.alpha)
        if self.limit is not None and self.limit_after:
            out = out.clamp(max=self.limit)
        return out * (up + self.beta if self.beta else up)


SILU = Activation("silu")

# By vLLM's name. Interleaving, in which swigluoai differs from swigluoai_uninterleave, is a matter of how a dense
# checkpoint lies: the format keeps gate and up apart.
ACTIVATIONS: dict[str, Activation] = {
    "silu": SILU,
    "gelu": Activation("gelu"),
    "gelu_tanh": Activation("gelu_tanh"),
    "swigluoai": Activation("silu", limit=7.0, alpha=1.702, beta=1.0),
    "swigluoai_uninterleave": SILU,
    "swiglustep": Activation("silu", limit=7.0, limit_after=True),
    "silu_no_mul": Activation("silu", gated=False),
    "gelu_no_mul": Activation("gelu", gated=False),
    "gelu_tanh_no_mul": Activation("gelu_tanh", gated=False),
    "relu2_no_mul": Activation("relu2", gated=False),
}


def make_activation(
    name: str, limit: float | None = None, alpha: float | None = None, beta: float | None = None
) -> Activation:
    """The activation that vLLM asks for.

    Args:
        name: its name there.
        limit: a layer's ``swiglu_limit``; None: the name's own, likewise for the others.
        alpha: ``swiglu_alpha``.
        beta: ``swiglu_beta``.
    Raises:
        KernelUnsupportedError: kernels don't have it.
    """
    if name not in ACTIVATIONS:
        raise KernelUnsupportedError(f"resmoe has no activation {name!r}; it has: {', '.join(sorted(ACTIVATIONS))}")
    found = ACTIVATIONS[name]
    given = {key: value for key, value in (("limit", limit), ("alpha", alpha), ("beta", beta)) if value is not None}
    if given and not (found.gated and found.function == "silu"):
        asked = ", ".join(f"swiglu_{key} {value}" for key, value in given.items())
        raise KernelUnsupportedError(f"resmoe has no {asked} of activation {name!r}; only SwiGLU is clamped and scaled")
    if limit is not None and not limit > 0:
        raise KernelUnsupportedError(f"resmoe has no swiglu_limit {limit}; expected a number above 0, or none")
    return replace(
        found,
        limit=found.limit if limit is None else limit,
        alpha=found.alpha if alpha is None else alpha,
        beta=found.beta if beta is None else beta,
    )
