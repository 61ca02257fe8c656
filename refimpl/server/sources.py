"""Where settings come from: flags before environment before one TOML file before defaults.

A variable is called after its setting, as REFIMPL_MAX_QUEUE after max_queue, but for one: what
REFIMPL_API_KEYS holds are keys themselves (see `keys`), so the file of keys is named by
REFIMPL_API_KEYS_FILE. A list is spelt with commas in a variable, and as an array in the file.
"""

import difflib
import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from refimpl.errors import InvalidRequestError
from refimpl.server.settings import ServerSettings

PREFIX = "REFIMPL_"
CONFIG_VARIABLE = "REFIMPL_CONFIG"
KEYS_VARIABLE = "REFIMPL_API_KEYS"
DEFAULT = "default"

FIELDS = ServerSettings.model_fields
VARIABLES = {
    name: f"{PREFIX}{name.upper()}" + ("_FILE" if name == "api_keys" else "") for name in FIELDS
}
# Of this project, but none of the server's.
_OTHER_VARIABLES = {CONFIG_VARIABLE, KEYS_VARIABLE, "REFIMPL_CACHE_DIR", "REFIMPL_TEST_COMPILED"}


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """Settings, and where each comes from.

    Attributes:
        settings: the values.
        origins: by the setting's name: the flag, the variable or the file that it comes from, or
            "default".
        strangers: variables that begin as ours do, and are none.
    """

    settings: ServerSettings
    origins: Mapping[str, str]
    strangers: tuple[str, ...] = ()

    def to_toml(self) -> str:
        """The settings as a configuration file; comments say where each comes from."""
        lines = [
            f"{_assignment(name, getattr(self.settings, name))}  # {self.origins[name]}"
            for name in FIELDS
        ]
        return "\n".join(lines)


def resolve(
    flags: Mapping[str, object], *, environment: Mapping[str, str], config: Path | None = None
) -> Resolved:
    """Put the settings together.

    Args:
        flags: by the setting's name; only those that were given.
        environment: variables; an empty one counts as none.
        config: the file, before the one that REFIMPL_CONFIG names.

    Raises:
        InvalidRequestError: a file that cannot be read, a key that is no setting, or a value that
            the setting cannot take; the message names the flag, the variable or the key.
    """
    path = config
    if path is None and environment.get(CONFIG_VARIABLE):
        path = Path(environment[CONFIG_VARIABLE])
    values, origins = dict[str, object](), dict.fromkeys(FIELDS, DEFAULT)

    def take(partial: ServerSettings, label: Callable[[str], str]) -> None:
        for name in partial.model_fields_set:
            values[name], origins[name] = getattr(partial, name), label(name)

    if path is not None:
        take(_from_file(path), lambda _: str(path))
    take(_from_environment(environment), lambda name: VARIABLES[name])
    take(_validated(lambda: ServerSettings.model_validate(dict(flags)), flag_of), flag_of)
    known = {*VARIABLES.values(), *_OTHER_VARIABLES}
    return Resolved(
        settings=ServerSettings.model_validate(values),
        origins=origins,
        strangers=tuple(
            sorted(name for name in environment if name.startswith(PREFIX) and name not in known)
        ),
    )


def flag_of(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-")


def _from_environment(environment: Mapping[str, str]) -> ServerSettings:
    given = {name: environment[key] for name, key in VARIABLES.items() if environment.get(key)}
    values = {
        name: [part.strip() for part in text.split(",")] if _is_list(name) else text
        for name, text in given.items()
    }
    return _validated(lambda: ServerSettings.model_validate(values), lambda name: VARIABLES[name])


def _from_file(path: Path) -> ServerSettings:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequestError(f"cannot read {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"{path} is not TOML: {error}") from error
    # Strict, because TOML has types of its own, so that "8" or true for 8 is a mistake. As JSON,
    # because an array is as near to a tuple there as can be, and text to a path.
    spelt = json.dumps(table, default=str)
    return _validated(
        lambda: ServerSettings.model_validate_json(spelt, strict=True),
        lambda name: f"{path}: {name}",
    )


def _validated(
    validate: Callable[[], ServerSettings], label: Callable[[str], str]
) -> ServerSettings:
    try:
        return validate()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            close = difflib.get_close_matches(name, FIELDS, n=1)
            hint = f"did you mean {close[0]}?" if close else "see `refimpl serve --show-config`"
            raise InvalidRequestError(
                f"{label(name)}: there is no such setting; {hint}", parameter=name
            ) from error
        reason = first["msg"][:1].lower() + first["msg"][1:]
        raise InvalidRequestError(
            f"{label(name)}: {reason}, got {first['input']!r:.200}", parameter=name
        ) from error


def _is_list(name: str) -> bool:
    return isinstance(FIELDS[name].default, tuple)


def _assignment(name: str, value: object) -> str:
    if value is None:
        return f"# {name} ="
    # A basic string of TOML escapes as JSON does, but for one more character.
    spelt = json.dumps(value, ensure_ascii=False, default=str).replace("\x7f", "\\u007f")
    return f"{name} = {spelt}"
