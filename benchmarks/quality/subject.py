"""A reference model in memory, its experts replaced in place by what each method makes of them, and its scores."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.models.reference_models.build import HELDOUT_FILE
from benchmarks.models.reference_models.model import residual_energy_shares
from benchmarks.quality.merging import RouterUse
from compress_tools.architectures.experts import ExpertWeights
from compress_tools.errors import CheckpointError
from compress_tools.evaluation.predictions import Scores
from compress_tools.evaluation.source import read_tokens
from compress_tools.evaluation.transformers_backend import predict_windows
from compress_tools.evaluation.windows import cut_windows
from compress_tools.hf.dense_experts import fill_experts
from compress_tools.source.design_matrix import expert_to_rows, rows_to_design
from compress_tools.source.moe_source import open_source
from compress_tools.source.source_reader import SourceReader

CALIBRATION_TOKENS = 8192
Experts = Mapping[int, list[ExpertWeights]]  # by layer


class Checkpoint:
    """A checkpoint whose experts are compressed; its weights are read as they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.source = open_source(SourceReader(path))

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts as stored."""
        reader = self.source.reader
        return sum(reader.nbytes(name) for layer in self.source.layers for name in self.source.expected(layer))

    def read_layer(self, layer: int) -> list[ExpertWeights]:
        """One layer's experts as stored."""
        return [self.source.read_expert(layer, expert) for expert in range(self.source.sizes.num_experts)]


class Subject(Checkpoint):
    """One model, loaded once, in fp32, on the CPU.

    Args:
        path: a checkpoint of `benchmarks.models.reference_models`, with its held-out text.
        tokens: how many tokens of that text to score; those behind them are left for calibration.
        window, stride: as in `resmoe eval`; the window at most the model's context.
    Raises:
        CheckpointError: not such a folder, or its text is too short.
    """

    def __init__(self, path: Path, tokens: int, window: int, stride: int) -> None:
        super().__init__(path)
        if not (path / HELDOUT_FILE).is_file():
            raise CheckpointError(
                f"{path}: no {HELDOUT_FILE}; expected a folder of `benchmarks.models.reference_models`"
            )
        text = read_tokens(str(path), str(path / HELDOUT_FILE), tokens + 1 + CALIBRATION_TOKENS)
        if len(text) < tokens + 1 + window:
            raise CheckpointError(f"{path}: {len(text)} held-out tokens; {tokens + 1 + window} are needed")
        self.windows = cut_windows(text[: tokens + 1], window, stride)
        self._calibration = cut_windows(text[tokens + 1 :], window, window)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self._originals = list(predict_windows(self.model, self.windows, whole=True))
        self._dense = {layer: self.read_layer(layer) for layer in self.source.layers}

    @property
    def dtype(self) -> torch.dtype:
        """The experts' stored dtype."""
        return self._dense[self.source.layers[0]][0].up.dtype

    @property
    def residual_energy_share(self) -> float:
        """Mean over layers of ``sum_k ||W_k - mean||^2 / sum_k ||W_k||^2``, without alignment."""
        shares = residual_energy_shares(self.model)
        return sum(shares) / len(shares)

    def design(self, layer: int) -> Tensor:
        """One layer's design matrices, ``[E, I, P*H]`` fp32."""
        return torch.stack([rows_to_design(expert_to_rows(expert)) for expert in self._dense[layer]])

    def score(self, experts: Experts) -> Scores:
        """Scores with these experts in their layers, against the original; the original's are put back after."""
        self._fill(experts)
        try:
            scores = Scores()
            for found, original in zip(
                predict_windows(self.model, self.windows, whole=True), self._originals, strict=True
            ):
                scores.add(found, original)
        finally:
            self._fill({layer: self._dense[layer] for layer in experts})
        return scores

    def router_use(self) -> dict[int, RouterUse]:
        """Each layer's router on the calibration tokens, which are not scored."""
        inputs: dict[int, list[Tensor]] = {layer: [] for layer in self.source.layers}
        routers = {layer: self.model.model.layers[layer].mlp.gate for layer in inputs}
        hooks = [
            router.register_forward_pre_hook(lambda _, args, kept=inputs[layer]: kept.append(args[0].flatten(0, -2)))
            for layer, router in routers.items()
        ]
        for _ in predict_windows(self.model, self._calibration, whole=False):
            pass
        for hook in hooks:
            hook.remove()
        top_k = self.model.config.num_experts_per_tok
        use = {}
        for layer, router in routers.items():
            logits = torch.cat(inputs[layer]) @ router.weight.detach().T
            chosen = torch.bincount(logits.topk(top_k).indices.flatten(), minlength=logits.shape[1])
            use[layer] = RouterUse(logits, chosen / chosen.sum())
        return use

    def _fill(self, experts: Experts) -> None:
        for layer, weights in experts.items():
            fill_experts(self.model.model.layers[layer].mlp.experts, weights)
