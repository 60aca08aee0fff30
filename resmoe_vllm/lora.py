"""LoRA beside compressed experts: attention and other linear layers take adapters, experts take none.

vLLM would wrap every MoE layer, whatever an adapter holds, and its wrapper wants a kernel of vLLM's own. So the layers
of a ResMoE checkpoint are left out of the modules that its LoRA manager looks at, and an adapter with weights for them
is refused, by vLLM's own check and in our words.
"""

from functools import wraps
from typing import Any
from weakref import WeakSet

from torch import nn

from compress_tools.errors import ConfigError
from resmoe_vllm.compat import RoutedExperts, lora_managers, lora_target_modules

WAY_OUT = "serve the restored checkpoint (`resmoe restore`), or train the adapter without experts in its target modules"
REFUSES_ADAPTERS = "LoRA: adapters with weights for experts are refused"

# MoE layers of ResMoE checkpoints, compressed or left dense.
_without_lora: "WeakSet[nn.Module]" = WeakSet()


def keep_lora_off(layer: RoutedExperts, prefix: str) -> bool:
    """Make a MoE layer one that takes no adapters, where LoRA is enabled.

    Args:
        layer: of a model that is being made.
        prefix: its name.
    Returns:
        whether LoRA is enabled.
    Raises:
        ConfigError: ``--lora-target-modules`` names experts.
    """
    if not layer.moe_config.is_lora_enabled:
        return False
    if named := [target for target in lora_target_modules() or () if "experts" in target.split(".")]:
        raise ConfigError(
            f"{prefix}: --lora-target-modules names {named[0]!r}: resmoe doesn't support LoRA on experts; {WAY_OUT}"
        )
    _install()
    layer.moe_config.is_lora_enabled = False
    _without_lora.add(layer)
    return True


def _runners_without_lora(model: nn.Module) -> set[str]:
    """Last name components of the modules that hold such layers: ``experts``."""
    return {
        name.split(".")[-1]
        for name, module in model.named_modules()
        if any(child in _without_lora for child in module.children())
    }


def _install() -> None:
    """Put both hooks in; repeatable."""
    manager, worker = lora_managers()
    if not hasattr(manager.get_supported_lora_modules, "resmoe"):
        manager.get_supported_lora_modules = _leaving_experts_out(manager.get_supported_lora_modules)
    if not hasattr(worker._load_adapter, "resmoe"):
        worker._load_adapter = _refusing_experts(worker._load_adapter)


def _leaving_experts_out(original: Any) -> Any:
    @wraps(original)
    def get_supported_lora_modules(model: nn.Module) -> list[str]:
        without = _runners_without_lora(model)
        return [name for name in original(model) if name not in without]

    get_supported_lora_modules.__dict__["resmoe"] = True
    return get_supported_lora_modules


def _refusing_experts(original: Any) -> Any:
    @wraps(original)
    def _load_adapter(self: Any, lora_request: Any) -> Any:
        try:
            return original(self, lora_request)
        except ValueError as err:
            # vLLM's own check lists the modules that no adapter may have.
            if ".experts" not in str(err) or not _runners_without_lora(self._adapter_manager.model):
                raise
            raise ConfigError(
                f"LoRA adapter {lora_request.lora_name!r} ({lora_request.lora_path}) has weights for experts: resmoe "
                f"doesn't support LoRA on experts; {WAY_OUT}"
            ) from err

    _load_adapter.__dict__["resmoe"] = True
    return _load_adapter
