"""The ``quantization_config`` block as vLLM's QuantizationConfig: which layer is served by which method."""

from pathlib import Path
from typing import Any

import torch

from compress_tools.format.schema import QUANT_METHOD, ResMoEFormat, parse_format
from resmoe_vllm.coded_rest import CodedEmbeddingMethod, CodedLinearMethod
from resmoe_vllm.compat import (
    LinearBase,
    QuantizationConfig,
    QuantizeMethodBase,
    RoutedExperts,
    UnquantizedEmbeddingMethod,
    UnquantizedFusedMoEMethod,
    VocabParallelEmbedding,
    WeightsMapper,
    extract_layer_index,
)
from resmoe_vllm.embedding_layers import ask_the_config
from resmoe_vllm.fused_moe import ResMoEFusedMoEMethod
from resmoe_vllm.gpt_oss import STREAMED_NAMES, streams_experts
from resmoe_vllm.lora import REFUSES_ADAPTERS, keep_lora_off
from resmoe_vllm.plain_layers import PlainEmbeddingMethod, PlainLinearMethod
from resmoe_vllm.start_log import StartLog
from resmoe_vllm.stored_files import check_files, folder_of, is_whole


class ResMoEConfig(QuantizationConfig):
    """Serves the MoE layers listed in the format block compressed and all others as plain vLLM would.

    Args:
        fmt: the validated format block.
    """

    def __init__(self, fmt: ResMoEFormat) -> None:
        super().__init__()
        self.fmt = fmt
        self._names = WeightsMapper()
        self._start_log = StartLog(fmt.format_version)
        self._said: set[str] = set()
        self._ask_for_embeddings()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A worker's process is given the config ready-made."""
        self.__dict__.update(state)
        self._ask_for_embeddings()

    def _ask_for_embeddings(self) -> None:
        if self.fmt.rest is not None:
            ask_the_config(type(self))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None, **_: Any
    ) -> None:
        """See vLLM's, which calls it before the model is built: the files' headers must be what the block says.

        Parameters are made by the block, so that memory is asked for in proportion to what is stored. Files of a model
        of the hub that are not in its cache yet are compared once vLLM has downloaded them: see ``stored_files``.

        Raises:
            CheckpointError, FormatError: they are not; names the tensor.
        """
        folder = folder_of(model_name, revision)
        if folder is not None and (Path(model_name).is_dir() or is_whole(folder)):
            check_files(self.fmt, folder, model_name, hf_config)

    def get_name(self) -> str:
        """Name under ``quant_method`` in config.json."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Model dtypes; whether a kernel exists is decided per layer (ops.py)."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """No CUDA capability is excluded here; ops.py decides."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """The block lives in config.json only."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ResMoEConfig":
        """Validate the block of config.json.

        Raises:
            FormatError: see ``parse_format``.
        """
        return cls(parse_format(config))

    # vLLM asks an instance, whose model is built by then.
    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """What the checkpoint's tensors are called for the model's loader."""
        return self._names

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Method of one layer; see ``layer_index`` for how a MoE layer is told."""
        if isinstance(layer, RoutedExperts):
            if keep_lora_off(layer, prefix):
                self._start_log.note(REFUSES_ADAPTERS)
            if streams_experts(layer):
                self._names = STREAMED_NAMES
            index = layer_index(prefix, self.fmt)
            if index is None:
                self._start_log.leave(prefix if _below_mtp(prefix) else extract_layer_index(prefix))
                return UnquantizedFusedMoEMethod(layer.moe_config)
            return ResMoEFusedMoEMethod(layer.moe_config, self.fmt, index, self._start_log)
        if isinstance(layer, LinearBase):
            return PlainLinearMethod(prefix) if self.fmt.rest is None else CodedLinearMethod(prefix, self._say)
        if isinstance(layer, VocabParallelEmbedding):
            if self.fmt.rest is not None:
                return CodedEmbeddingMethod(prefix, self._say, is_a_drafts=prefix != "" and _is_a_drafts(prefix))
            # vLLM puts the model's embedding and output layer in place of a draft's, which need not be stored.
            return UnquantizedEmbeddingMethod() if _is_a_drafts(prefix) else PlainEmbeddingMethod(prefix)
        return None

    def _say(self, text: str) -> None:
        """Log a sentence, once for an engine; in the block of its start where one is to come."""
        if text not in self._said:
            self._said.add(text)
            self._start_log.say(text)


def layer_index(prefix: str, fmt: ResMoEFormat) -> int | None:
    """Which compressed layer a MoE layer of vLLM's is; None where it is not compressed.

    The decoder's are told by their number, as the rest of the prefix varies. Under ``mtp.`` numbers are a draft's own:
    ``mtp.layers.0`` is not the decoder's layer 0. Drafts that count on with the decoder are told by their number.

    Args:
        prefix: the layer's name in vLLM's model.
        fmt: the checkpoint's format block.
    """
    number = extract_layer_index(prefix)
    if not _below_mtp(prefix):
        return number if number in fmt.layers else None
    drafts = fmt.names.drafts or {}
    stems = {index: name.partition("{expert}")[0] for index, name in drafts.items()}
    return next(
        (index for index, stem in stems.items() if _below_mtp(stem) and extract_layer_index(stem) == number), None
    )


def _is_a_drafts(prefix: str) -> bool:
    """Whether an embedding or output layer is a draft's: the model's own has neither a number nor ``mtp`` before it."""
    return not prefix or _below_mtp(prefix) or any(part.isdecimal() for part in prefix.split("."))


def _below_mtp(name: str) -> bool:
    return "mtp" in name.split(".")
