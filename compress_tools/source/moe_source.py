"""A checkpoint to compress, seen as MoE layers of experts, wherever and however it keeps them."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from compress_tools.architectures.base import DraftLayer, Located, MoEArchitecture
from compress_tools.architectures.experts import ExpertWeights, MoESizes
from compress_tools.architectures.layouts import ExpertLayout, Stacked
from compress_tools.architectures.registry import expert_like, find_architecture
from compress_tools.errors import CheckpointError, FormatError, NumericalError, UnsupportedArchitectureError
from compress_tools.format.finite import all_finite
from compress_tools.format.plain_tensors import dtype_fault
from compress_tools.format.schema import ExpertNames, Projection
from compress_tools.format.shard_file import StoredTensor
from compress_tools.format.tensors import is_resmoe_name
from compress_tools.source.completeness import OUTPUT_NAME, check_whole, has_output, is_embedding, is_tied, odd_tensors
from compress_tools.source.model_fit import PlainPart, PlainTensor, check_fit
from compress_tools.source.reader import CheckpointReader
from compress_tools.source.source_reader import SourceReader


@dataclass(frozen=True)
class MoESource:
    """A source checkpoint's experts.

    Attributes:
        reader: the checkpoint.
        architecture: its family.
        sizes: E, H, I.
        names: names that the ResMoE checkpoint will use.
        located: where the experts are and how they lie.
        drafts: multi-token-prediction layers, by layer index; their experts have the same sizes.
        other_drafts: layers whose experts have other sizes, and so stay as they are, and how they are called.
    """

    reader: CheckpointReader
    architecture: MoEArchitecture
    sizes: MoESizes
    names: ExpertNames
    located: Located
    drafts: Mapping[int, DraftLayer] = field(default_factory=dict)
    other_drafts: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of layers that hold experts, ascending: the decoder's, then drafts'."""
        return (*self.located.layers, *self.drafts)

    @property
    def layout(self) -> ExpertLayout:
        """How the experts lie."""
        return self.located.layout

    @property
    def stacked(self) -> bool:
        """The experts of a layer lie in 3-D tensors."""
        return isinstance(self.layout, Stacked)

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The family's projections in design-matrix order."""
        return tuple(self.names.projections)

    def expected(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all tensors of a layer that compression replaces."""
        layout, stem = self._place(layer)
        return layout.tensors(stem, self.sizes)

    def check(self, layer: int) -> None:
        """Every expert is there, in the expected shape. Reads no weight.

        Raises:
            CheckpointError: names the missing or misshapen tensor.
        """
        for name, shape in self.expected(layer).items():
            if name not in self.reader:
                raise CheckpointError(
                    f"{self.reader.path}: layer {layer}: not all {self.sizes.num_experts} experts are complete: "
                    f"tensor {name!r} is missing"
                )
            if self.reader.shape(name) != shape:
                raise CheckpointError(
                    f"{self.reader.path}: {name!r} has shape {list(self.reader.shape(name))}, "
                    f"config.json says {list(shape)}"
                )

    def read_expert(self, layer: int, expert: int) -> ExpertWeights:
        """Read one expert.

        Raises:
            CheckpointError: unreadable.
            NumericalError: a weight is NaN or infinite; names the tensor.
        """
        layout, stem = self._place(layer)
        return layout.read(stem, expert, self._read)

    def output_name(self, name: str) -> str:
        """Name that a copied tensor gets: as it is, or the family's usual name in an unusual layout."""
        return _usual_name(name, self.architecture, self.layout)

    def dtypes(self, layers: Collection[int]) -> dict[str, str]:
        """Every dtype that experts of some layers have, as safetensors spells it, and the first tensor of it."""
        found: dict[str, str] = {}
        for layer in sorted(layers):
            for name in self.expected(layer):
                found.setdefault(self.reader.dtype(name), name)
        return dict(sorted(found.items()))

    def copied(self, layers: Collection[int]) -> dict[str, str]:
        """Every tensor that an output has besides its compressed layers: name there, and name here.

        Args:
            layers: to be compressed.
        Raises:
            CheckpointError: a name can't stand in the output.
        """
        replaced = {name for layer in layers for name in self.expected(layer)}
        found: dict[str, str] = {}
        for name in self.reader.names:
            if name in replaced:
                continue
            output = self.output_name(name)
            if output in found:
                raise CheckpointError(
                    f"{self.reader.path}: {found[output]!r} and {name!r} are both {output!r} in the "
                    "names of the family; remove one"
                )
            if is_resmoe_name(output):
                raise CheckpointError(
                    f"{self.reader.path}: {name!r} is named as compressed tensors are; restore or rename it"
                )
            found[output] = name
        return found | self.written_out()

    def written_out(self) -> dict[str, str]:
        """A tied output layer, where vLLM's class never ties: its name, and that of the embedding, which it equals."""
        names = self.reader.names
        tied = is_tied(self.reader.config, tied=self.architecture.tied) and not has_output(names)
        if not (tied and self.architecture.vllm and self.architecture.own_output):
            return {}
        embedding = next((name for name in names if is_embedding(name, self.located.root)), None)
        return {} if embedding is None else {OUTPUT_NAME: embedding}

    def need_copied(self, names: Iterable[str], compressed: Iterable[int]) -> None:
        """The next reads are of tensors that are copied.

        Args:
            names: of the tensors.
            compressed: layers; a weight file with their experts is not fetched for a few other tensors in it.
        Raises:
            CheckpointError: they can't be had.
        """
        experts = [name for layer in compressed for name in self.expected(layer)]
        self.reader.need(names, partly=self.reader.shards_of(experts))

    def as_they_lie(self, layers: Iterable[int]) -> list[int]:
        """Layers in the order of their weight files, if each of these should be needed but once; else ascending."""
        if not self.reader.store.streams:
            return sorted(layers)
        return sorted(layers, key=lambda layer: (self.reader.shards_of(self.expected(layer)), layer))

    def decoded(self) -> dict[str, int]:
        """How many tensors are decoded while they are read, by the form that they are quantised in."""
        return self.reader.decoded() if isinstance(self.reader, SourceReader) else {}

    def left_out(self) -> dict[str, str]:
        """Tensors and files that an output has no place for, and why."""
        return dict(self.reader.left_out) if isinstance(self.reader, SourceReader) else {}

    def remarks(self) -> list[str]:
        """What a user should know of this source before the work."""
        sizes, found = self.sizes, []
        if not self.architecture.known:
            found.append(
                f"model_type {self.architecture.model_type!r} is no family that this version was tested with; found "
                f"{sizes.num_experts} experts of {sizes.intermediate_size} x {sizes.hidden_size} in "
                f"{len(self.layers)} layers, named {self.names.expert}"
            )
        found += self.reader.remarks
        found += odd_tensors(self.reader, self.located.root, [self.layout.stem])
        if self.drafts:
            indices = ", ".join(map(str, self.drafts))
            found.append(
                f"for multi-token prediction: layer {indices}; its experts are compressed like the others, unless "
                "--layers leaves it out (--layers decoder)"
            )
        if self.other_drafts:
            found.append(
                f"{', '.join(self.other_drafts)}: experts for multi-token prediction, of other sizes than the "
                "decoder's; they stay as they are"
            )
        found += [f"{number} tensors are decoded from {form}" for form, number in self.decoded().items()]
        found += [
            f"{name} is written out, equal to {embedding}: config.json ties them, which vLLM's class of "
            f"{self.architecture.title} never does"
            for name, embedding in self.written_out().items()
        ]
        for why, number in Counter(self.left_out().values()).items():
            first = next(name for name, own in self.left_out().items() if own == why)
            found.append(f"left out: {first}{f' and {number - 1} more' if number > 1 else ''}: {why}")
        return found

    def _place(self, layer: int) -> tuple[ExpertLayout, str]:
        """How a layer's experts lie, and what their names begin with."""
        if layer in self.drafts:
            return self.drafts[layer].layout, self.drafts[layer].stem
        return self.layout, layer_stem(self.layout, self.located.root, self.names, layer)

    def _read(self, name: str, expert: int | None = None) -> Tensor:
        tensor = self.reader.get(name) if expert is None else self.reader.get_row(name, expert)
        if not all_finite(tensor):
            where = "" if expert is None else f", expert {expert},"
            raise NumericalError(f"{self.reader.path}: {name!r}{where} holds NaN or Inf; the checkpoint is damaged")
        return tensor


def _usual_name(name: str, architecture: MoEArchitecture, layout: ExpertLayout) -> str:
    if layout != architecture.layouts[0]:
        for pattern, replacement in architecture.renames:
            name = re.sub(pattern, replacement, name)
    return name


def open_source(reader: CheckpointReader, *, to_copy: bool = True) -> MoESource:
    """Find the family and the layout of a checkpoint; check that all experts are there. Reads no weight.

    Args:
        reader: the checkpoint.
        to_copy: what is beside the experts must be of a dtype that loaders take, too.
    Raises:
        UnsupportedArchitectureError: unknown family whose experts lie in no known way, or no experts.
        CheckpointError: an expert is missing or misshapen, or something else that every model has; or a weight holds
            no floating-point numbers.
    """
    architecture = find_architecture(reader.config, reader.names)
    names = set(reader.names)
    candidates = []
    for located in architecture.locate(names, reader.config):
        sizes = _sizes(reader, architecture, located)
        own = architecture.expert_names(reader.config, _usual_name(located.root, architecture, located.layout))
        candidates.append(MoESource(reader, architecture, sizes, own, located))
    if not candidates:
        raise UnsupportedArchitectureError(
            f"{reader.path}: no experts found in a layout that is known{expert_like(names)}; not an MoE checkpoint"
        )
    source = next((found for found in candidates if _fits(found)), candidates[0])
    stems = [layout.stem for layout in architecture.layouts]
    check_whole(reader, architecture, source.located.root, [*stems, source.layout.stem], source.layers)
    source = _with_drafts(source)
    for layer in source.layers:
        source.check(layer)
    if to_copy:
        _check_dtypes(reader)
        _check_fit(source)
    return source


def _check_dtypes(reader: CheckpointReader) -> None:
    """Weights are floating-point numbers once they are decoded; others would be refused in what is written."""
    headers = {name: StoredTensor(reader.dtype(name), reader.shape(name), 0, 0) for name in reader.names}
    if fault := dtype_fault(headers):
        raise CheckpointError(f"{reader.path}: {fault}")


def _check_fit(source: MoESource) -> None:
    """What is copied is what ``verify`` and the loaders of the output will ask for.

    Raises:
        CheckpointError: a tensor of another shape than config.json's model has, or a missing one.
    """
    reader = source.reader
    tensors = {
        output: PlainTensor(reader.dtype(name), reader.shape(name), f"{reader.shard_of(name)}: {name!r}")
        for output, name in source.copied(source.layers).items()
    }
    root = source.names.expert.removesuffix(source.architecture.expert)
    hidden, layers = source.sizes.hidden_size, frozenset(source.layers)
    check_fit(PlainPart(reader.path, reader.config, source.architecture, hidden, root, layers, tensors))


def _with_drafts(source: MoESource) -> MoESource:
    """The same with its multi-token-prediction layers."""
    reader = source.reader
    fitting: dict[int, DraftLayer] = {}
    others = []
    for layer, places in source.architecture.locate_drafts(reader.names, reader.config, source.located).items():
        sizes = [_sizes_at(reader, place) for place in places]
        # Layouts of the same names differ in what their shapes mean.
        fits = [place for place, own in zip(places, sizes, strict=True) if own == source.sizes]
        if fits:
            fitting[layer] = fits[0]
        else:
            others.append(places[0].stem.rstrip("."))
    drafts = {layer: place.expert for layer, place in fitting.items()}
    names = source.names.model_copy(update={"drafts": drafts or None})
    return replace(source, names=names, drafts=fitting, other_drafts=tuple(others))


def _sizes_at(reader: CheckpointReader, place: DraftLayer) -> MoESizes | None:
    shapes = {name.removeprefix(place.stem): reader.shape(name) for name in reader.names if name.startswith(place.stem)}
    return place.layout.sizes(shapes)


def _fits(source: MoESource) -> bool:
    """Whether the first layer's tensors have the shapes that a layout says."""
    expected = source.expected(source.layers[0])
    return all(name in source.reader and source.reader.shape(name) == shape for name, shape in expected.items())


def _sizes(reader: CheckpointReader, architecture: MoEArchitecture, located: Located) -> MoESizes:
    """E, H and I: config.json's, or of a family that is not known those of the tensors."""
    if architecture.known:
        return architecture.sizes(reader.config)
    stem = located.root + located.layout.stem.replace("{layer}", str(located.layers[0]))
    shapes = {name.removeprefix(stem): reader.shape(name) for name in reader.names if name.startswith(stem)}
    found = located.layout.sizes(shapes)
    if found is None:
        raise UnsupportedArchitectureError(
            f"{reader.path}: the experts' tensors don't say how large an expert is{expert_like(reader.names)}"
        )
    return found


def layer_stem(layout: ExpertLayout, root: str, names: ExpertNames, layer: int) -> str:
    """What the names of a layer's experts begin with.

    Args:
        layout: how the experts lie.
        root: what the decoder's names begin with.
        names: of the ResMoE checkpoint; they say what stands for the layer.
        layer: index.
    """
    return root + layout.stem.replace("{layer}", names.layers.get(layer, str(layer)))


def dense_tensors(
    architecture: MoEArchitecture, names: ExpertNames, layer: int, experts: Sequence[ExpertWeights]
) -> dict[str, Tensor]:
    """All experts of a layer as the family's usual checkpoint tensors; the inverse of reading them."""
    layout = architecture.layouts[0]
    draft = (names.drafts or {}).get(layer)
    if draft is None:
        stem = layer_stem(layout, names.expert.removesuffix(architecture.expert), names, layer)
    else:
        usual = re.escape(architecture.expert).replace(r"\{layer\}", r"(?P<layer>\d+)")
        match = re.fullmatch(rf"(?P<root>.*?){usual}", draft)
        if match is None:
            raise FormatError(
                f"names.drafts: layer {layer} is called {draft!r}, which does not end in {architecture.expert!r}, as a "
                f"{architecture.title} layer does"
            )
        stem = match["root"] + layout.stem.replace("{layer}", match["layer"])
    return layout.stored(stem, experts)
