"""The models that have names, as a list, as JSON, and as the table of the README."""

import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from refimpl.model.config import GemmaConfig, periodic_kinds
from refimpl.model.layer_spec import AttentionKind
from refimpl.model.registry import DEFAULT, REGISTRY
from refimpl.model.variants import VARIANTS

_OWNER = "google/"


def rows() -> list[dict[str, Any]]:
    """One object for each name of the Hub."""
    return [
        {
            "id": entry.id,
            "tags": list(entry.tags),
            "parameters": entry.config.parameter_count,
            "context": entry.config.context_length,
            "origin": entry.origin,
            "is_local": entry.is_local(),
            "is_default": entry is DEFAULT,
        }
        for entry in REGISTRY
    ]


def print_rows() -> None:
    """The list for people."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading, justify in (
        ("id", "left"), ("tags", "left"), ("parameters", "right"), ("context", "right"),
        ("from", "left"), ("here", "left"),
    ):  # fmt: skip
        table.add_column(heading, justify=justify, overflow="fold")  # pyright: ignore[reportArgumentType]
    for row in rows():
        table.add_row(
            row["id"] + (" (default)" if row["is_default"] else ""),
            ", ".join(row["tags"]),
            short_count(row["parameters"]),
            f"{row['context']:,}",
            row["origin"],
            "yes" if row["is_local"] else "no",
        )
    # A file or pipe has no width; a table folded to 80 columns there would be of no use to grep.
    Console(width=None if sys.stdout.isatty() else 140, highlight=False).print(table)


def short_count(count: int) -> str:
    """Parameters in millions, or in billions from the first one on.

    >>> short_count(268_098_176), short_count(999_885_952), short_count(30_697_345_340)
    ('268M', '1.0B', '30.7B')
    """
    millions = round(count / 1e6)
    return f"{count / 1e9:.1f}B" if millions >= 1000 else f"{millions}M"


def markdown() -> str:
    """The tables of architectures in Markdown: what families have in common, and every size.

    Each begins with Gemma 1's parts and says what there is beside them.
    """
    families = dict[str, list[GemmaConfig]]()
    for config in VARIANTS.values():
        families.setdefault(_family(config), []).append(config)
    common = {
        family: [part for part in _further(configs[0]) if all(part in _further(c) for c in configs)]
        for family, configs in families.items()
    }
    sizes = [
        (
            name,
            f"{config.parameter_count:,}",
            f"{config.context_length:,}",
            _layers(config),
            _heads(config),
            "; ".join(part for part in _further(config) if part not in common[_family(config)]),
            "<br>".join(_names(name)),
        )
        for name, config in VARIANTS.items()
    ]
    headings = ("architecture", "parameters", "context", "layers", "heads", "beside", "names")
    return "\n".join(
        [
            *_table(
                ("family", "beside Gemma 1's parts"),
                "ll",
                [(family, "; ".join(parts) or "nothing") for family, parts in common.items()],
            ),
            "",
            *_table(headings, "lrrllll", sizes),
        ]
    )


def _table(headings: tuple[str, ...], sides: str, lines: list[tuple[str, ...]]) -> Iterator[str]:
    """A table whose columns are aligned left or right, as the letters of `sides` say."""
    rule = ("---:" if side == "r" else "---" for side in sides)
    for line in (headings, rule, *lines):
        yield f"| {' | '.join(line)} |"


def _family(config: GemmaConfig) -> str:
    """Its Hugging Face type without what is said of the text decoder or the encoders beside it."""
    return config.family.removesuffix("_text").removesuffix("_unified")


def _names(variant: str) -> Iterator[str]:
    for entry in REGISTRY:
        if entry.variant == variant:
            yield " ".join(f"`{name}`" for name in (entry.id.removeprefix(_OWNER), *entry.tags))


def _layers(config: GemmaConfig) -> str:
    """How many of which kind, and in which order."""
    count, kinds = config.num_layers, config.layer_kinds
    if AttentionKind.LOCAL not in kinds:
        return f"{count}, all global"
    period = next(
        (p for p in range(2, count + 1) if kinds == periodic_kinds(count, period=p)), None
    )
    num_local = sum(kind is AttentionKind.LOCAL for kind in kinds)
    order = (
        f"{num_local} local, {count - num_local} global"
        if period is None
        else f"{period - 1} local to 1 global"
    )
    return f"{count}, {order}, window {config.window:,}"


def _heads(config: GemmaConfig) -> str:
    """Query heads / key and value heads x width, and of global layers where those differ."""
    found = dict[str, str]()
    for spec in config.layers:
        text = f"{config.num_heads}/{spec.num_kv_heads} x {spec.head_width}"
        found.setdefault(spec.kind.value, text)
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    return ", ".join(f"{kind} {text}" for kind, text in found.items())


def _further(config: GemmaConfig) -> Iterator[str]:
    """What an architecture has beside Gemma 1's parts."""
    normed = ["queries", "keys"] * config.has_query_key_norm + ["values"] * config.has_value_norm
    if config.has_post_norms:
        yield "norms after each part"
    if normed:
        yield f"normalised {', '.join(normed[:-1])} and {normed[-1]}"
    yield from _attention(config)
    if config.final_cap is not None:
        yield f"logits capped at {config.final_cap:g}"
    if config.has_layer_scalar:
        yield "a factor for each layer"
    if config.per_layer_input is not None:
        yield f"inputs of width {config.per_layer_input.width} for each layer"
    yield from _branches(config)


def _attention(config: GemmaConfig) -> Iterator[str]:
    if config.query_scalar == 1:
        yield "scores not scaled"
    elif config.query_scalar != config.head_width:
        yield f"scores divided by the root of {config.query_scalar:g}, not of the head width"
    if config.attention_cap is not None:
        yield f"scores capped at {config.attention_cap:g}"
    rope = config.global_rope
    if rope.theta != config.local_rope.theta:
        yield f"rope theta {config.local_rope.theta:,.0f}, of global layers {rope.theta:,.0f}"
    if rope.factor != 1:
        yield f"global layers divide positions by {rope.factor:g}"
    if rope.proportion != 1:
        yield f"global layers turn {rope.proportion:.0%} of a head's pairs"
    if config.values_are_keys:
        yield "global layers take raw keys for values"
    if config.num_sharing_layers:
        yield f"the last {config.num_sharing_layers} layers read keys and values of earlier ones"


def _branches(config: GemmaConfig) -> Iterator[str]:
    """What the feed-forward and the stream are made of."""
    widths = {spec.feed_forward_width for spec in config.layers}
    if len(widths) > 1:
        yield f"feed-forward widths {' and '.join(f'{width:,}' for width in sorted(widths))}"
    if config.experts is not None:
        yield (
            f"{config.experts.count} experts beside the dense feed-forward, "
            f"{config.experts.chosen} for each token"
        )
    sparse = [cutoff for cutoff in config.gate_cutoffs or () if cutoff is not None]
    if sparse:
        yield f"sparse gates in {len(sparse)} layers"
    if config.altup is not None:
        yield f"{config.altup.streams} alternating streams (AltUp)"
    if config.laurel_rank is not None:
        yield f"a learned residual of rank {config.laurel_rank} (LAuReL)"
