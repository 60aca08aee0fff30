"""What `resmoe probe` is asked: validated before a checkpoint is opened."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from compress_tools.config import CompressionConfig, check_device, default_workers, validated
from compress_tools.errors import ConfigError

DEFAULT_EXPERTS = 8
_RECIPE = CompressionConfig.model_fields

Ratio = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]


class ProbeConfig(BaseModel):
    """The sample and the sizes asked about."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: str = Field("all", description="MoE layers to sample from: all; decoder; top:N, bottom:N; or 0-3,7.")
    max_layers: int = Field(3, ge=1, description="Sample at most so many of them, evenly spaced, both ends included.")
    experts: int | None = Field(
        None, ge=2, description="Experts sampled in each layer, chosen by --seed. [default: 8, or all where fewer]"
    )
    bytes_ratio: tuple[Ratio, ...] = Field(
        (),
        description="Size to predict errors at, as a share of the experts' bytes, everything counted; may be "
        "given more than once. [default: the sizes of plain 2-, 3-, 4- and 8-bit quantisation]",
    )
    seed: int = Field(0, ge=0, description="Seed of the sample and of the random control.")
    workers: int = Field(default_factory=default_workers, ge=1, description=_RECIPE["workers"].description)
    device: str = Field("cpu", description=_RECIPE["device"].description)

    def sampled_experts(self, num_experts: int) -> int:
        """How many experts of E take part.

        Raises:
            ConfigError: more than the model has, or the model has nothing to share.
        """
        if num_experts < 2:
            raise ConfigError("the model has 1 expert in each layer: nothing to share a center; quantise it plainly")
        if self.experts is not None and self.experts > num_experts:
            raise ConfigError(
                f"--experts {self.experts}: the model has {num_experts} experts; ask for 2 to {num_experts}"
            )
        return min(num_experts, self.experts or DEFAULT_EXPERTS)


def make_probe_config(**options: object) -> ProbeConfig:
    """Build a config from keyword options.

    Raises:
        ConfigError: names the option, the value found and the rule; or the device is not there.
    """
    config = validated(ProbeConfig, options)
    check_device(config.device)
    return config
