"""An OLMoE checkpoint as GGUF, as llama.cpp reads it, tensor by tensor; its vocabulary is made up."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from compress_tools.errors import CheckpointError
from compress_tools.source.reader import CheckpointReader

# form -> (GGUF's type of experts, of all other matrices). Norms and routers are fp32, as llama.cpp's converter does.
FORMS = {"bf16": ("BF16", "BF16"), "Q8_0": ("Q8_0", "Q8_0"), "Q4_0": ("Q4_0", "Q8_0")}
# name in transformers -> name in GGUF
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip
_EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(\w+)\.weight")


def write_gguf(out: Path, dense: Path, form: str) -> None:
    """Write a dense OLMoE checkpoint as one GGUF file; a stack of experts is the most that memory holds.

    Args:
        out: the file.
        dense: directory of the checkpoint.
        form: one of ``FORMS``.
    Raises:
        CheckpointError: it is of another family.
    """
    gguf = importlib.import_module("gguf")
    reader = CheckpointReader(dense)
    if reader.config.get("model_type") != "olmoe":
        raise CheckpointError(
            f"{dense}: is of family {reader.config.get('model_type')!r}; as GGUF only olmoe is written here"
        )
    writer = gguf.GGUFWriter(out, "olmoe")
    _write_fields(writer, reader.config)
    experts, others = (gguf.GGMLQuantizationType[name] for name in FORMS[form])
    plan = list(_tensors(reader, experts, others, gguf.GGMLQuantizationType.F32))
    for name, kind, shape, _ in plan:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        nbytes = int(np.prod(shape)) // block * size
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, kind, _, sources in plan:
        parts = [gguf.quants.quantize(reader.get(source).float().numpy(), kind) for source in sources]
        writer.write_tensor_data(parts[0] if len(parts) == 1 else np.stack(parts))
    writer.close()


def _write_fields(writer: Any, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    # Prompts are numbers; these words stand in for a tokenizer, which answers are written with.
    words = [f"t{token}" for token in range(config["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([1] * len(words))
    writer.add_token_merges(["t 0"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id):
        add(0)
    writer.add_add_bos_token(False)  # noqa: FBT003  gguf has it by position


def _tensors(
    reader: CheckpointReader, experts: Any, others: Any, exact: Any
) -> Iterator[tuple[str, Any, tuple[int, ...], list[str]]]:
    """GGUF's name, type, shape, and the names of the tensors in the source that it is stacked from."""
    number = reader.config["num_experts"]
    for name in sorted(reader.names):
        shape = tuple(reader.shape(name))
        stem = name.removesuffix(".weight")
        found = _EXPERT.fullmatch(name)
        if found is None:
            layer, _, rest = stem.removeprefix("model.layers.").partition(".")
            own = _WHOLE.get(stem) or f"blk.{layer}.{_LAYER[rest]}"
            kind = exact if len(shape) == 1 or rest == "mlp.gate" else others
            yield f"{own}.weight", kind, shape, [name]
        elif found[2] == "0":
            every = [name.replace(".experts.0.", f".experts.{expert}.") for expert in range(number)]
            yield f"blk.{found[1]}.{_EXPERTS[found[3]]}.weight", experts, (number, *shape), every
