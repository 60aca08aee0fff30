"""A checkpoint's files before and while vLLM reads them: headers that the block asks for, and no NaN in any weight."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from torch import Tensor, nn

from compress_tools.errors import CheckpointError, FormatError, NumericalError, ResMoEError
from compress_tools.format.directory import INDEX_NAME, check_headers, check_layer_count, read_headers
from compress_tools.format.finite import plain_fault
from compress_tools.format.schema import QUANT_METHOD, ResMoEFormat, parse_format
from compress_tools.format.tensors import is_resmoe_name
from compress_tools.text_file import in_words, read_json_object
from resmoe_vllm.weights.marks import Marks

_SINGLE_NAME = "model.safetensors"
# Far beyond any model.
_LARGEST = 2**20


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
    """Headers of all weight files are what the block says; without safetensors, what is said can be counted to.

    Raises:
        CheckpointError, FormatError: they are not; names the tensor.
    """
    headers = read_headers(folder)
    largest = max(fmt.hidden_size, fmt.intermediate_size)
    if not headers and max(fmt.num_experts, largest) > _LARGEST:
        # Its parameters would be counted, and made, before anybody sees that there are no weights.
        what = f"{fmt.num_experts} experts" if fmt.num_experts > _LARGEST else f"weights of {largest} columns"
        raise FormatError(f"{where}: config.json counts {what}, and there are no safetensors")
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
        loader.resmoe_passing = f"{name!r:.160} ({tensor.dtype} {list(tensor.shape)})".replace("torch.", "")
        yield name, tensor
    loader.resmoe_passing = None


@contextmanager
def loading(loader: Any, model: nn.Module, model_config: Any) -> Iterator[None]:
    """While vLLM's loader loads a model: its errors say what they are about, and nothing is left as it was made.

    vLLM asks for whole checkpoints only where a model has no quantization config, and never of linear layers.

    Args:
        loader: vLLM's, whose tensors pass ``watched``.
        model: is loaded.
        model_config: vLLM's, of the model.
    Raises:
        CheckpointError: see ``misfit``; or a parameter was not loaded, names it.
    """
    if model_config.quantization != QUANT_METHOD:
        yield
        return
    marks = Marks(model, is_draft=model_config.runner_type == "draft")
    try:
        yield
    except Exception as err:
        if (told := misfit(loader, model_config, err)) is None:
            raise
        raise told from err
    if missing := marks.left():
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{model_config.model}: incomplete: no tensor fills {missing[0]}{more}, as vLLM calls it; download it again"
        )


def misfit(loader: Any, model_config: Any, err: Exception) -> CheckpointError | None:
    """What an error of vLLM's own means that a tensor meets on the way to its parameter.

    Args:
        loader: vLLM's loader, whose tensors pass ``watched``.
        model_config: vLLM's, of the model that is loaded.
        err: the error.
    Returns:
        None where it says enough by itself, or no tensor is on the way.
    """
    passing = getattr(loader, "resmoe_passing", None)
    if passing is None or not _of_shapes_or_names(err):
        return None
    parameter = _parameter_of(err)
    expected = "" if parameter is None else f", whose parameter is {list(parameter.shape)} here"
    words = f": {in_words(err):.200}" if str(err).strip() else ""
    return CheckpointError(
        f"{model_config.model}: {passing} does not fit the model that vLLM makes of config.json{expected}; `resmoe "
        f"verify` says more ({type(err).__name__}{words})"
    )


def _of_shapes_or_names(err: Exception) -> bool:
    if isinstance(err, ResMoEError | torch.OutOfMemoryError):
        return False
    return isinstance(err, AssertionError | ValueError | LookupError | TypeError | AttributeError | RuntimeError)


def _parameter_of(err: Exception) -> Tensor | None:
    """What vLLM's loaders of parameters all call ``param``, in the innermost of them."""
    found, step = None, err.__traceback__
    while step is not None:
        own = step.tb_frame.f_locals.get("param")
        found = own if isinstance(own, Tensor) else found
        step = step.tb_next
    return found
