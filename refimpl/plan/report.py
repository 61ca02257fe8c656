"""A plan as tables for people and as one JSON object for programs."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rich.table import Table

from refimpl.model.sharding import Divided, bytes_of_a_device, bytes_of_one_copy
from refimpl.plan.fit import Need, Plan
from refimpl.plan.remedies import remedies
from refimpl.plan.sizes import show_size

# Slots whose largest contexts are listed.
_SLOTS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a plan says of one number of slots and one context, and what else would fit.

    Attributes:
        name: of the model.
        plan: the model on its devices.
        slots, context: what was asked for.
    """

    name: str
    plan: Plan
    slots: int
    context: int

    @cached_property
    def need(self) -> Need:
        return self.plan.need(slots=self.slots, context=self.context)

    @property
    def free(self) -> int:
        """Bytes of each device that are left; below 0, what is missing."""
        return self.plan.memory - self.need.total

    @cached_property
    def contexts(self) -> dict[int, int]:
        """The largest context of some numbers of slots, as far as there is one."""
        found = {slots: self.plan.largest_context(slots=slots) for slots in _SLOTS}
        return {slots: context for slots, context in found.items() if context}

    @cached_property
    def slots_at_full_context(self) -> int:
        return self.plan.most_slots(context=self.plan.config.context_length)

    @cached_property
    def weights(self) -> dict[str, tuple[int, int]]:
        """Bytes on each device, and of one copy, by what weights are for."""
        groups = dict[str, list[Divided]]()
        for parameter in self.plan.parameters:
            groups.setdefault(_group(parameter), []).append(parameter)
        arrays = {name: [each.arrays for each in members] for name, members in groups.items()}
        return {
            name: (bytes_of_a_device(of_group), bytes_of_one_copy(of_group))
            for name, of_group in arrays.items()
        }

    @cached_property
    def copies(self) -> list[str]:
        """What several devices hold alike, because all of them together do not divide it."""
        devices = self.plan.devices
        counted = Counter(
            (_label(parameter), parameter.count, parameter.unit, parameter.shares)
            for parameter in self.plan.parameters
            if parameter.unit and parameter.shares < devices
        )
        return [
            f"{label} of {_counted(count, unit)} is {_counted(shares, 'shares')}, "
            f"each on {devices // shares} devices" + (f" ({n} layers)" if n > 1 else "")
            for (label, count, unit, shares), n in counted.items()
        ]

    @cached_property
    def remedies(self) -> list[str]:
        """Options with which it would fit; none if it does."""
        if self.free >= 0:
            return []
        return remedies(self.plan, slots=self.slots, context=self.context)

    @property
    def title(self) -> str:
        """What was planned."""
        plan, slots = self.plan, "1 slot" if self.slots == 1 else f"{self.slots} slots"
        return (
            f"{self.name}: {plan.config.parameter_count:,} parameters as {plan.storage.name}, "
            f"numerics {plan.numerics.name}, {slots} of {self.context:,} tokens"
        )

    def summary(self) -> list[str]:
        """What the tables come to, in sentences."""
        plan, own = self.plan, self.plan.config.context_length
        lines = list[str]()
        if self.free < 0:
            lines.append(
                f"does not fit: each device lacks {show_size(-self.free)}; "
                + (
                    f"try {', or '.join(self.remedies)}"
                    if self.remedies
                    else "no single option is enough: change several"
                )
            )
        longest = self.contexts.get(1, 0)
        full = " (the model's own)" if longest == own else ""
        lines += [
            f"largest context with 1 slot: {longest:,}{full}",
            f"most slots with the full context of {own:,}: {self.slots_at_full_context:,}",
        ]
        if self.copies:
            lines.append(f"{plan.devices} devices do not divide all: {'; '.join(self.copies)}")
        return lines


def to_json(report: Report) -> dict[str, Any]:
    """The plan as one JSON object; bytes are those of each device unless they say otherwise."""
    plan, need = report.plan, report.need
    return {
        "model": report.name,
        "parameters": plan.config.parameter_count,
        "devices": plan.devices,
        "memory": plan.memory,
        "dtype": plan.storage.name,
        "numerics": plan.numerics.name,
        "slots": report.slots,
        "context": report.context,
        "bytes_of_each_device": {
            "weights": need.weights,
            "weights_by_part": {name: held for name, (held, _) in report.weights.items()},
            "caches": sum(need.caches.values()),
            "caches_by_kind": {kind.value: held for kind, held in need.caches.items()},
            "slots": need.rows,
            "prefix_cache": need.prefix,
            "working": need.working.total,
            "margin": need.margin,
            "total": need.total,
            "free": report.free,
        },
        "weights_of_one_copy": sum(whole for _, whole in report.weights.values()),
        "fits": report.free >= 0,
        "remedies": report.remedies,
        "copies": report.copies,
        "largest_context_by_slots": {str(n): context for n, context in report.contexts.items()},
        "slots_at_full_context": report.slots_at_full_context,
    }


def bytes_table(report: Report) -> Table:
    """What each device holds, and what all hold together."""
    plan, need = report.plan, report.need
    times = "1 device" if plan.devices == 1 else f"each of {plan.devices} devices"
    table = _plain()
    for heading in ("", times, *(["all together"] * (plan.devices > 1))):
        table.add_column(heading, justify="right" if heading else "left")

    def add(label: str, held: int, *, style: str = "") -> None:
        cells = [show_size(held), *([show_size(held * plan.devices)] * (plan.devices > 1))]
        table.add_row(label, *cells, style=style)

    add("weights", need.weights, style="bold")
    for name, (held, _) in report.weights.items():
        add(f"  {name}", held)
    add("caches", sum(need.caches.values()), style="bold")
    for kind, held in need.caches.items():
        add(f"  {kind.value} layers", held)
    add("what slots keep of the vocabulary", need.rows)
    add("prefix cache", need.prefix)
    add("work of a program (estimate)", need.working.total)
    add("margin", need.margin)
    add("total", need.total, style="bold")
    add("memory", plan.memory)
    add("free" if report.free >= 0 else "missing", abs(report.free), style="bold")
    return table


def contexts_table(report: Report) -> Table:
    """Which contexts fit for how many slots."""
    table = _plain()
    for heading in ("slots", "largest context", "caches of each device"):
        table.add_column(heading, justify="right")
    for slots, context in report.contexts.items():
        held = report.plan.need(slots=slots, context=context).caches
        table.add_row(f"{slots}", f"{context:,}", show_size(sum(held.values())))
    return table


def _plain() -> Table:
    return Table(box=None, pad_edge=False, header_style="bold")


def _counted(count: int, things: str) -> str:
    return f"{count:,} {things.removesuffix('s') if count == 1 else things}"


def _group(parameter: Divided) -> str:
    """What a parameter is for."""
    top, *below = parameter.path
    part = below[1] if top == "layers" else top
    return {
        "embedder": "vocabulary",
        "attention": "attention",
        "feed_forward": "feed-forward",
        "experts": "experts",
        "per_layer_embedder": "inputs of layers",
        "per_layer_input": "inputs of layers",
        "streams": "streams",
        "laurel": "streams",
    }.get(part, "norms and factors")


def _label(parameter: Divided) -> str:
    """A parameter without its layer, as `attention.key`."""
    names = parameter.path[2:] if parameter.path[0] == "layers" else parameter.path
    last = [parameter.part] if parameter.part else list(names[1:-1])
    return ".".join([names[0], *last])
