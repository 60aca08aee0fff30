"""A command's options, derived from the fields of the configs that check them."""

from collections.abc import Callable, Sequence
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import click

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo


class ConfigCommand(click.Command):
    """A command with one option for each field of some configs, after its arguments.

    The options are made once the command is used: `resmoe --help` needs none of them, nor the configs' imports.

    Args:
        configs: imports the configs.
    """

    def __init__(self, *args: Any, configs: "Callable[[], Sequence[type[BaseModel]]]", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._configs: Callable[[], Sequence[type[BaseModel]]] | None = configs

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """All parameters, those of the configs included."""
        if self._configs is not None:
            arguments = [param for param in self.params if isinstance(param, click.Argument)]
            others = [param for param in self.params if not isinstance(param, click.Argument)]
            self.params = [*arguments, *config_options(*self._configs()), *others]
            self._configs = None
        return super().get_params(ctx)


def config_options(*configs: "type[BaseModel]") -> list[click.Option]:
    """One option for each field: type, choices, help and default are the field's; ranges are the config's to check.

    An option that is not given has no value (None, or an empty tuple), and the config's default holds. A default that
    depends on something is told by the field's description.
    """
    fields = {name: field for config in configs for name, field in config.model_fields.items()}
    return [_option(name, field) for name, field in fields.items()]


def _option(name: str, field: "FieldInfo") -> click.Option:
    kind = _plain(field.annotation)
    shown = isinstance(field.default, str | int | float) and kind is not bool
    flag = "--" + name.replace("_", "-")
    if kind is bool and field.default is None:
        # Neither: what runs decides.
        flag += "/--no-" + name.replace("_", "-")
    return click.Option(
        [flag, name],
        type=click.Choice(get_args(kind)) if get_origin(kind) is Literal else kind,
        is_flag=True if kind is bool else None,
        multiple=get_origin(field.annotation) is tuple,
        default=None,
        help=f"{field.description}  [default: {field.default}]" if shown else field.description,
    )


def _plain(annotation: Any) -> Any:
    """``X`` of ``X | None``, ``tuple[X, ...]`` and ``Annotated[X, ...]``."""
    while get_origin(annotation) in (Union, UnionType, tuple, Annotated):
        annotation = get_args(annotation)[0]
    return annotation
