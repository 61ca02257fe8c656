"""The benchmark: which quantities are measured, of which subjects, in which order."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from refimpl_weights.gguf_header import read_header

from refimpl.bench.fresh import Exercise, FreshStart, run_fresh
from refimpl.bench.measure import Progress, Quantity, Results, alternate
from refimpl.bench.subject import OURS, Setup, Subject
from refimpl.errors import InvalidRequestError

LOAD = Quantity("load_seconds", "load, imports included", "s", False)
COMPILE_COLD = Quantity("compile_cold_seconds", "compile, cold cache", "s", False)
COMPILE_WARM = Quantity("compile_warm_seconds", "compile, warm cache", "s", False)
FIRST_TOKEN_FRESH = Quantity(
    "first_token_fresh_seconds", "first token of a fresh process", "s", False
)
FIRST_TOKEN = Quantity("first_token_seconds", "first token when running", "s", False)
PEAK = Quantity("peak_bytes", "peak resident memory", "bytes", False)

# A prompt has some tokens after it, and tokens a prompt before them. Caches are cut into blocks, so
# a whole number of them is what either program has room for anyway.
_MARGIN = 16
_BLOCK = 256
# Enough for every stream to be decoding at once.
_PEAK_TOKENS = 8


def prefill_quantity(num_tokens: int) -> Quantity:
    """Tokens of a prompt a second."""
    return Quantity(f"prefill_{num_tokens}", f"prefill {num_tokens:,}", "tokens/s", True)


def decode_quantity(streams: int) -> Quantity:
    """Tokens a second, of all streams together."""
    many = "1 stream" if streams == 1 else f"{streams} streams in all"
    return Quantity(f"decode_{streams}", f"decode, {many}", "tokens/s", True)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure.

    Attributes:
        path: the checkpoint.
        peer: LLAMA_CPP, or None to measure ourselves alone.
        streams: numbers of streams that decode together.
        prefill: lengths of prompts.
        tokens: decoded by each stream in one measurement.
        repeat: turns of each subject at each quantity.
        threads: of the peer.
        is_cold: whether to measure compilation from nothing, which takes a minute or two.
    """

    path: Path
    peer: str | None = None
    streams: Sequence[int] = (1, 2, 4, 8, 16)
    prefill: Sequence[int] = (128, 512, 2048)
    tokens: int = 32
    repeat: int = 5
    threads: int = 1
    is_cold: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers below 1, and nothing to measure.

        Raises:
            InvalidRequestError: naming the option.
        """
        for option, values in (
            ("streams", self.streams), ("prefill", self.prefill), ("tokens", [self.tokens]),
            ("repeat", [self.repeat]), ("threads", [self.threads]),
        ):  # fmt: skip
            if not values or min(values) < 1:
                raise InvalidRequestError(
                    f"--{option} takes numbers of at least 1, got "
                    f"{','.join(map(str, values)) or 'none'}",
                    parameter=option,
                )

    @property
    def subjects(self) -> tuple[str, ...]:
        """Names of what is measured, in the order of their turns."""
        return (OURS,) if self.peer is None else (OURS, self.peer)

    @property
    def one(self) -> Setup:
        """For a process that makes one short completion."""
        return Setup(
            path=self.path,
            threads=self.threads,
            slots=1,
            context=1024,
            is_for_one=True,
        )

    @property
    def serving(self) -> Setup:
        """For serving: slots and positions that everything planned fits in."""
        longest = max(*self.prefill, self.tokens) + _MARGIN
        return Setup(
            path=self.path,
            threads=self.threads,
            slots=max(self.streams),
            context=-(-longest // _BLOCK) * _BLOCK,
        )


Opener = Callable[[str, Setup], Subject]
Starter = Callable[..., FreshStart]


def run(
    plan: Plan,
    subjects: Mapping[str, Subject],
    results: Results,
    *,
    progress: Progress,
    starter: Starter = run_fresh,
) -> None:
    """Measure everything planned.

    Args:
        plan: what to measure.
        subjects: by name, not yet loaded; closed when this ends.
        results: grows by what is measured, so whoever interrupts this keeps what there is.
        progress: called with what is measured, and the turns done and to do.
        starter: runs a subject in a fresh process.

    Raises:
        RefimplError: a subject has failed.
    """
    # Fresh processes come first: later, two models in this one's memory would press on theirs.
    _measure_starts(plan, results, progress, starter)
    with _ready(subjects, progress):
        _measure_running(plan, subjects, results, progress)


def weight_bytes_per_step(path: Path) -> int | None:
    """Bytes of weights, as the file stores them, that one step of decoding reads.

    All matrices, but of an embedding that is not the head as well only one row, which is left out.

    Returns:
        None for a checkpoint that is no GGUF file: bytes in memory are then not bytes in the file.
    """
    if path.suffix != ".gguf":
        return None
    tensors = read_header(path).tensors
    looked_up = {"token_embd.weight"} if "output.weight" in tensors else set[str]()
    return sum(tensor.nbytes for name, tensor in tensors.items() if name not in looked_up)


def _measure_starts(plan: Plan, results: Results, progress: Progress, starter: Starter) -> None:
    if plan.is_cold:
        progress("compiling with a cold cache", 0, 1)
        with tempfile.TemporaryDirectory() as folder:
            start = starter(OURS, plan.serving, cache_dir=Path(folder))
        if start.compile_seconds is not None:
            results.add(COMPILE_COLD, OURS, start.compile_seconds)
        progress("compiling with a cold cache", 1, 1)
    # The first starts fill the caches (compiled programs, the file's pages), so they tell nothing.
    first = [*((name, plan.one) for name in plan.subjects), (OURS, plan.serving)]
    for done, (name, setup) in enumerate(first):
        progress("filling caches", done, len(first))
        starter(name, setup)
    progress("filling caches", len(first), len(first))

    starts = {name: partial(_start, name, plan.one, starter) for name in plan.subjects}
    alternate(starts, results, repeat=plan.repeat, label="fresh processes", progress=progress)
    hardest = Exercise(
        prefill=max(plan.prefill), streams=max(plan.streams), tokens=min(plan.tokens, _PEAK_TOKENS)
    )
    served = {name: partial(_serve, name, plan.serving, hardest, starter) for name in plan.subjects}
    alternate(served, results, repeat=1, label=PEAK.label, progress=progress)


def _start(name: str, setup: Setup, starter: Starter) -> dict[Quantity, float]:
    start = starter(name, setup)
    return {LOAD: start.load_seconds, FIRST_TOKEN_FRESH: start.first_token_seconds}


def _serve(name: str, setup: Setup, hardest: Exercise, starter: Starter) -> dict[Quantity, float]:
    start = starter(name, setup, exercise=hardest)
    compiled = {} if start.compile_seconds is None else {COMPILE_WARM: start.compile_seconds}
    return {PEAK: float(start.peak_bytes), **compiled}


@contextmanager
def _ready(subjects: Mapping[str, Subject], progress: Progress) -> Iterator[None]:
    """Load all subjects, and close all when done, even those that never got to load."""
    with ExitStack() as closing:
        for subject in subjects.values():
            closing.callback(subject.close)
        for done, subject in enumerate(subjects.values()):
            progress("loading", done, len(subjects))
            subject.load()
            subject.compile()
        progress("loading", len(subjects), len(subjects))
        yield


def _measure_running(
    plan: Plan, subjects: Mapping[str, Subject], results: Results, progress: Progress
) -> None:
    def take_turns(quantity: Quantity, measure: Callable[[Subject], float]) -> None:
        takes = {name: partial(_take, quantity, measure, each) for name, each in subjects.items()}
        alternate(takes, results, repeat=plan.repeat, label=quantity.label, progress=progress)

    take_turns(FIRST_TOKEN, lambda subject: subject.first_token())
    for length in plan.prefill:
        take_turns(prefill_quantity(length), partial(_prefill_rate, length))
    for streams in plan.streams:
        take_turns(decode_quantity(streams), partial(_decode_rate, streams, plan.tokens))


def _take(
    quantity: Quantity, measure: Callable[[Subject], float], subject: Subject
) -> dict[Quantity, float]:
    return {quantity: measure(subject)}


def _prefill_rate(length: int, subject: Subject) -> float:
    return length / subject.prefill(length)


def _decode_rate(streams: int, tokens: int, subject: Subject) -> float:
    return streams * tokens / subject.decode(streams, tokens)
