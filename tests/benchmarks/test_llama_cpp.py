"""The comparison with llama.cpp: what it writes, and how it judges; servers are started by the command alone."""

from pathlib import Path

import pytest
import torch

from benchmarks import llama_cpp
from benchmarks.harness.quiet import Noise, Probe, QuietMachine
from benchmarks.harness.shapes import SHAPES, MoEShape
from benchmarks.llama_cpp import DENSE, SAME_BITS, Served, must_agree, rows
from benchmarks.models import synthetic_checkpoint
from benchmarks.models.gguf_checkpoint import FORMS, write_gguf
from benchmarks.models.synthetic_checkpoint import write_compressed, write_dense
from compress_tools.errors import CheckpointError, ResMoEError
from compress_tools.format.rest import decode_rows, row_names
from compress_tools.source.reader import CheckpointReader

gguf = pytest.importorskip("gguf")
TINY = MoEShape("tiny", 64, 32, 8, 2, 1)
BEST = Probe(0.01, 0.02)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "dense"
    with pytest.MonkeyPatch.context() as patch:
        fields = {"vocab_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 4}
        patch.setitem(synthetic_checkpoint.FAMILIES, "tiny", ("Olmoe", fields))
        write_dense(path, TINY, 1)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_a_gguf_file_holds_the_checkpoint(dense: Path, tmp_path: Path, form: str) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file, dense, form)
    reader, found = CheckpointReader(dense), gguf.GGUFReader(file)
    by_name = {tensor.name: tensor for tensor in found.tensors}
    assert len(by_name) == 3 + 12  # of the whole, of the layer
    up = by_name["blk.0.ffn_up_exps.weight"]
    assert up.tensor_type.name == FORMS[form][0]
    assert by_name["blk.0.attn_q.weight"].tensor_type.name == FORMS[form][1]
    restored = torch.from_numpy(gguf.quants.dequantize(up.data, up.tensor_type).copy())
    assert restored.shape == (TINY.experts, TINY.intermediate, TINY.hidden)
    error = {"bf16": 0.0, "Q8_0": 0.01, "Q4_0": 0.15}[form]
    for expert in range(TINY.experts):
        wanted = reader.get(f"model.layers.0.mlp.experts.{expert}.up_proj.weight").float()
        assert (restored[expert] - wanted).norm() <= error * wanted.norm()
    gate = by_name["blk.0.ffn_gate_inp.weight"]
    assert torch.equal(torch.from_numpy(gate.data.copy()), reader.get("model.layers.0.mlp.gate.weight").float())
    assert found.fields["olmoe.expert_used_count"].contents() == TINY.top_k


def test_another_family_is_refused(tiny_mixtral: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="only olmoe is written"):
        write_gguf(tmp_path / "model.gguf", tiny_mixtral, "bf16")


@pytest.mark.parametrize("name", llama_cpp.OURS)
def test_ours_has_its_rest_in_8_bits(dense: Path, tmp_path: Path, name: str) -> None:
    write_compressed(tmp_path / "ours", dense, **llama_cpp.OURS[name])
    ours, query = CheckpointReader(tmp_path / "ours"), "model.layers.0.self_attn.q_proj.weight"
    restored = decode_rows(*map(ours.get, row_names(query)), torch.float32)
    wanted = CheckpointReader(dense).get(query).float()
    assert (restored - wanted).norm() < 0.01 * wanted.norm()
    assert query not in ours.names


def test_models_that_agree_and_models_that_do_not() -> None:
    clear, near = {3: -1.0, 4: -2.0}, {5: -1.0, 6: -1.01}
    must_agree([clear, near], [{3: -1.05, 4: -1.95}, {6: -1.0, 5: -1.02}])
    with pytest.raises(ResMoEError, match="differ at prompt 1"):
        must_agree([clear, clear], [clear, {3: -1.0, 4: -2.5}])
    with pytest.raises(ResMoEError, match="differ at prompt 0"):
        must_agree([clear], [{4: -1.95, 7: -2.0}])
    with pytest.raises(ResMoEError, match="no prompt of 1"):
        must_agree([near], [near])


def test_ours_is_judged_beside_the_same_bits_and_dense() -> None:
    noise = Noise(BEST, BEST, 0.0)
    machine = QuietMachine(1, 0, probe=lambda: BEST)

    def served(model: str, token: float, first: float) -> Served:
        figures = {
            "a token's time, one stream": (token, "ms", noise), "first token, one prompt": (first, "ms", noise),
            "first token, 8 prompts at once": (8 * first, "ms", noise),
        }  # fmt: skip
        return Served(model, 1, figures)

    ours = next(iter(llama_cpp.OURS))
    found = rows([served(SAME_BITS, 10, 50), served(DENSE, 30, 100), served(ours, 12, 90)], {1: machine}, {"layers": 8})
    judged = {row.name: (row.value, row.met) for row in found if row.target is not None}
    assert judged == {
        f"{ours} against {SAME_BITS}, 1 thread: a token's time, one stream": (1.2, False),
        f"{ours} against {DENSE}, 1 thread: first token, one prompt": (0.9, True),
        f"{ours} against {DENSE}, 1 thread: first token, 8 prompts at once": (0.9, True),
    }
    assert len(found) == 9 + 3


def test_the_default_model_is_olmoe() -> None:
    assert llama_cpp.SHAPE in SHAPES
