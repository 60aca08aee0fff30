"""The models: transformers' own classes, fresh or upcycled, and how far their experts have grown apart."""

import torch
from torch import Tensor, nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from benchmarks.models.reference_models.config import ReferenceModelConfig

END_OF_TEXT_ID = 0


def hf_config(config: ReferenceModelConfig, num_experts: int, top_k: int) -> PreTrainedConfig:
    """The transformers config of one phase; the dense phase is the same model with one expert and top-1.

    With one expert both architectures weigh it by exactly 1 (the softmax of one logit), so it is a dense MLP.
    """
    shape = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "num_experts_per_tok": top_k,
        "max_position_embeddings": config.context_length,
        "initializer_range": config.initializer_range,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "router_aux_loss_coef": config.router_aux_loss_coef,
        "output_router_logits": num_experts > 1,  # off again when saved
        "bos_token_id": END_OF_TEXT_ID,
        "eos_token_id": END_OF_TEXT_ID,
        "pad_token_id": END_OF_TEXT_ID,
        "tie_word_embeddings": False,
    }
    if config.architecture == "mixtral":
        built = MixtralConfig(num_local_experts=num_experts, head_dim=config.head_dim, **shape)
    else:
        # Copied experts must add up to the dense MLP: the chosen weights have to sum to 1 there.
        built = OlmoeConfig(num_experts=num_experts, norm_topk_prob=config.recipe != "scratch", **shape)
    built._experts_implementation = config.experts_implementation
    return built


def new_model(config: ReferenceModelConfig, num_experts: int, top_k: int, seed: int) -> PreTrainedModel:
    """A float32 model with fresh weights on the CPU; the caller's random state is left as it was."""
    classes = {"mixtral": MixtralForCausalLM, "olmoe": OlmoeForCausalLM}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return classes[config.architecture](hf_config(config, num_experts, top_k))


def expert_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Per layer the module that holds gate_up_proj [E, 2I, H] and down_proj [E, H, I]."""
    return [layer.mlp.experts for layer in model.model.layers]


def upcycle(dense: PreTrainedModel, config: ReferenceModelConfig) -> PreTrainedModel:
    """A MoE model whose every expert is the dense model's MLP, with fresh routers.

    Two optional departures, both seeded: `drop_fraction` of each expert's channels (rows of gate and up,
    columns of down) are drawn anew from a gaussian of the weight's own mean and standard deviation, which
    differ between experts (Drop-Upcycling, arXiv:2502.19261); `expert_noise` adds gaussian noise everywhere.
    Without them all experts are equal, and the MoE model computes what the dense one did.

    Args:
        dense: model of the same shape with one expert; left unchanged.
        config: the MoE model's sizes and options.
    """
    moe = new_model(config, config.num_experts, config.top_k, config.seed + 1)
    state = {
        name: value
        for name, value in dense.state_dict().items()
        if ".mlp.gate." not in name and ".mlp.experts." not in name
    }
    moe.load_state_dict(state, strict=False)
    generator = torch.Generator().manual_seed(config.seed + 2)
    with torch.no_grad():
        for source, target in zip(expert_modules(dense), expert_modules(moe), strict=True):
            for name in ("gate_up_proj", "down_proj"):
                getattr(target, name).copy_(getattr(source, name).cpu().expand_as(getattr(target, name)))
            _perturb(target, config, generator)
    return moe


def train_only(model: PreTrainedModel, part: str) -> None:
    """Freeze every parameter but those whose name holds ``part``."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name)


def copy_expert(dense: PreTrainedModel, moe: PreTrainedModel, expert: int) -> None:
    """Put a dense model's MLPs, one expert each, in an expert's place in every layer."""
    with torch.no_grad():
        for source, target in zip(expert_modules(dense), expert_modules(moe), strict=True):
            for name in ("gate_up_proj", "down_proj"):
                getattr(target, name)[expert] = getattr(source, name)[0].to(getattr(target, name).device)


def _perturb(experts: nn.Module, config: ReferenceModelConfig, generator: torch.Generator) -> None:
    """Apply drop_fraction and expert_noise to one layer's experts in place."""
    num_dropped = round(config.drop_fraction * config.intermediate_size)
    for e in range(config.num_experts):
        gate_up, down = experts.gate_up_proj[e], experts.down_proj[e]  # [2I, H], [H, I]
        parts = (*gate_up.chunk(2), down.T)  # three views [I, H]
        rows = torch.randperm(config.intermediate_size, generator=generator)[:num_dropped]
        for part in parts:
            mean, std = part.mean(), part.std()
            part[rows] = mean + std * torch.randn(num_dropped, part.shape[1], generator=generator)
            if config.expert_noise:
                part += config.expert_noise * std * torch.randn(part.shape, generator=generator)


def residual_energy_shares(model: PreTrainedModel) -> list[float]:
    """Per layer `sum_k ||W_k - mean||^2 / sum_k ||W_k||^2` over experts, in float64 sums, without alignment.

    0: all experts equal; about 1 - 1/E: nothing in common row by row (never copied from one another).
    """
    shares = []
    for experts in expert_modules(model):
        residual = total = 0.0
        for weight in (experts.gate_up_proj, experts.down_proj):
            w = weight.detach().float()
            residual += (w - w.mean(dim=0)).square().sum(dtype=torch.float64).item()
            total += w.square().sum(dtype=torch.float64).item()
        shares.append(residual / total)
    return shares


def expert_params(model: PreTrainedModel) -> int:
    """Number of parameters in experts, over all layers."""
    return sum(p.numel() for experts in expert_modules(model) for p in experts.parameters())


def stored_values(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Round every weight through the stored dtype, in place, and keep float32 for computing."""

    def rounded(value: Tensor) -> Tensor:
        return value.to(dtype).float()

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(rounded(parameter))
    return model
