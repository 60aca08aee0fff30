"""What a reference model is: one frozen config, its checks, and the presets."""

from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# Head sizes that every vLLM attention backend of interest has, vLLM's CPU one included.
HEAD_DIMS = (32, 64, 80, 96, 112, 128)


class ReferenceModelConfig(BaseModel):
    """Everything that decides the weights of a reference model; equal configs give equal bytes.

    "Equal bytes" holds on one machine, for one Python, torch and thread count.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: Literal["upcycled", "scratch", "merged"] = Field(
        "upcycled",
        description="upcycled: dense model first, its MLP copied into every expert; scratch: MoE only; merged: dense "
        "model first, its MLP fine-tuned once for each expert on a part of the text, then the routers alone",
    )
    architecture: Literal["mixtral", "olmoe"] = Field("mixtral", description="transformers model class")

    hidden_size: int = Field(256, ge=64, description="H; a multiple of 64")
    intermediate_size: int = Field(512, ge=64, description="I of one expert; a multiple of 64")
    num_layers: int = Field(4, ge=1, description="decoder layers, all of them MoE")
    num_heads: int = Field(4, ge=1, description="attention heads; H / heads must be a head size vLLM has")
    num_kv_heads: int = Field(2, ge=1, description="key/value heads; divides the heads")
    num_experts: int = Field(8, ge=2, description="E, experts per layer")
    top_k: int = Field(2, ge=1, description="K, experts per token")
    vocab_size: int = Field(4096, ge=320, description="byte-level BPE tokens, 256 bytes and 1 special included")
    context_length: int = Field(256, ge=16, description="tokens per training window, and the model's maximum")
    initializer_range: float = Field(0.02, gt=0, le=1, description="standard deviation of fresh weights")

    bigram_steps: int = Field(
        40,
        ge=0,
        description="full-batch steps that fit embedding and head to the bigrams before all else; 0: none",
    )
    dense_steps: int = Field(0, ge=0, description="steps of the dense phase; upcycled only")
    expert_steps: int = Field(0, ge=0, description="steps of each expert's fine-tuning; merged only")
    moe_steps: int = Field(400, ge=0, description="steps of the MoE phase; merged trains routers alone")
    batch_size: int = Field(8, ge=1, description="windows per step")
    dense_lr: float = Field(3e-3, gt=0, le=1, description="peak learning rate of the dense phase")
    expert_lr: float = Field(1e-3, gt=0, le=1, description="peak learning rate of each expert's fine-tuning")
    moe_lr: float = Field(3e-3, gt=0, le=1, description="peak learning rate of the MoE phase")
    final_lr_share: float = Field(0.05, ge=0, le=1, description="last learning rate / peak, at the cosine's end")
    warmup_share: float = Field(0.05, ge=0, lt=1, description="share of a phase's steps in linear warm-up")
    weight_decay: float = Field(0.1, ge=0, description="AdamW decay of matrices; vectors have none")
    grad_clip: float = Field(1.0, gt=0, description="largest gradient norm")
    router_aux_loss_coef: float = Field(0.01, ge=0, description="weight of the load-balancing loss")

    drop_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of each expert's I channels drawn anew at upcycling (Drop-Upcycling)",
    )
    expert_noise: float = Field(
        0.0, ge=0, description="gaussian noise added to copied experts, in standard deviations of the weight"
    )

    seed: int = Field(0, ge=0, description="seed of weights, router, noise and batch order")
    device: str = Field("cpu", description="torch device; cuda trains under bfloat16 autocast, cpu in float32")
    dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="stored dtype")
    experts_implementation: Literal["eager", "grouped_mm", "batched_mm"] = Field(
        "grouped_mm", description="transformers' experts loop while training"
    )
    max_train_bytes: int | None = Field(None, ge=1024, description="use only this much source text")
    eval_tokens: int = Field(32768, ge=64, description="held-out tokens scored, spread over the held-out text")

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_heads

    @field_validator("device")
    @classmethod
    def _check_device(cls, device: str) -> str:
        try:
            kind = torch.device(device).type
        except RuntimeError as err:
            raise ValueError("not a torch device; use cpu, cuda or cuda:N") from err
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError("torch sees no CUDA device here; use cpu")
        return device

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        for name in ("hidden_size", "intermediate_size"):
            if getattr(self, name) % 64:
                raise ValueError(f"{name} must be a multiple of 64, found {getattr(self, name)}")
        if self.num_heads * self.head_dim != self.hidden_size or self.head_dim not in HEAD_DIMS:
            raise ValueError(
                f"hidden_size / num_heads must be one of {HEAD_DIMS}, found {self.hidden_size}/{self.num_heads}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads {self.num_heads}, found {self.num_kv_heads}")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k must be at most num_experts {self.num_experts}, found {self.top_k}")
        if self.eval_tokens < self.context_length:
            raise ValueError(
                f"eval_tokens must be at least context_length {self.context_length}, found {self.eval_tokens}"
            )
        return self

    @model_validator(mode="after")
    def _check_phases(self) -> Self:
        if self.recipe != "scratch" and self.dense_steps == 0:
            raise ValueError(f"recipe {self.recipe} needs dense_steps >= 1: there is nothing to copy otherwise")
        if (self.recipe == "merged") != (self.expert_steps > 0):
            raise ValueError(
                f"expert_steps must be {'at least 1' if self.recipe == 'merged' else '0'} in recipe {self.recipe}, "
                f"found {self.expert_steps}"
            )
        if self.recipe == "merged" and (self.drop_fraction or self.expert_noise):
            raise ValueError("recipe merged fine-tunes its experts: drop_fraction and expert_noise must be 0")
        if self.recipe == "scratch":
            for name in ("dense_steps", "drop_fraction", "expert_noise"):
                if getattr(self, name):
                    raise ValueError(
                        f"recipe scratch has no dense phase: {name} must be 0, found {getattr(self, name)}"
                    )
            if self.moe_steps == 0:
                raise ValueError("recipe scratch needs moe_steps >= 1")
        return self


# demo: minutes on 2 AVX2 cores, so few tokens; small batches make the most steps of them.
# quality-*: for `benchmarks.quality`. On one thread of a shared machine a variant of upcycled (moe_lr 3e-3) took 24
# minutes; scratch took 96 while others used the same cores.
PRESETS: dict[str, dict[str, Any]] = {
    "demo": {"vocab_size": 2048, "dense_steps": 500, "moe_steps": 300, "moe_lr": 1.5e-3, "batch_size": 2},
    # The MoE phase's peak rate drives the experts apart: at 3e-3 this preset ends with 52.0 % residual energy, and
    # demo, with fewer and smaller steps, with 12.9 % at 1.5e-3 and 35.4 % at 3e-3. Experts of copied init that still
    # share most of their weights are the case to show, hence 1.5e-3.
    "quality-upcycled": {
        "vocab_size": 2048, "batch_size": 4, "dense_steps": 1000, "moe_steps": 1200, "moe_lr": 1.5e-3,
    },
    "quality-scratch": {
        "recipe": "scratch", "architecture": "olmoe", "intermediate_size": 256, "num_kv_heads": 4,
        "num_experts": 16, "top_k": 4, "vocab_size": 2048, "batch_size": 4, "moe_steps": 2000, "moe_lr": 2e-3,
    },
    # As merged models of the hub are made; fine-tuning moves a weight by a tenth of its size.
    "quality-merged": {
        "recipe": "merged", "vocab_size": 2048, "batch_size": 4, "dense_steps": 1000,
        "expert_steps": 150, "expert_lr": 5e-4, "moe_steps": 200,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1,
        "num_experts": 4, "vocab_size": 384, "context_length": 32, "bigram_steps": 4, "dense_steps": 12,
        "moe_steps": 6, "batch_size": 4, "max_train_bytes": 200_000, "eval_tokens": 512,
    },
}  # fmt: skip


def preset_config(name: str, **overrides: Any) -> ReferenceModelConfig:
    """A preset with some fields changed.

    Args:
        name: key of PRESETS.
        overrides: fields of ReferenceModelConfig that replace the preset's.
    Raises:
        ValueError: no such preset; or (pydantic.ValidationError) a field is unknown or makes no sense.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return ReferenceModelConfig(**{**PRESETS[name], **overrides})
