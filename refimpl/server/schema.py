"""What the schemas of requests share: strict types, `null` for "left out", and their refusals.

Owns how a value that breaks a schema is reported: the first fault alone, in the words of OpenAI's
endpoint, and never more than a little of the value.
"""

import reprlib
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from refimpl.server.errors import Problem, refusal


def _whole(value: object) -> object:
    """A float without a fraction is as good as an integer; JSON knows one kind of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, Field(allow_inf_nan=False)]
# In lists of ids a float is more likely a mistake than an integer.
TokenId = Annotated[int, Field(ge=0)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]

# The words of JSON, by the kinds of fault that pydantic knows.
_TYPES = {
    "int_type": "integer",
    "float_type": "number",
    "bool_type": "boolean",
    "string_type": "string",
    "dict_type": "object",
    "model_type": "object",
    "list_type": "array",
}


class Fields(BaseModel):
    """An object of JSON. A bool is no integer, a string no number, and `null` is left out."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: object) -> object:
        if not isinstance(data, Mapping):
            return data
        # A field that nobody knows stays, null or not, to be refused by name.
        known = cls.model_fields
        return {
            name: value for name, value in data.items() if value is not None or name not in known
        }


def parse[T: Fields](schema: type[T], data: object) -> T:
    """Read an object.

    Raises:
        Problem: 400, naming the first field that is at fault.
    """
    if not isinstance(data, dict):
        raise refusal(f"the body must be a JSON object, got {brief(data)}", None)
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise _problem(error, data) from None


def brief(value: object) -> str:
    """A value for a message: short, whatever its size."""
    if isinstance(value, int) and value.bit_length() > 64:
        # Python refuses to spell the largest integers.
        return f"an integer of {value.bit_length()} bits"
    return _BRIEF.repr(value)


class _Brief(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__(maxlevel=2, maxlist=3, maxdict=3, maxstring=60, maxother=60)

    def repr_int(self, x: int, level: int) -> str:
        return brief(x) if x.bit_length() > 64 else repr(x)


_BRIEF = _Brief()


def _problem(error: ValidationError, data: Mapping[str, Any]) -> Problem:
    faults = error.errors(include_url=False, include_context=True)
    # In a union each way to read the value has a fault. A bound that is broken says the most: the
    # value was of the right type there.
    fault = min(faults, key=lambda each: each["type"] in _TYPES)
    field = str(fault["loc"][0]) if fault["loc"] else None
    kind, limits = fault["type"], fault.get("ctx", {})
    value = brief(fault.get("input"))
    match kind:
        case "missing":
            message = f"you must provide a {field} parameter"
        case "extra_forbidden":
            name = str(fault["loc"][-1])
            message = f"Unrecognized request argument supplied: {name:.200}"
        case "greater_than_equal":
            message = f"{value} is less than the minimum of {_plain(limits['ge'])} - '{field}'"
        case "greater_than":
            message = f"{value} is not greater than {_plain(limits['gt'])} - '{field}'"
        case "less_than_equal":
            message = f"{value} is greater than the maximum of {_plain(limits['le'])} - '{field}'"
        case "value_error":
            message = str(limits["error"])
        case "too_short" | "string_too_short":
            message = f"{value} is too short - '{field}'"
        case _ if _is_union(faults, field):
            message = f"{brief(data[field or ''])} is not valid under any of the forms of '{field}'"
        case _ if kind in _TYPES:
            message = f"{value} is not of type '{_TYPES[kind]}' - '{field}'"
        case _:
            message = f"{value} is not one of the values that are allowed - '{field}'"
    return refusal(message, field)


def _is_union(faults: list[Any], field: str | None) -> bool:
    return sum(fault["loc"][:1] == (field,) for fault in faults) > 1


def _plain(limit: int | float) -> int | float:
    """A limit as somebody would write it: 2, not 2.0."""
    return int(limit) if limit == int(limit) else limit
