"""A plan as a YAML file: written with what was predicted beside each layer, edited by people, read back strictly.

```yaml
version: 1
request: '0123456789abcdef'  # by the planner; may be left out
center: barycenter          # these four: how the centers are found
max_iterations: 25
tolerance: 0.0001
seed: 0
layers:
  0:  # error 0.0147, 154 kB of 786 kB (0.196)
    center:
    - {method: quantized, projections: [gate_proj, up_proj, down_proj], bits: 8, group_size: 128}
    residual:
    - {method: quantized, projections: [gate_proj, up_proj, down_proj], bits: 2, group_size: 128}
  1: dense
```

``rest_bits: 8``, which may be left out, stores all but the experts in codes by row.

The words are those of ``quantization_config`` (format/SPEC.md, section 2): ``center``, and ``residual`` or ``groups``.
``dense`` leaves a layer as it is; every MoE layer is listed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from compress_tools.config import CompressionConfig, RestBits, make_config
from compress_tools.errors import ConfigError
from compress_tools.format.schema import LayerSpec
from compress_tools.planner.config import CENTER_FIELDS, center_recipe
from compress_tools.planner.planned import Planned
from compress_tools.source.moe_source import MoESource
from compress_tools.text_file import read_text

DENSE = "dense"
PLAN_VERSION = 1
_REQUIRED = ("version", *CENTER_FIELDS, "layers")
REST_BITS = "rest_bits"
_KNOWN = (*_REQUIRED, "request", REST_BITS)


@dataclass(frozen=True)
class PlanFile:
    """A plan as read.

    Attributes:
        text: the file's.
        where: its name, for errors.
        recipe: how centers are found: the fields of ``CENTER_FIELDS``.
        specs: by decoder layer index; None leaves a layer as it is.
        request: digest of source and request that the plan was found for; None where the plan does not say.
        found: what the planner predicted, where it has just made the plan.
        rest_bits: bits of all but the experts.
    """

    text: str
    where: str
    recipe: dict[str, Any]
    specs: dict[int, LayerSpec | None]
    request: str | None = None
    found: Planned | None = None
    rest_bits: RestBits = 16

    def config(self, device: str, workers: int) -> CompressionConfig:
        """How centers are found, on this machine."""
        return make_config(**self.recipe, rest_bits=self.rest_bits, device=device, workers=workers)

    def compressed(self, source: MoESource) -> dict[int, LayerSpec]:
        """The layers to be compressed.

        Raises:
            ConfigError: the plan lists other layers than the model has, or compresses none.
        """
        if missing := sorted(set(source.layers) - set(self.specs)):
            raise ConfigError(
                f"{self.where}: layers: {missing} are not listed; write `{missing[0]}: {DENSE}` to leave one"
            )
        if unknown := sorted(set(self.specs) - set(source.layers)):
            raise ConfigError(f"{self.where}: layers: {unknown} have no experts; MoE layers are {list(source.layers)}")
        chosen = {layer: spec for layer, spec in self.specs.items() if spec is not None}
        if not chosen:
            raise ConfigError(f"{self.where}: every layer is {DENSE}: nothing to compress")
        return chosen

    def resolved(self) -> dict[str, Any]:
        """As JSON values."""
        layers = {str(index): DENSE if spec is None else spec_content(spec) for index, spec in self.specs.items()}
        rest = {} if self.rest_bits == 16 else {REST_BITS: self.rest_bits}
        return {**self.recipe, **rest, "layers": layers}


def read_plan(path: str | Path) -> PlanFile:
    """Read a plan file.

    Raises:
        ConfigError: not there, or not a plan; names the line and the key.
    """
    return parse_plan(read_text(path, ConfigError, f"--plan {path}"), str(path))


def parse_plan(text: str, where: str) -> PlanFile:
    """Validate a plan.

    Args:
        text: YAML.
        where: named in errors.
    Raises:
        ConfigError: names the line and the key.
    """
    try:
        return _Parser(text, where).plan()
    except yaml.reader.ReaderError as err:
        line = text.count("\n", 0, err.position) + 1
        raise ConfigError(f"{where}: line {line}: not YAML: a character that no text has") from err
    except RecursionError as err:
        raise ConfigError(f"{where}: not a plan: nested too deeply, or within itself") from err


class _Parser:
    """One reading of one file: values, and the line that each key stands on."""

    def __init__(self, text: str, where: str) -> None:
        self._text, self._where = text, where
        self._lines: dict[tuple[Any, ...], int] = {}
        self._loader = yaml.SafeLoader(text)

    def plan(self) -> PlanFile:
        """See ``parse_plan``."""
        content = self._content()
        if not isinstance(content, dict):
            raise self._error((), "expected a mapping with version and layers")
        for key in content:
            if key not in _KNOWN:
                raise self._error((key,), f"unknown key; expected {', '.join(_REQUIRED)}")
        for key in _REQUIRED:
            if key not in content:
                raise self._error((), f"{key} is missing")
        if content["version"] != PLAN_VERSION:
            raise self._error(("version",), f"found {content['version']!r}, this version reads {PLAN_VERSION}")
        recipe = {key: content[key] for key in (*CENTER_FIELDS, *({REST_BITS} & set(content)))}
        for key, value in recipe.items():
            try:
                make_config(**{key: value})
            except ConfigError as err:
                raise self._error((key,), str(err).partition(": ")[2]) from err
        layers = content["layers"]
        if not isinstance(layers, dict) or not layers:
            raise self._error(("layers",), "expected layer indices, each with a center and a residual")
        config = make_config(**recipe)
        specs = {index: self._spec(index, layers[index]) for index in layers}
        request = content.get("request")
        return PlanFile(
            self._text,
            self._where,
            center_recipe(config),
            specs,
            None if request is None else str(request),
            rest_bits=config.rest_bits,
        )

    def _content(self) -> Any:
        try:
            node = self._loader.get_single_node()
            return None if node is None else self._value(node, ())
        except yaml.MarkedYAMLError as err:
            line = err.problem_mark.line + 1 if err.problem_mark else 1
            raise ConfigError(f"{self._where}: line {line}: not YAML: {err.problem}") from err

    def _value(self, node: yaml.Node, path: tuple[Any, ...]) -> Any:
        self._lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, (*path, number)) for number, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return self._scalar(node, path)
        values: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._error(path, "a key is not a word or a number")
            key = self._scalar(key_node, path)
            self._lines[*path, key] = key_node.start_mark.line + 1
            if key in values:
                raise self._error((*path, key), "given twice")
            values[key] = self._value(value_node, (*path, key))
        return values

    def _scalar(self, node: yaml.Node, path: tuple[Any, ...]) -> Any:
        try:
            return self._loader.construct_object(node)
        # What PyYAML's constructors raise for a scalar that is not of its tag's kind: no date, no number.
        except (ValueError, AttributeError, TypeError, KeyError) as err:
            raise self._error(path, f"not understood: {_short(node.value)}") from err

    def _spec(self, index: Any, value: Any) -> LayerSpec | None:
        path = ("layers", index)
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise self._error(path, "expected a layer index")
        if value == DENSE:
            return None
        if not isinstance(value, dict):
            raise self._error(path, f"expected center and residual, or {DENSE}; found {value!r}")
        try:
            return LayerSpec.model_validate({"center": [], **value})
        except ValidationError as err:
            first = err.errors()[0]
            raise self._error((*path, *first["loc"]), f"{first['msg']}, found {_short(first['input'])}") from err

    def _error(self, path: tuple[Any, ...], message: str) -> ConfigError:
        known: tuple[Any, ...] = ()
        for step in path:
            # pydantic puts the method of a part into the path too, which is no key
            if (*known, step) in self._lines:
                known = (*known, step)
        key = ".".join(map(str, path))
        return ConfigError(f"{self._where}: line {self._lines.get(known, 1)}: {key + ': ' if key else ''}{message}")


def spec_content(spec: LayerSpec) -> dict[str, Any]:
    """A layer as JSON values, without what it does not have."""
    content = spec.model_dump(mode="json")
    return {key: value for key, value in content.items() if key == "center" or value}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
