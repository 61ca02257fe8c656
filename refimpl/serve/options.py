"""The flags of `refimpl serve`: one for each setting, made from the settings themselves."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from refimpl.server.sources import FIELDS, flag_of


def with_a_flag_for_each_setting(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose keyword arguments are its own, and one for each setting, None if not given.

    Values are passed on as they were written, for `sources` to check along with those of other
    sources, so that a mistake is told in the same words wherever it is.

    Args:
        command: takes its own arguments by keyword, and settings as `**flags`.
    """
    own = [
        parameter
        for parameter in inspect.signature(command).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    settings = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(name, info)
        )
        for name, info in FIELDS.items()
    ]
    command.__signature__ = inspect.Signature([*settings, *own])  # pyright: ignore[reportFunctionMemberAccess]
    return command


def _annotation(name: str, info: FieldInfo) -> Any:
    """The type of a flag, as Typer reads it."""
    flag, text, kind = flag_of(name), f"{info.description}{_default(info)}", _kind(info)
    if kind is bool:
        option = typer.Option(f"{flag}/--no-{flag[2:]}", help=text, show_default=False)
        return Annotated[bool | None, option]
    if get_origin(kind) is tuple:
        option = typer.Option(
            flag, help=f"{text} Give it again for further ones.", show_default=False
        )
        return Annotated[list[str] | None, option]
    names = [flag, "-m"] if name == "model" else [flag]
    option = typer.Option(*names, help=text, show_default=False, metavar=_metavar(kind))
    return Annotated[str | None, option]


def _kind(info: FieldInfo) -> Any:
    """The type without None and without limits."""
    kind = info.annotation
    kinds = [part for part in get_args(kind) if part is not type(None)]
    if type(None) in get_args(kind):
        [kind] = kinds
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    return {int: "INTEGER", float: "SECONDS", Path: "FILE"}.get(kind, "TEXT")


def _default(info: FieldInfo) -> str:
    if info.default in (None, (), False, True):
        return " On unless turned off." if info.default is True else ""
    value = f"{info.default:g}" if isinstance(info.default, float) else info.default
    return f" [default: {value}]"
