"""What is measured: something that loads a model and completes prompts, and the work it is given.

The same definitions hold for every subject, all on the wall clock of whoever asks:

    load          from nothing to weights and tokenizer in memory, imports included
    compile       from there to ready; None for a subject that compiles nothing
    prefill       from asking to the first token of a prompt that no cache knows
    decode        a number of steps in which every stream gets one token each
    first token   from asking to the first token of SHORT_PROMPT
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from refimpl.errors import InvalidRequestError

OURS = "refimpl"
LLAMA_CPP = "llama.cpp"

SHORT_PROMPT = "The capital of France is"
# Ids that every vocabulary has and none reserves: which they are does not matter to speed.
_IDS = range(5, 255)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a subject is opened with.

    Attributes:
        path: the checkpoint.
        threads: that llama.cpp computes with; JAX uses every core.
        slots: most streams at a time.
        context: most positions of a stream.
        is_for_one: whether to make ready for one short completion, as `refimpl complete` does,
            rather than for serving: nothing is compiled before it is needed.
    """

    path: Path
    threads: int
    slots: int
    context: int
    is_for_one: bool = False


@runtime_checkable
class Subject(Protocol):
    """A program under measurement. Methods return seconds."""

    @property
    def name(self) -> str:
        """OURS or LLAMA_CPP."""
        ...

    @property
    def package(self) -> str:
        """The Python package that it is."""
        ...

    @property
    def version(self) -> str:
        """Of the package."""
        ...

    def load(self) -> float:
        """Weights and tokenizer into memory. Comes first, once."""
        ...

    def compile(self) -> float | None:
        """Make ready to run. Comes second, once; None where there is nothing to compile."""
        ...

    def prefill(self, num_tokens: int) -> float:
        """A prompt of so many tokens, until its first token."""
        ...

    def decode(self, streams: int, num_tokens: int) -> float:
        """So many steps of all streams together, after their prompts have been read."""
        ...

    def first_token(self) -> float:
        """SHORT_PROMPT as text, until its first token."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


def open_subject(name: str, setup: Setup) -> Subject:
    """A subject, not yet loaded.

    Raises:
        InvalidRequestError: no such subject, or what it needs is not installed.
    """
    # Imported here, so that measuring one subject never pays for the imports of another.
    if name == OURS:
        from refimpl.bench.ours import Ours

        return Ours(setup)
    if name == LLAMA_CPP:
        from refimpl.bench.llama_cpp import LlamaCpp

        return LlamaCpp(setup)
    raise InvalidRequestError(
        f"there is no subject {name!r} to measure; expected {OURS} or {LLAMA_CPP}",
        parameter="peer",
    )


def prompt_ids(num_tokens: int, *, number: int) -> list[int]:
    """A prompt for measuring; prompts of different numbers share no beginning worth caching.

    >>> prompt_ids(3, number=0) == prompt_ids(3, number=0)
    True
    """
    draw = random.Random(number)
    return [draw.choice(_IDS) for _ in range(num_tokens)]
