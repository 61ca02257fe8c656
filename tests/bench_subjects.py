"""A subject for tests of the benchmark."""

from typing import Any

from refimpl.bench.subject import OURS


class FakeSubject:
    """Takes `slowness` seconds for whatever it does, and notes it in a log that subjects share."""

    package = "fake"
    version = "1.0"

    def __init__(self, name: str, log: list[tuple[Any, ...]], *, slowness: float = 1.0) -> None:
        self.name, self._log, self._slowness = name, log, slowness

    def _note(self, *what: Any) -> float:
        self._log.append((self.name, *what))
        return self._slowness

    def load(self) -> float:
        return self._note("load")

    def compile(self) -> float | None:
        return self._note("compile") if self.name == OURS else None

    def prefill(self, num_tokens: int) -> float:
        return self._note("prefill", num_tokens)

    def decode(self, streams: int, num_tokens: int) -> float:
        return self._note("decode", streams, num_tokens)

    def first_token(self) -> float:
        return self._note("first token")

    def close(self) -> None:
        self._note("close")
