"""Measurements: what was taken of which subject, and in which order.

A machine that others use, or that slows down as it grows warm, changes under the measurement. So
subjects take turns (A B A B ...), and what is reported is the median and the range.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Quantity:
    """Something to measure.

    Attributes:
        key: its name in the JSON report; stable.
        label: its name in the table.
        unit: "s", "tokens/s", "bytes", "bytes/s" or "fraction".
        is_better_higher: whether a ratio above 1 is praise.
    """

    key: str
    label: str
    unit: str
    is_better_higher: bool


@dataclass(frozen=True)
class Samples:
    """Values of one quantity of one subject, in the order they were taken; at least one."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one, or the mean of the middle two."""
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        """The smallest."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The largest."""
        return max(self.values)

    def scaled(self, factor: float) -> "Samples":
        """Each value times the factor: a quantity that follows from this one."""
        return Samples(tuple(value * factor for value in self.values))


@dataclass
class Results:
    """What has been measured so far, in the order it was begun. Grows while measuring goes on."""

    taken: dict[Quantity, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, quantity: Quantity, subject: str, value: float) -> None:
        """One more value."""
        self.taken.setdefault(quantity, {}).setdefault(subject, []).append(value)

    def samples(self, quantity: Quantity, subject: str) -> Samples | None:
        """All values of a subject; None if there are none."""
        values = self.taken.get(quantity, {}).get(subject)
        return Samples(tuple(values)) if values else None

    def rows(self) -> Iterator[tuple[Quantity, dict[str, Samples]]]:
        """Every quantity, and the samples of each subject that it was measured of."""
        for quantity, by_subject in self.taken.items():
            yield quantity, {name: Samples(tuple(values)) for name, values in by_subject.items()}


def ratio(samples: Mapping[str, Samples], *, ours: str, peer: str) -> float | None:
    """The median of ours over the peer's; None unless both were measured and the peer's is not 0.

    >>> ratio({"a": Samples((6.0,)), "b": Samples((2.0, 3.0, 9.0))}, ours="a", peer="b")
    2.0
    """
    if ours not in samples or peer not in samples or samples[peer].median == 0:
        return None
    return samples[ours].median / samples[peer].median


def alternate(
    takes: Mapping[str, Callable[[], Mapping[Quantity, float]]],
    results: Results,
    *,
    repeat: int,
    label: str,
    progress: Progress,
) -> None:
    """Take each subject's values in turn, so many times; results hold every value once taken.

    Args:
        takes: of each subject, what measures it once.
        results: grows by what is measured.
        repeat: number of turns of each subject.
        label: of what is measured, for the progress bar.
        progress: called with the label, and the turns done and to do.
    """
    total = repeat * len(takes)
    progress(label, 0, total)
    for turn in range(repeat):
        for index, (subject, take) in enumerate(takes.items()):
            for quantity, value in take().items():
                results.add(quantity, subject, value)
            progress(label, turn * len(takes) + index + 1, total)
