"""Everything that reads a ResMoE checkpoint, each called as its users call it, and what it makes of one."""

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

import compress_tools
import resmoe_vllm
from compress_tools.errors import FormatError
from compress_tools.format.dtypes import DTYPES
from compress_tools.format.schema import QUANT_METHOD
from compress_tools.hf.factored_experts import FactoredExperts
from compress_tools.stored.checkpoint import ResMoECheckpoint
from compress_tools.stored.restore import restore
from compress_tools.stored.verify import verify
from resmoe_vllm.config import ResMoEConfig
from resmoe_vllm.kernels.activation import SILU
from resmoe_vllm.kernels.cpu import native
from resmoe_vllm.ops import BoundLayer
from resmoe_vllm.stored_files import watched
from resmoe_vllm.weights.layer_loader import LayerLoader

# All of a seed's vocabulary, so that each expert has a token.
TOKENS = torch.arange(24)[None]
# A token's router weights: two experts for each of five tokens, the last ones of them skipped.
SLOTS = 2


def register() -> None:
    """Make transformers and vLLM know ResMoE, once for all mutants, and build the kernel."""
    compress_tools.register_with_transformers()
    resmoe_vllm.register()
    native.load()


def by_verify(folder: Path) -> None:
    """``resmoe verify``."""
    verify(folder)


@dataclass(frozen=True)
class Logits:
    """What a model of transformers answers.

    Attributes:
        values: its logits.
        made_up: names of weights that the checkpoint does not have, which transformers makes at random, and says so.
        layers: answers of the compressed layers to ``layer_input``, by layer; of a dense model none.
    """

    values: Tensor
    made_up: frozenset[str]
    layers: dict[int, Tensor]


def by_transformers(folder: Path) -> Logits:
    """Logits of ``from_pretrained``, residuals compressed in memory."""
    return _logits(folder)


def by_restore(folder: Path, target: Path) -> None:
    """``resmoe restore``."""
    restore(folder, target)


def by_twin(dense: Path) -> Logits:
    """Logits of a dense checkpoint that ``resmoe restore`` wrote."""
    # The grouped product of torch takes rows of whole 16 bytes alone.
    return _logits(dense, experts_implementation="eager")


def _logits(folder: Path, **options: Any) -> Logits:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True, **options)
    with torch.no_grad():
        logits: Tensor = model(TOKENS).logits
        layers = {
            int(re.findall(r"layers\.(\d+)\.", name)[-1]): _answer(module, model.dtype)
            for name, module in model.named_modules()
            # gpt-oss has an activation of its own, which ``layer_truth`` has not.
            if isinstance(module, FactoredExperts) and model.config.model_type != "gpt_oss"
        }
    return Logits(logits, frozenset(map(str, [*info["missing_keys"], *info["mismatched_keys"]])), layers)


def _answer(experts: FactoredExperts, dtype: torch.dtype) -> Tensor:
    x, weights, ids = layer_input(experts.num_experts, experts.hidden_size, dtype)
    # What the sentinel of transformers is for a pair that is skipped.
    answer: Tensor = experts(x, ids.where(ids >= 0, experts.num_experts), weights)
    return answer


def exact_logits(dense: Path) -> Tensor:
    """A dense checkpoint's logits, computed in fp64."""
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float64, experts_implementation="eager")
    with torch.no_grad():
        logits: Tensor = model(TOKENS).logits
    return logits


def largest_inside(dense: Path) -> float:
    """The largest magnitude that a module of a dense model takes or gives, computed in fp64; Inf where one is none."""
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float64, experts_implementation="eager")
    found = 0.0

    def look(_: torch.nn.Module, inputs: object, output: object) -> None:
        nonlocal found
        outputs = output if isinstance(output, tuple) else (output,)
        for value in (*inputs, *outputs) if isinstance(inputs, tuple) else outputs:
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                found = max(found, float(value.abs().nan_to_num(math.inf, math.inf).max()))

    for module in model.modules():
        module.register_forward_hook(look)
    with torch.no_grad():
        model(TOKENS)
    return found


def by_plugin(folder: Path) -> dict[int, Tensor]:
    """What each compressed layer answers, loaded and run by the plugin's own code: config, loader, kernel.

    Around it stands what vLLM does: the config is read as JSON, tensors come from the files in the order in which they
    lie, pass the plugin's watch, each is handed to the parameter that its name says, and other names are passed over.
    """
    config = json.loads((folder / "config.json").read_text())
    served = ResMoEConfig.from_config(config["quantization_config"])
    served.maybe_update_config(str(folder))
    fmt, outputs = served.fmt, {}
    for index in fmt.layers:
        loader, module = LayerLoader(fmt, index, lambda expert: expert), torch.nn.Module()
        loader.create_params(module, DTYPES[fmt.dtype])
        _hand_over(folder, fmt, index, module)
        loader.check_complete()
        bound = BoundLayer(loader.bind(module), SILU, "cpu")
        outputs[index] = bound(*layer_input(fmt.num_experts, fmt.hidden_size, DTYPES[fmt.dtype]))
    return outputs


def _hand_over(folder: Path, fmt: Any, index: int, module: torch.nn.Module) -> None:
    shards = {"gate_proj": ("w13", "w1"), "up_proj": ("w13", "w3" if fmt.gated else "w1"), "down_proj": ("w2", "w2")}
    stems = {
        f"{fmt.names.expert_stem(index, expert)}.{disk}": (expert, *shards[projection])
        for expert in range(fmt.num_experts)
        for projection, disk in fmt.names.projections.items()
    }
    model = SimpleNamespace(quantization=QUANT_METHOD, model=str(folder), revision=None)
    for name, tensor in watched(SimpleNamespace(), model, _tensors_in(folder)):
        stem, _, suffix = name.rpartition(".")
        if stem not in stems:
            continue
        expert, prefix, shard = stems[stem]
        if (param := getattr(module, f"{prefix}_{suffix}", None)) is not None:
            param.weight_loader(param, tensor, name, shard_id=shard, expert_id=expert, return_success=True)


def _tensors_in(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  no iterator
                yield name, opened.get_tensor(name)


def layer_input(num_experts: int, hidden_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x ``[T, H]``, router weights and experts ``[T, K]``; every expert has a token, one is chosen twice by one."""
    generator = torch.Generator().manual_seed(1)
    tokens = min(num_experts, 64) + 2
    x = torch.randn(tokens, hidden_size, generator=generator).to(dtype)
    weights = torch.rand(tokens, SLOTS, generator=generator)
    ids = torch.arange(tokens)[:, None].repeat(1, SLOTS) % num_experts
    ids[1:, 1] = (ids[1:, 1] + 1) % num_experts
    ids[-1, 1] = -1
    return x, weights, ids


@dataclass(frozen=True)
class LayerTruth:
    """What a layer should answer by its restored experts, fp64.

    Attributes:
        answer: ``[T, H]``.
        magnitude: the sum of all magnitudes that go into it, ``[T, H]``.
        peak: the largest magnitude on a token's way, ``[T]``.
    """

    answer: Tensor
    magnitude: Tensor
    peak: Tensor


def layer_truth(folder: Path) -> dict[int, LayerTruth]:
    """By layer what it should answer."""
    checkpoint = ResMoECheckpoint(folder)
    fmt = checkpoint.fmt
    truth = {}
    for index in fmt.layers:
        x, weights, ids = layer_input(fmt.num_experts, fmt.hidden_size, DTYPES[fmt.dtype])
        x = x.double()
        answer, magnitude, peak = torch.zeros_like(x), torch.zeros_like(x), x.abs().amax(1)
        for expert in range(fmt.num_experts):
            rows = {p: r.double() for p, r in checkpoint.expert(index, expert).items()}
            biases = {p: b.double() for p, b in (checkpoint.biases(index, expert) or {}).items()}
            mine = (weights * (ids == expert)).sum(1, keepdim=True).double()
            up = x @ rows["up_proj"].T + biases.get("up_proj", 0)
            inner, most = up, x.abs() @ rows["up_proj"].abs().T + abs(biases.get("up_proj", torch.zeros(())))
            if "gate_proj" in rows:
                gate = x @ rows["gate_proj"].T + biases.get("gate_proj", 0)
                inner = torch.nn.functional.silu(gate) * up
                gated = x.abs() @ rows["gate_proj"].abs().T + abs(biases.get("gate_proj", torch.zeros(())))
                most = most * (1 + gated)
            answer += mine * (inner @ rows["down_proj"] + biases.get("down_proj", 0))
            # The kernel multiplies whole numbers of 16 bits: what a row's largest number leaves of its others.
            sums = most.amax(1, keepdim=True) * rows["down_proj"].abs().sum(0)
            sums = sums + abs(biases.get("down_proj", torch.zeros(())))
            magnitude += mine * sums
            reached = (mine[:, 0] != 0) * torch.maximum(most.amax(1), sums.amax(1))
            peak = torch.maximum(peak, reached.nan_to_num(math.inf))
        truth[index] = LayerTruth(answer, magnitude, peak)
    return truth


def by_vllm(folder: Path) -> Any:
    """The model as vLLM's own loader makes it, without an engine around it."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    config = EngineArgs(
        model=str(folder), skip_tokenizer_init=True, enforce_eager=True, max_model_len=64
    ).create_engine_config()
    with set_current_vllm_config(config):
        _one_rank()
        model = get_model(vllm_config=config)
    return SimpleNamespace(model=model, config=config)


def _one_rank() -> None:
    """vLLM's groups of processes, of this one alone."""
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

    if not torch.distributed.is_initialized():
        _set_torch_accelerator_to_noop()
        import tempfile

        place = tempfile.mkdtemp(prefix="resmoe-fuzz-ranks-")
        init_distributed_environment(1, 0, f"file://{place}/store", 0, "gloo")
    ensure_model_parallel_initialized(1, 1)


def expect_block(folder: Path) -> None:
    """What vLLM and transformers do before they ask us at all.

    Raises:
        FormatError: they would not: config.json is no JSON object with our block.
    """
    try:
        block = json.loads((folder / "config.json").read_bytes())["quantization_config"]
        if block.get("quant_method") == "resmoe":
            return
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise FormatError(f"{folder}: config.json is not ours: {err!r}") from err
    raise FormatError(f"{folder}: config.json is of another quantisation")
