"""The residual methods by their CLI name. A new method is one file and one line here."""

from compress_tools.residuals.base import ResidualMethod
from compress_tools.residuals.low_rank import LowRank
from compress_tools.residuals.prune import Prune

METHODS: dict[str, ResidualMethod] = {method.name: method for method in (Prune(), LowRank())}
