"""What is measured, with a fake llama.cpp and a fake engine; fresh processes; the machine.

No measured time decides a test.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from refimpl.bench import fresh, llama_cpp, machine
from refimpl.bench.fresh import Exercise, peak_resident_bytes, serve_once, watch
from refimpl.bench.machine import copy_bandwidth
from refimpl.bench.neighbours import Usage, busy_seconds, share_of_others
from refimpl.bench.ours import Ours, make_engine, step_seconds
from refimpl.bench.run import weight_bytes_per_step
from refimpl.bench.subject import OURS, SHORT_PROMPT, Setup, prompt_ids
from refimpl.engine.engine import EngineOptions
from refimpl.engine.events import Delta, Event, Finished
from refimpl.engine.request import Request, SamplingParams
from refimpl.errors import InvalidRequestError, RefimplError
from tests.bench_subjects import FakeSubject
from tests.gguf_files import write as write_gguf

SETUP = Setup(path=Path("model.gguf"), threads=2, slots=4, context=256)


def test_prompts_differ_from_their_first_token_block_on() -> None:
    assert prompt_ids(128, number=3) == prompt_ids(128, number=3)
    assert len({tuple(prompt_ids(128, number=number)) for number in range(100)}) == 100
    assert min(prompt_ids(2000, number=0)) >= 5
    assert max(prompt_ids(2000, number=0)) < 255


class FakeServer:
    """What `xllamacpp` offers of llama.cpp."""

    def __init__(self, parameters: Any) -> None:
        if "damaged" in parameters.model.path:
            raise RuntimeError("failed to load model")
        self.parameters = parameters
        self.requests: list[dict[str, Any]] = []

    def handle_completions(self, request: dict[str, Any]) -> dict[str, Any]:
        self.requests.append(request)
        if isinstance(request["prompt"], list) and len(request["prompt"]) > 999:
            return {"error": {"message": "exceeds the available context size"}}
        return {"timings": {"predicted_per_token_ms": 20.0}}


def fake_parameters() -> Any:
    return SimpleNamespace(
        model=SimpleNamespace(), cpuparams=SimpleNamespace(), cpuparams_batch=SimpleNamespace()
    )


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(Server=FakeServer, CommonParams=fake_parameters)
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: module)
    monkeypatch.setattr(llama_cpp, "import_module", lambda name: module)


@pytest.mark.usefixtures("peer")
def test_what_llama_cpp_is_asked() -> None:
    subject = llama_cpp.LlamaCpp(SETUP)
    assert subject.load() > 0
    assert subject.compile() is None
    server = subject._server
    assert (server.parameters.n_parallel, server.parameters.n_ctx) == (4, 4 * 256)
    assert server.parameters.cpuparams.n_threads == 2
    assert server.parameters.cpuparams_batch.n_threads == 2
    assert subject.decode(3, 10) == pytest.approx(0.2, rel=1e-12)
    subject.prefill(7)
    subject.prefill(7)
    subject.first_token()
    decoded, *prefilled, first = server.requests
    assert [len(prompt) for prompt in decoded["prompt"]] == [2, 2, 2]
    assert [request["max_tokens"] for request in server.requests] == [11, 1, 1, 1]
    assert [len(request["prompt"]) for request in prefilled] == [7, 7]
    assert prefilled[0]["prompt"] != prefilled[1]["prompt"]
    assert first["prompt"] == SHORT_PROMPT
    for request in server.requests:
        assert (request["cache_prompt"], request["ignore_eos"]) == (False, True)
        assert request["temperature"] == 0
    with pytest.raises(InvalidRequestError, match="refused to complete: exceeds the available"):
        subject.prefill(1000)
    subject.close()


@pytest.mark.usefixtures("peer")
def test_what_llama_cpp_cannot_read() -> None:
    with pytest.raises(InvalidRequestError, match="reads GGUF files only, got folder"):
        llama_cpp.LlamaCpp(Setup(path=Path("folder"), threads=1, slots=1, context=1))
    damaged = llama_cpp.LlamaCpp(Setup(path=Path("damaged.gguf"), threads=1, slots=1, context=1))
    with pytest.raises(InvalidRequestError, match=r"cannot load damaged.gguf: failed to load"):
        damaged.load()


def test_step_seconds_are_those_of_all_streams_together() -> None:
    even = [(10.0, 1), (11.0, 1), (12.0, 1)]
    assert step_seconds([even]) == 1.0
    assert step_seconds([[(10.0, 4), (14.0, 4), (18.0, 4)]]) == 1.0
    # In step: the order in which a step's tokens are handed out does not matter.
    assert step_seconds([even, [(moment + 0.25, 1) for moment, _ in even]]) == 1.0
    # Alone before 20 and after 24, the first stream is faster.
    first = [(18.0, 1), (19.0, 1), (20.0, 1), (22.0, 1), (24.0, 1)]
    assert step_seconds([first, [(20.0, 1), (22.0, 1), (24.0, 1), (25.0, 1)]]) == 2.0


@pytest.mark.parametrize(
    "arrivals",
    [[[(10.0, 5)]], [[(10.0, 1), (11.0, 1)], [(12.0, 1), (13.0, 1)]]],
    ids=["all at once", "one after the other"],
)
def test_streams_that_tell_no_rate(arrivals: list[list[tuple[float, int]]]) -> None:
    with pytest.raises(InvalidRequestError, match="raise --tokens"):
        step_seconds(arrivals)


class FakeEngine:
    """Yields a token of each choice in each step."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.completed: list[tuple[Any, SamplingParams]] = []
        self.state = "new"

    def start(self) -> None:
        self.state = "started"

    def close(self) -> None:
        self.state = "closed"

    def complete(self, prompt: Any, params: SamplingParams) -> None:
        assert self.state == "started"
        self.completed.append((prompt, params))

    def stream(self, request: Request) -> Iterator[Event]:
        self.requests.append(request)
        for step in range(request.params.max_tokens):
            for choice in range(request.params.n):
                yield Delta(choice, "", (step,), ())
        for choice in range(request.params.n):
            yield Finished(choice, "length", None, request.params.max_tokens, -1.0)


def test_what_our_engine_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    monkeypatch.setattr("refimpl.bench.ours.load", lambda path: f"the model of {path}")
    ticks = iter(range(1000))
    monkeypatch.setattr("refimpl.bench.ours.time.perf_counter", lambda: float(next(ticks)))
    made: list[tuple[str, Setup]] = []

    def make(gemma: str, setup: Setup) -> FakeEngine:
        made.append((gemma, setup))
        return engine

    subject = Ours(SETUP, make=make)
    assert subject.load() == 1.0
    assert subject.compile() == 1.0
    assert made == [("the model of model.gguf", SETUP)]
    # Every event takes a tick, so a step of three streams takes three.
    assert subject.decode(3, 10) == 30.0
    assert subject.prefill(7) == 1.0
    assert subject.prefill(7) == 1.0
    assert subject.first_token() == 1.0
    subject.close()
    assert engine.state == "closed"

    greedy = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    assert [params for _, params in engine.completed] == [greedy] * 3
    first, second, short = (prompt for prompt, _ in engine.completed)
    assert (len(first), len(second), short) == (7, 7, SHORT_PROMPT)
    assert first != second
    assert engine.requests[0].params == SamplingParams(
        max_tokens=11, temperature=0, ignore_eos=True, n=3
    )


@pytest.mark.parametrize("is_for_one", [True, False])
def test_the_engine_that_is_measured(monkeypatch: pytest.MonkeyPatch, is_for_one: bool) -> None:
    monkeypatch.setattr("refimpl.engine.engine.Engine", lambda gemma, options: (gemma, options))
    setup = Setup(path=Path("model"), threads=2, slots=4, context=256, is_for_one=is_for_one)
    assert make_engine("a model", setup) == (
        "a model", EngineOptions(slots=4, context=256, compile_at_start=not is_for_one),
    )  # fmt: skip


# Fresh processes.


def python(*lines: str) -> list[str]:
    return [sys.executable, "-I", "-c", "\n".join(lines)]


def test_watching_a_process() -> None:
    start = watch(
        python(
            "import time",
            'print(\'{"load_seconds": 1.5, "compile_seconds": null}\', flush=True)',
            "time.sleep(0.5)",
            "print('{\"peak_bytes\": 77}')",
        )
    )
    assert (start.load_seconds, start.compile_seconds, start.peak_bytes) == (1.5, None, 77)
    assert start.first_token_seconds > 0


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            ["import sys", "print('why', file=sys.stderr)", "sys.exit(3)"],
            "ended with status 3: why",
        ),
        (["import sys", "sys.exit(1)"], "ended with status 1: it said nothing"),
    ],
)
def test_a_process_that_fails(lines: list[str], words: str) -> None:
    with pytest.raises(RefimplError, match=words):
        watch(python(*lines))


def test_an_interrupted_watch_leaves_no_process_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []

    class Interrupted(subprocess.Popen[str]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

        def communicate(self, *_: Any, **__: Any) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setattr(fresh.subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        watch(python("import time", "print('{}', flush=True)", "time.sleep(60)"))
    assert started[0].poll() == -9


def test_what_a_fresh_process_does(capsys: pytest.CaptureFixture[str]) -> None:
    log: list[tuple[Any, ...]] = []
    serve_once(FakeSubject(OURS, log), Exercise(prefill=9, streams=2, tokens=3))
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first == {"load_seconds": 1.0, "compile_seconds": 1.0}
    assert list(second) == ["peak_bytes"]
    assert log == [
        (OURS, "load"), (OURS, "compile"), (OURS, "first token"), (OURS, "prefill", 9),
        (OURS, "decode", 2, 3), (OURS, "close"),
    ]  # fmt: skip


def test_a_fresh_process_gets_its_task(tmp_path: Path) -> None:
    setup = Setup(path=tmp_path / "model", threads=1, slots=2, context=3)
    with pytest.raises(RefimplError, match=r"status 2: there is no subject 'nobody'"):
        fresh.run_fresh("nobody", setup, exercise=Exercise(prefill=1, streams=1, tokens=1))


def test_peak_memory_counts_what_was_touched() -> None:
    """A peak is at least what is resident now, here 100 MB more than nothing."""
    touched = np.ones(100_000_000, np.uint8)
    assert peak_resident_bytes() >= touched.nbytes


# The machine and the model.


def test_copied_bytes_count_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 bytes, by a clock in which each run takes a quarter of a second less than the last."""

    def clock() -> Iterator[float]:
        now = 0.0
        for seconds in (1.0, 0.75, 0.5):
            yield now
            now += seconds
            yield now

    ticks = clock()
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(ticks))
    assert copy_bandwidth(threads=2, nbytes=1000, repeat=3) == 2 * 1000 / 0.5


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "copy_bandwidth", lambda threads: 1000.0 * threads)
    described = machine.describe_machine()
    assert described.copy_bytes_per_second == 1000.0 * machine.num_cores()
    assert described.cores >= 1
    assert described.processor
    assert described.memory_bytes > 2**28, "JAX alone needs more"


def test_what_others_took() -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    text = f"cpu  {3 * ticks} {2 * ticks} {ticks} 9999 9999 0 {ticks} {4 * ticks} 7 7\ncpu0 1 2 3\n"
    assert busy_seconds(text) == 3 + 2 + 1 + 0 + 1 + 4
    begin, end = Usage(10.0, 50.0, 5.0), Usage(14.0, 57.0, 11.0)
    assert share_of_others(begin, end) == (7 - 6) / (4 * (os.cpu_count() or 1))
    assert share_of_others(begin, Usage(14.0, 50.0, 6.0)) == 0.0
    assert share_of_others(None, end) is None


def test_weights_that_a_step_reads(tmp_path: Path) -> None:
    f32, f16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16
    tied = {
        "token_embd.weight": (np.zeros((10, 4), np.float16), f16),
        "blk.0.attn_q.weight": (np.zeros((3, 4), np.float32), f32),
    }
    assert weight_bytes_per_step(write_gguf(tmp_path / "tied.gguf", tied).path) == 80 + 48
    own_head = tied | {"output.weight": (np.zeros((10, 4), np.float32), f32)}
    assert weight_bytes_per_step(write_gguf(tmp_path / "own.gguf", own_head).path) == 160 + 48
    assert weight_bytes_per_step(tmp_path) is None
