"""A model that has one layer in memory at a time predicts what the whole model does."""

from pathlib import Path

import pytest
import torch

from benchmarks.models.tiny_models import NOT_IN_TRANSFORMERS, TINY_CONFIGS, load_model, save_tiny_model
from compress_tools.errors import UnsupportedArchitectureError
from compress_tools.hf.streamed_model import LayerCall, StreamedModel, joined
from compress_tools.source.moe_source import open_source
from compress_tools.source.source_reader import SourceReader
from tests.compress_tools.calibration.tokens import tokens

REFUSED = {"switch_transformers": "encoder-decoder", "qwen3_omni_moe": "no causal language model"}


@pytest.mark.parametrize("family", sorted(set(TINY_CONFIGS) - set(NOT_IN_TRANSFORMERS) - set(REFUSED)))
def test_predicts_what_the_whole_model_does(family: str, tmp_path: Path) -> None:
    path = save_tiny_model(family, tmp_path / "model", torch.float32)
    model = StreamedModel(open_source(SourceReader(path)), torch.float32)
    in_memory: list[int] = []

    def step(call: LayerCall) -> object:
        whole = [layer for layer in model.layers if all(p.device.type != "meta" for p in layer.parameters())]
        in_memory.append(len(whole))
        return joined([call.run(0, 2), call.run(2, 5)])

    windows = tokens(5, 24)
    last = model.run(windows, step)
    with torch.no_grad():
        expected = load_model(path)(input_ids=windows, use_cache=False).logits
    torch.testing.assert_close(model.logits(windows, last), expected, rtol=1e-4, atol=1e-4)
    assert in_memory == [1] * len(model.layers)
    assert all(p.device.type == "meta" for p in model.layers.parameters())


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_what_can_not_be_run_so_is_refused_by_name(family: str, tmp_path: Path) -> None:
    path = save_tiny_model(family, tmp_path / "model", torch.float32)
    with pytest.raises(UnsupportedArchitectureError, match=REFUSED[family]):
        StreamedModel(open_source(SourceReader(path)), torch.float32)
