"""Progress on standard error, for whatever takes longer than a moment.

Bars are drawn on a terminal only: in a log file or a pipe they would be noise.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars


class Progress:
    """A bar for each stage of the work; all vanish when it is done."""

    def __init__(self) -> None:
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "Progress":
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def update(self, label: str, done: int, total: int) -> None:
        """Show how much of a stage is done."""
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(label, total=total)
        self._bars.update(self._tasks[label], completed=done, total=total)

    @contextmanager
    def waiting(self, label: str) -> Iterator[None]:
        """Show that something is under way whose end cannot be told."""
        task = self._bars.add_task(label, total=None)
        try:
            yield
        finally:
            self._bars.update(task, total=1, completed=1)
