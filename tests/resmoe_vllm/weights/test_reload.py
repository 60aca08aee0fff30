"""What vLLM does to weights of a running engine is refused by name, not by an error inside of vLLM."""

import pytest
import torch
from vllm.model_executor.model_loader.reload import layerwise

from compress_tools.errors import ConfigError
from tests.resmoe_vllm.layers import layer_kinds, load_all, new_loader, store_layer


def test_a_reload_is_refused_by_name() -> None:
    """`reload_weights`, and with it sleep level 2: vLLM asks loaders for their names and signatures, and calls them."""
    layer = store_layer(layer_kinds(8, 16)["low_rank-joint"], 2, 8, 16, "float32")
    module, loader = new_loader(layer)
    layerwise.record_metadata_for_reloading(module)
    load_all(module, loader, layer)
    loader.finished = True
    layerwise.initialize_layerwise_reload(module)
    param = module.w13_resmoe_center
    with pytest.raises(ConfigError, match="layer 0: resmoe doesn't support reloading weights in a running engine"):
        param.weight_loader(param, torch.zeros(8, 16), "name", shard_id="w1", expert_id=0)
