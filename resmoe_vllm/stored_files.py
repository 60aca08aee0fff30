"""A checkpoint's files before and while vLLM reads them: headers that the block asks for, and no NaN in any weight."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from compress_tools.errors import CheckpointError, FormatError, NumericalError
from compress_tools.format.directory import INDEX_NAME, check_headers, check_layer_count, read_headers
from compress_tools.format.finite import plain_fault
from compress_tools.format.schema import QUANT_METHOD, ResMoEFormat, parse_format
from compress_tools.format.tensors import is_resmoe_name
from compress_tools.text_file import read_json_object

_SINGLE_NAME = "model.safetensors"
# Far beyond any model.
_MOST_EXPERTS = 2**20


def folder_of(model: str, revision: str | None, cache: str | None = None) -> Path | None:
    """Where a model lies: the directory that it is called by, or its snapshot in the hub's cache; None without one."""
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, revision=revision, cache_dir=cache, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def is_whole(folder: Path) -> bool:
    """Whether every weight file is there; of a model that is still to be downloaded some may be."""
    if not (folder / INDEX_NAME).exists():
        return (folder / _SINGLE_NAME).exists()
    weight_map = read_json_object(folder / INDEX_NAME).get("weight_map")
    return isinstance(weight_map, dict) and all((folder / str(shard)).exists() for shard in weight_map.values())


def check_files(fmt: ResMoEFormat, folder: Path, where: str, hf_config: Any = None) -> None:
    """Headers of all weight files are what the block says; without safetensors, that it can be counted to.

    Raises:
        CheckpointError, FormatError: they are not; names the tensor.
    """
    headers = read_headers(folder)
    if not headers and fmt.num_experts > _MOST_EXPERTS:
        # Its parameters would be counted, and made, before anybody sees that there are no weights.
        raise FormatError(f"{where}: config.json counts {fmt.num_experts} experts, and there are no safetensors")
    if headers:
        check_headers(fmt, headers, where)
        if hf_config is not None:
            check_layer_count(hf_config, headers, where)


def watched(loader: Any, model_config: Any, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a loader of vLLM's reads, each looked at on its way; those of other models as they are.

    A model that is called by its name on the hub is here by now, so that its headers are compared first.

    Args:
        loader: vLLM's loader.
        model_config: vLLM's, of the model that is loaded.
        weights: names and tensors.
    Raises:
        CheckpointError, FormatError: see ``check_files``; or there are no safetensors, but pickles perhaps.
        NumericalError: a tensor holds NaN or Inf; names it.
    """
    if model_config.quantization != QUANT_METHOD:
        yield from weights
        return
    model = model_config.model
    by_name = not Path(model).is_dir()
    if by_name:
        loader.download_model(model_config)
    folder = folder_of(model, model_config.revision, loader.load_config.download_dir if by_name else None)
    if folder is not None:
        if not any(folder.glob("*.safetensors")):
            raise CheckpointError(f"{model}: no safetensors; a ResMoE checkpoint's weights are read from nothing else")
        if by_name:
            block: Any = getattr(model_config.hf_config, "quantization_config", None)
            check_files(parse_format(block, f"{model}: config.json"), folder, model)
    for name, tensor in weights:
        # Those of this project are checked where they are put in place, as the block says what they are.
        if not is_resmoe_name(name) and (fault := plain_fault(tensor)):
            raise NumericalError(f"{model}: {name!r} {fault}")
        yield name, tensor
