"""The kinds of layers of a `config.json`, and the rotary embedding of each, in and out.

Reads every spelling of the base and the stretching of wavelengths: one object for all layers, one
for each kind of layer (transformers 5), or the released `rope_theta`, `rope_local_base_freq` and
`rope_scaling`.
"""

from collections.abc import Mapping
from typing import Any

from refimpl.errors import ConfigError
from refimpl.model.config import periodic_kinds
from refimpl.model.layer_spec import AttentionKind, RopeSpec
from refimpl.model.value_kinds import NUMBER, TEXT, kind_faults

KINDS = {"sliding_attention": AttentionKind.LOCAL, "full_attention": AttentionKind.GLOBAL}
_NAMES = {kind: name for name, kind in KINDS.items()}


def layer_kinds(values: Mapping[str, Any]) -> tuple[AttentionKind, ...]:
    """Local or global for each layer, by name or by period.

    Raises:
        ConfigError: names that are not as many as layers, or of another kind.
    """
    num_layers, types = values["num_hidden_layers"], values.get("layer_types")
    if types is None:
        period = values.get("_sliding_window_pattern", values["sliding_window_pattern"])
        return periodic_kinds(num_layers, period=period)
    strange = sorted(set(types) - set(KINDS))
    if strange or len(types) != num_layers:
        raise ConfigError(
            f"layer_types must be {num_layers} of {', '.join(KINDS)}, got {len(types)}"
            + (f" with {', '.join(strange)}" if strange else "")
        )
    return tuple(KINDS[name] for name in types)


def layer_types(kinds: tuple[AttentionKind, ...]) -> list[str]:
    """Hugging Face's name of each layer's kind."""
    return [_NAMES[kind] for kind in kinds]


def one_rope(values: Mapping[str, Any]) -> RopeSpec:
    """The rotary embedding of all layers."""
    parameters, scaling = _spellings(values)
    return _rope(parameters or scaling or {}, values["rope_theta"])


def two_ropes(values: Mapping[str, Any]) -> tuple[RopeSpec, RopeSpec]:
    """Rotary embedding of local and of global layers, in any spelling."""
    parameters, scaling = _spellings(values)
    theta, local_theta = values["rope_theta"], values["rope_local_base_freq"]
    if parameters is None:
        # Interpolation stretches global layers only; local ones never see that far.
        return _rope({}, local_theta), _rope(scaling or {}, theta)
    _check_kinds(parameters)
    return (
        _rope(parameters.get("sliding_attention") or {}, local_theta),
        _rope(parameters.get("full_attention") or {}, theta),
    )


def two_stated_ropes(
    values: Mapping[str, Any], *, default: tuple[RopeSpec, RopeSpec]
) -> tuple[RopeSpec, RopeSpec]:
    """The same where transformers fills nothing in: both objects are there in full, or neither."""
    parameters = values.get("rope_parameters")
    if parameters is None:
        return default
    _check_kinds(parameters)
    local, everywhere = (_rope(parameters.get(name) or {}, None) for name in KINDS)
    return local, everywhere


def rope_object(rope: RopeSpec) -> dict[str, Any]:
    """One rotary embedding as transformers 5 spells it."""
    written: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.factor != 1.0:
        written |= {"rope_type": "linear", "factor": rope.factor}
    if rope.proportion != 1.0:
        written |= {"rope_type": "proportional", "partial_rotary_factor": rope.proportion}
    return written


def rope_objects(local: RopeSpec, everywhere: RopeSpec) -> dict[str, Any]:
    """Those of local and of global layers."""
    return {"sliding_attention": rope_object(local), "full_attention": rope_object(everywhere)}


def _spellings(values: Mapping[str, Any]) -> tuple[Any, Any]:
    parameters, scaling = values.get("rope_parameters"), values.get("rope_scaling")
    if parameters is not None and scaling is not None:
        raise ConfigError(
            "rope_parameters and rope_scaling are two spellings of one thing, got both; remove one"
        )
    return parameters, scaling


def _check_kinds(parameters: Mapping[str, Any]) -> None:
    if not set(parameters) <= set(KINDS):
        raise ConfigError(
            f"rope_parameters must hold {' and '.join(KINDS)} and nothing else, "
            f"got {dict(parameters)!r:.200}"
        )


# What an object of each type may hold beside its type and its base; True is for what it must.
_TYPES = {
    "default": {},
    "linear": {"factor": True},
    "proportional": {"factor": False, "partial_rotary_factor": False},
}
_KINDS_OF_VALUES = {
    "rope_type": TEXT,
    "type": TEXT,
    "rope_theta": NUMBER,
    "factor": NUMBER,
    "partial_rotary_factor": NUMBER,
}


def _rope(parameters: Any, theta: int | float | None) -> RopeSpec:
    """One rotary embedding, from an object with the base or, where that is absent, `theta`."""
    if not isinstance(parameters, Mapping) or kind_faults(parameters, _KINDS_OF_VALUES):
        raise ConfigError(
            f"rope parameters must be an object of texts and numbers: {parameters!r:.200}"
        )
    given = {key: value for key, value in parameters.items() if value is not None}
    if given.get("partial_rotary_factor") == 1:
        # All of it, which every type does without being told.
        del given["partial_rotary_factor"]
    types = {given[key] for key in ("rope_type", "type") if key in given} or {"default"}
    further = _TYPES.get(min(types)) if len(types) == 1 else None
    base = given.get("rope_theta", theta)
    if (
        further is None
        or base is None
        or not set(given) <= {"rope_type", "type", "rope_theta", *further}
        or not all(key in given for key, is_needed in further.items() if is_needed)
    ):
        raise ConfigError(
            "rope parameters must be of rope_type default with rope_theta, linear with factor too, "
            "or proportional with partial_rotary_factor too, got "
            f"{dict(parameters)!r:.200}"
        )
    return RopeSpec(
        theta=float(base),
        factor=float(given.get("factor", 1.0)),
        proportion=float(given.get("partial_rotary_factor", 1.0)),
    )
