"""What a checkpoint lacks is found by its names, in models of one kind of layer and of many."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from compress_tools.architectures.registry import find_architecture
from compress_tools.source.completeness import (
    Decoder,
    absent_around,
    absent_experts,
    absent_from_layers,
    absent_from_lone_layers,
    layer_labels,
    odd_tensors,
)
from compress_tools.source.reader import CheckpointReader
from tests.compress_tools.test_pipeline import rewritten

NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
ATTENTION = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight")
LINEAR = ("linear_attn.in_proj.weight", "linear_attn.conv1d.weight", "linear_attn.A_log")
INDEXER = ("self_attn.indexer.wq.weight", "self_attn.indexer.wk.weight")
MIXER_ATTENTION = ("mixer.q_proj.weight", "mixer.k_proj.weight", "mixer.v_proj.weight", "mixer.o_proj.weight")
MIXER_MAMBA = ("mixer.in_proj.weight", "mixer.conv1d.weight", "mixer.A_log")
SPARSE = ("mlp.gate.weight", "mlp.shared_expert.up_proj.weight")
DENSE = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
STEMS = ("layers.{layer}.mlp.experts.", "layers.{layer}.mixer.experts.")

# name -> (tensors of each layer, MoE layers, config.json)
MODELS: dict[str, tuple[list[tuple[str, ...]], list[int], dict[str, object]]] = {
    "alike": ([(*NORMS, *ATTENTION, *SPARSE)] * 4, [0, 1, 2, 3], {}),
    "dense first": ([(*NORMS, *ATTENTION, *DENSE)] * 2 + [(*NORMS, *ATTENTION, *SPARSE)] * 3, [2, 3, 4], {}),
    "linear attention, without a list": (
        [(*NORMS, *LINEAR, *SPARSE), (*NORMS, *ATTENTION, *SPARSE)] * 2,
        [0, 1, 2, 3],
        {},
    ),
    "one mixer each": (
        [("norm.weight", *MIXER_MAMBA), ("norm.weight", "mixer.gate.weight"), ("norm.weight", *MIXER_ATTENTION)] * 2,
        [1, 4],
        {"hybrid_override_pattern": "ME*ME*"},
    ),
    "an indexer in some layers": (
        [(*NORMS, *ATTENTION, *INDEXER, *SPARSE), (*NORMS, *ATTENTION, *SPARSE)] * 2,
        [0, 1, 2, 3],
        {"text_config": {"indexer_types": ["full", "shared"] * 2}},
    ),
    "keys that are values too": (
        [(*NORMS, *ATTENTION, *SPARSE), (*NORMS, *ATTENTION[:2], ATTENTION[3], *SPARSE)] * 2,
        [0, 1, 2, 3],
        {"layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
}


def names_of(layers: list[tuple[str, ...]], moe_layers: list[int]) -> list[str]:
    names = [f"model.layers.{index}.{rest}" for index, own in enumerate(layers) for rest in own]
    names += [f"model.layers.{layer}.mlp.experts.0.up_proj.weight" for layer in moe_layers]
    # A draft layer behind the model proper may look like anything.
    return [*names, f"model.layers.{len(layers)}.eh_proj.weight"]


def absent(layers: list[tuple[str, ...]], moe: list[int], config: dict[str, object], names: list[str]) -> list[str]:
    return absent_from_layers(Decoder(names, config, len(layers), "model.", STEMS, moe))


@pytest.mark.parametrize("model", MODELS)
def test_nothing_lacks_where_all_is_there(model: str):
    layers, moe, config = MODELS[model]
    assert absent(layers, moe, config, names_of(layers, moe)) == []


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=60)
@given(st.data())
def test_any_tensor_that_is_dropped_is_found(model: str, data: st.DataObject):
    layers, moe, config = MODELS[model]
    names = [name for name in names_of(layers, moe) if "experts" not in name and "eh_proj" not in name]
    dropped = data.draw(st.sampled_from(names))
    left = [name for name in names_of(layers, moe) if name != dropped]
    assert absent(layers, moe, config, left) == [dropped]


@pytest.mark.parametrize("model", MODELS)
def test_a_whole_module_that_is_dropped_is_found(model: str):
    layers, moe, config = MODELS[model]
    for layer, own in enumerate(layers):
        for module in {rest.split(".")[0] for rest in own}:
            gone = f"model.layers.{layer}.{module}."
            left = [name for name in names_of(layers, moe) if not name.startswith(gone) or "experts" in name]
            assert absent(layers, moe, config, left), gone


BIASES = ("self_attn.q_proj.bias", "self_attn.sinks")
FAMILY = find_architecture({"model_type": "qwen3_moe"})
# Layers that are the only ones of their kind: what each may lack is told by others, or by what comes together.
LONE: dict[str, tuple[list[tuple[str, ...]], list[int], dict[str, object]]] = {
    "one dense layer": ([(*NORMS, *ATTENTION, *BIASES, *DENSE)] + [(*NORMS, *ATTENTION, *BIASES, *SPARSE)] * 2,
                        [1, 2], {}),
    # As A.X-K1.
    "one dense layer without a norm of experts": (
        [(*NORMS, *ATTENTION, *DENSE)] + [(*NORMS, "post_mlp_layernorm.weight", *ATTENTION, *SPARSE)] * 2,
        [1, 2],
        {},
    ),
    "one of each attention": ([(*NORMS, *ATTENTION, *BIASES, *SPARSE)] * 2, [0, 1],
                              {"layer_types": ["sliding_attention", "full_attention"]}),
    "one with an indexer": (
        [(*NORMS, *ATTENTION, *INDEXER, *SPARSE), (*NORMS, *ATTENTION, *SPARSE), (*NORMS, *ATTENTION, *SPARSE)],
        [0, 1, 2],
        {"indexer_types": ["full", "shared", "shared"]},
    ),
    "one whose keys are values": (
        [(*NORMS, *ATTENTION, *SPARSE), (*NORMS, *ATTENTION[:2], ATTENTION[3], *SPARSE)],
        [0, 1],
        {"layer_types": ["sliding_attention", "full_attention"], "text_config": {"attention_k_eq_v": True}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS | LONE)
def test_nothing_lacks_in_layers_of_their_own_kind(model: str):
    layers, moe, config = (MODELS | LONE)[model]
    lists = config.get("text_config", config)
    assert isinstance(lists, dict)
    for first, last in ((0, len(layers)), (0, 2), (1, 3)):
        own, kept = layers[first:last], [layer - first for layer in moe if first <= layer < last]
        said = {key: value[first:last] for key, value in (config | lists).items() if isinstance(value, list | str)}
        said["text_config"] = {"attention_k_eq_v": "values" in model}
        names = names_of(own, kept)
        assert absent_from_lone_layers(Decoder(names, said, len(own), "model.", STEMS, kept), FAMILY) == []


@pytest.mark.parametrize("model", LONE)
def test_any_tensor_that_a_layer_of_its_own_kind_lacks_is_found(model: str):
    """But for values where keys can be them, and what no other layer has."""
    layers, moe, config = LONE[model]
    tried = 0
    for index, own in enumerate(layers):
        for rest in own:
            if ("values" in model and "v_proj" in rest) or "indexer" in rest:
                continue
            dropped = f"model.layers.{index}.{rest}"
            left = [name for name in names_of(layers, moe) if name != dropped]
            lone = absent_from_lone_layers(Decoder(left, config, len(layers), "model.", STEMS, moe), FAMILY)
            assert dropped in {*lone, *absent(layers, moe, config, left)}, dropped
            tried += 1
    assert tried > 10


@pytest.mark.parametrize("model", sorted(set(MODELS) - {"one mixer each"}))
@pytest.mark.parametrize("router", [True, False], ids=["router left", "router gone"])
def test_experts_that_are_dropped_are_found(model: str, router: bool):
    layers, moe, config = MODELS[model]
    names = names_of(layers, moe)
    assert absent_experts(Decoder(names, config, len(layers), "model.", STEMS, moe)) == []
    for layer in moe:
        gone = f"model.layers.{layer}.mlp{'.experts' if router else ''}."
        left = [name for name in names if not name.startswith(gone)]
        others = [own for own in moe if own != layer]
        found = absent_experts(Decoder(left, config, len(layers), "model.", STEMS, others))
        # A layer of a kind of its own is compared with none.
        assert found == [f"experts of layer {layer}"]


@pytest.mark.parametrize("model", MODELS)
def test_a_whole_layer_that_is_dropped_is_found(model: str):
    layers, moe, config = MODELS[model]
    for layer in range(len(layers)):
        left = [name for name in names_of(layers, moe) if not name.startswith(f"model.layers.{layer}.")]
        others = [own for own in moe if own != layer]
        assert f"layer {layer}" in absent(layers, others, config, left)


def test_lists_and_patterns_label_layers():
    config = {
        "layer_types": ["a", "b"],
        "sizes": [1, 2, 3],
        "text_config": {"hybrid_override_pattern": "M*", "name": "xy"},
    }
    assert layer_labels(config, 2) == [("a", "M"), ("b", "*")]


WHOLE = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"]


@pytest.mark.parametrize(
    ("dropped", "words"),
    [(WHOLE[0], "embedding"), (WHOLE[1], "final norm"), (WHOLE[2], "output layer")],
)
def test_what_stands_around_the_layers(dropped: str, words: str):
    assert absent_around(WHOLE, {}, "model.") == []
    (found,) = absent_around([name for name in WHOLE if name != dropped], {}, "model.")
    assert words in found
    assert dropped in found


@pytest.mark.parametrize("draft", ["model.layers.4.shared_head.head.weight", "mtp.layers.0.head.weight"])
def test_a_draft_has_no_output_layer_for_the_model(draft: str):
    (found,) = absent_around([*(name for name in WHOLE if name != WHOLE[2]), draft], {}, "model.")
    assert "output layer" in found


@pytest.mark.parametrize(
    ("config", "tied", "lacks"),
    [
        ({"tie_word_embeddings": True}, False, False),
        ({"tie_word_embeddings": False}, True, True),
        ({"text_config": {"tie_word_embeddings": True}}, False, False),
        ({}, True, False),
        ({}, False, True),
    ],
)
def test_a_tied_output_layer_is_no_loss(config: dict[str, object], tied: bool, lacks: bool):
    assert bool(absent_around(WHOLE[:2], config, "model.", tied=tied)) is lacks


@pytest.mark.parametrize(
    ("root", "names"),
    [
        ("model.", ["model.word_embeddings.weight", "model.norm.weight", "lm_head.weight"]),
        ("backbone.", ["backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight"]),
        ("", ["embed.weight", "norm.weight", "head.weight"]),
        ("language_model.model.", [f"language_model.{name}" for name in WHOLE]),
        ("model.language_model.", [name.replace("model.", "model.language_model.") for name in WHOLE[:2]] + WHOLE[2:]),
        ("model.", ["model.embed_tokens.weight", "model.embedding_norm.weight", "lm_head.weight"]),
    ],
)
def test_families_call_them_differently(root: str, names: list[str]):
    assert absent_around(names, {}, root) == []


def test_odd_shapes_and_dtypes_are_named(tiny_mixtral_bf16: Path, tmp_path: Path):
    query, norm = "model.layers.1.self_attn.q_proj.weight", "model.layers.2.input_layernorm.weight"
    tensors = load_file(tiny_mixtral_bf16 / "model.safetensors")
    stems = ["layers.{layer}.block_sparse_moe.experts."]
    assert odd_tensors(CheckpointReader(tiny_mixtral_bf16), "model.", stems) == []
    changed = {query: tensors[query].flatten(), norm: tensors[norm].int()}
    reader = CheckpointReader(rewritten(tiny_mixtral_bf16, tmp_path / "source", changed))
    assert odd_tensors(reader, "model.", stems) == [
        f"{norm} is I32 [64], in other layers it has 1 dimensions of floating-point numbers",
        f"{query} is BF16 [4096], in other layers it has 2 dimensions of floating-point numbers",
    ]
    # What is left is small: sizes may differ from layer to layer.
    smaller = rewritten(tiny_mixtral_bf16, tmp_path / "smaller", {query: tensors[query][:32].clone()})
    assert odd_tensors(CheckpointReader(smaller), "model.", stems) == []
