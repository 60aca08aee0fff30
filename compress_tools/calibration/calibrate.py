"""The whole way of `resmoe calibrate`: a text in windows, through the model layer by layer, to one file."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from compress_tools.calibration.config import CalibrationConfig
from compress_tools.calibration.generate import self_generated
from compress_tools.calibration.noise import NOISE, TOKENS, add_noise, mean_kl
from compress_tools.calibration.statistics import LayerStatistics
from compress_tools.errors import CheckpointError, ConfigError
from compress_tools.evaluation.source import (
    choose_window,
    language_config,
    loading_options,
    read_tokens,
    stored_dtype,
)
from compress_tools.hf.streamed_model import LayerCall, StreamedModel, joined
from compress_tools.importance import COEFFICIENT, COUNTS, METADATA_KEY, VERSION, source_digest, tensor_key
from compress_tools.output.output_file import check_output_file
from compress_tools.progress.listener import ProgressListener, Silent
from compress_tools.source.files import CheckpointFiles
from compress_tools.source.moe_source import open_source
from compress_tools.source.source_reader import SourceReader
from compress_tools.text_file import in_words
from compress_tools.version import __version__

# Tokens that go through a layer at once.
TOGETHER = 2048


@dataclass(frozen=True)
class Calibrated:
    """What was done.

    Attributes:
        path: the file.
        tokens: that the model saw.
        layers: that were measured.
        unreached: experts of all layers that no token was routed to.
        coefficients: by layer, where measured.
    """

    path: str
    tokens: int
    layers: list[int]
    unreached: int
    coefficients: dict[int, float] | None


def calibrate(
    src: str | Path | CheckpointFiles,
    out: str | Path,
    config: CalibrationConfig,
    progress: ProgressListener | None = None,
    *,
    overwrite: bool = False,
) -> Calibrated:
    """Measure what errors of each expert's weights count, and write it to a file.

    Args:
        src: source directory, or a model of the hub; only read.
        out: the file.
        config: text and how the model runs.
        progress: told of layers.
        overwrite: replace ``out``.
    Raises:
        ConfigError, UnsupportedArchitectureError, CheckpointError: see errors.py.
    """
    progress = progress or Silent()
    check_output_file("--out", out)
    if Path(out).exists() and not overwrite:
        raise ConfigError(f"--out {out}: exists; choose another name or pass --overwrite")
    source = open_source(SourceReader(src))
    reader = source.reader
    model_config = language_config(str(reader.path), reader.config)
    window, _ = choose_window(config.window, None, model_config)
    dtype = getattr(torch, stored_dtype(config.dtype, model_config))
    loading = loading_options(trust_remote_code=config.trust_remote_code)
    if config.text is not None:
        tokens = read_tokens(str(reader.path), config.text, config.max_tokens, **loading)
        windows = tokens[: len(tokens) // window * window].view(-1, window) if len(tokens) >= window else tokens[None]
    else:
        if reader.store.streams:
            raise ConfigError("--self-generated needs the whole model, which --stream never holds; leave --stream out")
        reader.store.prepare(reader.shards)
        progress.stage("writing a text", None)
        windows = self_generated(reader.path, config.self_generated or 0, window, dtype, config.seed, **loading)
    model = StreamedModel(source, dtype, **loading)
    run = _Run(model, windows, config, progress)
    found, coefficients = run.all()
    metadata = {
        "version": VERSION,
        "source": source_digest(reader.fingerprint()),
        "tokens_sha256": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        "text": "self-generated" if config.text is None else Path(config.text).name,
        "tokens": windows.numel(),
        "window": windows.shape[1],
        "seed": config.seed,
        "resmoe": __version__,
    }
    _write(found, {METADATA_KEY: json.dumps(metadata)}, Path(out))
    layers = [layer for layer in source.layers if tensor_key(layer, COUNTS) in found]
    unreached = sum(int((found[tensor_key(layer, COUNTS)] == 0).sum()) for layer in layers)
    return Calibrated(str(out), windows.numel(), layers, unreached, coefficients if config.coefficients else None)


class _Run:
    """One pass of all windows, and of those with noise behind them, through the model."""

    def __init__(
        self, model: StreamedModel, windows: Tensor, config: CalibrationConfig, progress: ProgressListener
    ) -> None:
        self._model, self._config, self._progress = model, config, progress
        self._source = model.source
        self._moe = {layer: place for place, layer in enumerate(self._source.located.layers)}
        length = windows.shape[1]
        self._tried = max(1, min(len(windows), TOKENS // length)) if config.coefficients else 0
        rows = len(windows) + self._tried * len(self._moe)
        # A batch is known by its number of windows, which must not be a window's number of tokens.
        self._windows = windows[:-1] if rows == length and len(windows) > 1 else windows
        self._tried = min(self._tried, len(self._windows))
        self._step = max(1, TOGETHER // length)
        self._found: dict[str, Tensor] = {}

    def all(self) -> tuple[dict[str, Tensor], dict[int, float]]:
        """Everything that is kept, and the coefficients among it."""
        tried = self._windows[: self._tried]
        batch = torch.cat([self._windows, *[tried] * (len(self._moe) if self._tried else 0)])
        self._progress.start(len(self._model.layers), "layer")
        last = self._model.run(batch, self._layer)
        coefficients: dict[int, float] = {}
        if self._tried:
            for layer, place in self._moe.items():
                coefficients[layer] = self._kl(batch, last, place) / NOISE
                self._found[tensor_key(layer, COEFFICIENT)] = torch.tensor(coefficients[layer])
        return self._found, coefficients

    def _noisy(self, place: int) -> tuple[int, int]:
        """The windows whose noise is on the MoE layer of this number."""
        start = len(self._windows) + place * self._tried
        return start, start + self._tried

    def _layer(self, call: LayerCall) -> Any:
        parts = self._measured(call) if call.index in self._moe else self._through(call, 0, call.count)
        self._progress.shard_done()
        return joined(parts)

    def _measured(self, call: LayerCall) -> list[Any]:
        layer, place, sizes = call.index, self._moe[call.index], self._source.sizes
        dense, projections = self._model.experts(layer), self._source.projections
        statistics = LayerStatistics(dense, projections, sizes.num_experts, sizes.intermediate_size, sizes.hidden_size)
        self._progress.stage("measuring", None, layer)
        handle = dense.register_forward_pre_hook(statistics.hook, with_kwargs=True)
        parts = self._through(call, 0, len(self._windows))
        handle.remove()
        self._found |= {tensor_key(layer, name): tensor for name, tensor in statistics.tensors().items()}
        if self._tried:
            clean = call.run(0, self._tried)
            parts += self._through(call, len(self._windows), self._noisy(place)[0])
            add_noise(dense, projections, sizes.num_experts, layer, self._config.seed)
            parts += self._through(call, *self._noisy(place))
            # What has no noise yet is still the same.
            parts += [clean] * (len(self._moe) - place - 1)
        return parts

    def _through(self, call: LayerCall, start: int, stop: int) -> list[Any]:
        return [call.run(at, min(at + self._step, stop)) for at in range(start, stop, self._step)]

    def _kl(self, batch: Tensor, last: Tensor, place: int) -> float:
        start, stop = self._noisy(place)
        total = 0.0
        for number in range(stop - start):
            rows = torch.tensor([number, start + number])
            clean, noisy = self._model.logits(batch[rows], last[rows])
            total += mean_kl(clean, noisy)
        return total / (stop - start)


def _write(tensors: dict[str, Tensor], metadata: dict[str, str], out: Path) -> None:
    unfinished = out.with_name(out.name + ".tmp")
    try:
        save_file(dict(sorted(tensors.items())), unfinished, metadata)
        unfinished.replace(out)
    except OSError as err:
        raise CheckpointError(f"--out {out}: can't be written: {in_words(err)}; make room, or choose another") from err
