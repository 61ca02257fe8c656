"""What was measured, as a table for people and as one JSON object for programs."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from refimpl.bench.machine import Machine
from refimpl.bench.measure import Quantity, Results, Samples, ratio
from refimpl.bench.run import (
    COMPILE_COLD,
    COMPILE_WARM,
    FIRST_TOKEN,
    FIRST_TOKEN_FRESH,
    LOAD,
    PEAK,
    Plan,
    decode_quantity,
    prefill_quantity,
)
from refimpl.bench.subject import OURS

WEIGHTS_READ = Quantity("weights_read_bytes_per_second", "weights read", "bytes/s", True)
WEIGHTS_READ_SHARE = Quantity(
    "weights_read_of_copy_bandwidth", "  of copy bandwidth", "fraction", True
)

_SCALES = {
    "s": (1e3, "ms", 0), "tokens/s": (1.0, "tokens/s", 1), "bytes": (1e-6, "MB", 0),
    "bytes/s": (1e-9, "GB/s", 2), "fraction": (100.0, "%", 0),
}  # fmt: skip


@dataclass(kw_only=True)
class Report:
    """A run of the benchmark; grows while it goes on.

    Attributes:
        plan: what was to be measured.
        machine: on what.
        versions: of the packages that are measured.
        weight_bytes: that one step of decoding reads, as the file stores them; None if unknown.
        results: what has been measured.
        is_complete: whether nothing of the plan is missing.
        others_share: of the processors, that other programs used meanwhile; None if unknown.
    """

    plan: Plan
    machine: Machine
    versions: Mapping[str, str]
    weight_bytes: int | None
    results: Results = field(default_factory=Results)
    is_complete: bool = False
    others_share: float | None = None

    def rows(self) -> Iterator[tuple[Quantity, dict[str, Samples]]]:
        """Every quantity that was measured or follows, and its samples of each subject."""
        measured = dict(self.results.rows())
        measured |= self._weights_read(measured)
        for quantity in _order(self.plan):
            if quantity in measured:
                yield quantity, measured[quantity]

    def _weights_read(
        self, measured: dict[Quantity, dict[str, Samples]]
    ) -> dict[Quantity, dict[str, Samples]]:
        streams = min(self.plan.streams)
        decoded = measured.get(decode_quantity(streams))
        if decoded is None or self.weight_bytes is None:
            return {}
        read = {
            name: samples.scaled(self.weight_bytes / streams) for name, samples in decoded.items()
        }
        share = 1 / self.machine.copy_bytes_per_second
        return {
            WEIGHTS_READ: read,
            WEIGHTS_READ_SHARE: {name: samples.scaled(share) for name, samples in read.items()},
        }

    def ratio(self, samples: dict[str, Samples]) -> float | None:
        """Ours over the peer's; None where one is missing."""
        if self.plan.peer is None:
            return None
        return ratio(samples, ours=OURS, peer=self.plan.peer)


def to_json(report: Report) -> dict[str, Any]:
    """The report as one JSON object; seconds, bytes and tokens, no other units."""
    plan = report.plan
    return {
        "is_complete": report.is_complete,
        "versions": dict(report.versions),
        "machine": asdict(report.machine),
        "others_share_of_processors": report.others_share,
        "model": {
            "name": plan.path.name,
            "weight_bytes_per_step": report.weight_bytes,
        },
        "plan": {
            "subjects": list(plan.subjects),
            "streams": list(plan.streams),
            "prefill": list(plan.prefill),
            "tokens": plan.tokens,
            "repeat": plan.repeat,
            "threads": plan.threads,
        },
        "rows": [
            {
                "key": quantity.key,
                "label": quantity.label.strip(),
                "unit": quantity.unit,
                "is_better_higher": quantity.is_better_higher,
                "subjects": {name: _to_json(each) for name, each in samples.items()},
                "ratio": report.ratio(samples),
            }
            for quantity, samples in report.rows()
        ],
    }


def to_table(report: Report) -> Table:
    """The report as a table: medians, and in brackets the range."""
    plan = report.plan
    title = plan.path.name if report.is_complete else f"{plan.path.name} (interrupted)"
    table = Table(
        title=title, title_justify="left", caption=_caption(report), caption_justify="left"
    )
    table.add_column("")
    table.add_column("unit")
    for name in plan.subjects:
        table.add_column(name, justify="right")
        table.add_column("low to high", justify="right", style="dim")
    if plan.peer is not None:
        table.add_column("ratio", justify="right", style="bold")
    for quantity, samples in report.rows():
        cells = [quantity.label, _SCALES[quantity.unit][1]]
        for name in plan.subjects:
            cells += _cells(samples.get(name), quantity.unit)
        if plan.peer is not None:
            quotient = report.ratio(samples)
            cells.append("" if quotient is None else f"{quotient:.2f}")
        table.add_row(*cells)
    return table


def _order(plan: Plan) -> list[Quantity]:
    return [
        LOAD,
        COMPILE_COLD,
        COMPILE_WARM,
        FIRST_TOKEN_FRESH,
        FIRST_TOKEN,
        *map(prefill_quantity, plan.prefill),
        *map(decode_quantity, plan.streams),
        WEIGHTS_READ,
        WEIGHTS_READ_SHARE,
        PEAK,
    ]


def _cells(samples: Samples | None, unit: str) -> list[str]:
    if samples is None:
        return ["", ""]
    scale, _, digits = _SCALES[unit]

    def number(value: float) -> str:
        return f"{value * scale:,.{digits}f}"

    span = "" if len(samples.values) == 1 else f"{number(samples.low)} to {number(samples.high)}"
    return [number(samples.median), span]


def _caption(report: Report) -> str:
    plan, machine = report.plan, report.machine
    lines = [
        f"{machine.processor}, {machine.cores} cores, {machine.memory_bytes / 1e9:.0f} GB, "
        f"copies {machine.copy_bytes_per_second / 1e9:.1f} GB/s (bytes read and bytes written)",
        ", ".join(f"{name} {version}" for name, version in report.versions.items())
        + f", jax {machine.jax}, python {machine.python}",
        f"median of {plan.repeat}, in turns; {plan.tokens} tokens a stream",
    ]
    if report.others_share is not None:
        lines.append(
            f"other programs used {report.others_share:.0%} of the processors meanwhile; load "
            f"average before: {machine.load_average:.1f}"
        )
    if report.weight_bytes is not None:
        lines.append(
            f"weights read: {report.weight_bytes / 1e6:,.0f} MB as the file stores them, times "
            f"steps a second of the row '{decode_quantity(min(plan.streams)).label}'"
        )
    if plan.peer is not None:
        lines.append(f"ratio: {OURS} / {plan.peer}, which computes with {plan.threads} threads")
    return "\n".join(lines)


def _to_json(samples: Samples) -> dict[str, Any]:
    return {
        "median": samples.median,
        "low": samples.low,
        "high": samples.high,
        "values": list(samples.values),
    }
