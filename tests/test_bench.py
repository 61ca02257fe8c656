"""The benchmark with fake subjects: what it measures, in which order, and how it reports it.

No measured time decides a test.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from rich.console import Console

from refimpl import __main__ as entry
from refimpl.bench import fresh, llama_cpp, machine
from refimpl.bench.command import make_plan, print_benchmark
from refimpl.bench.fresh import Exercise, FreshStart, peak_resident_bytes, serve_once, watch
from refimpl.bench.machine import Machine, copy_bandwidth
from refimpl.bench.measure import Quantity, Results, Samples, alternate, ratio
from refimpl.bench.neighbours import Usage, busy_seconds, share_of_others
from refimpl.bench.ours import Ours, step_seconds
from refimpl.bench.report import Report, to_json, to_table
from refimpl.bench.run import Plan, run, weight_bytes_per_step
from refimpl.bench.subject import LLAMA_CPP, OURS, SHORT_PROMPT, Setup, prompt_ids
from refimpl.engine.events import Delta, Event, Finished
from refimpl.engine.request import Request, SamplingParams
from refimpl.errors import InvalidRequestError, RefimplError
from tests.gguf_files import write as write_gguf

MODEL = Path("model.gguf")
PLAN = Plan(
    path=MODEL, peer=LLAMA_CPP, streams=(1, 4), prefill=(100, 200), tokens=10, repeat=3, threads=2
)
MACHINE = Machine(
    processor="an abacus", cores=2, memory_bytes=8_000_000_000, load_average=0.5,
    copy_bytes_per_second=4000.0, system="Linux", python="3.12", jax="0.12",
)  # fmt: skip
RATE = Quantity("rate", "rate", "tokens/s", True)


def silent(label: str, done: int, total: int) -> None:
    """No progress bar."""


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


class FakeStarter:
    """Fresh processes that always show the same."""

    def __init__(self, log: list[tuple[Any, ...]]) -> None:
        self._log = log

    def __call__(
        self,
        name: str,
        setup: Setup,
        *,
        exercise: Exercise | None = None,
        cache_dir: Path | None = None,
    ) -> FreshStart:
        assert setup == PLAN.setup
        assert cache_dir is None or list(cache_dir.iterdir()) == []
        kind = "cold" if cache_dir else "start" if exercise is None else "exercise"
        self._log.append((name, kind))
        return FreshStart(
            first_token_seconds=3.0,
            load_seconds=2.0,
            compile_seconds=None if name == LLAMA_CPP else 60.0 if cache_dir else 1.0,
            peak_bytes=1_000_000 if exercise is None else 5_000_000,
        )


def measured(plan: Plan, log: list[tuple[Any, ...]]) -> Results:
    """A whole run in which we take 2 seconds for everything, and the peer 1."""
    results = Results()
    slowness = {OURS: 2.0, LLAMA_CPP: 1.0}
    subjects = {name: FakeSubject(name, log, slowness=slowness[name]) for name in plan.subjects}
    run(plan, subjects, results, progress=silent, starter=FakeStarter(log))
    return results


def report(results: Results, *, plan: Plan = PLAN, is_complete: bool = True) -> Report:
    return Report(
        plan=plan, machine=MACHINE, versions={"refimpl": "1.2.3"}, weight_bytes=200,
        results=results, is_complete=is_complete, others_share=0.25,
    )  # fmt: skip


# Samples and turns.


def test_median_and_range() -> None:
    assert Samples((9.0, 1.0, 2.0)).median == 2.0
    assert Samples((9.0, 1.0, 2.0, 4.0)).median == 3.0
    assert (Samples((9.0, 1.0, 2.0)).low, Samples((9.0, 1.0, 2.0)).high) == (1.0, 9.0)
    assert Samples((1.0, 3.0)).scaled(2.0) == Samples((2.0, 6.0))


def test_a_ratio_needs_both() -> None:
    one, two, zero = Samples((1.0,)), Samples((2.0,)), Samples((0.0,))
    assert ratio({"a": one, "b": two}, ours="a", peer="b") == 0.5
    assert ratio({"a": one}, ours="a", peer="b") is None
    assert ratio({"b": one}, ours="a", peer="b") is None
    assert ratio({"a": one, "b": zero}, ours="a", peer="b") is None


def test_subjects_take_turns() -> None:
    order: list[str] = []
    seen: list[tuple[str, int, int]] = []

    def take(name: str) -> dict[Quantity, float]:
        order.append(name)
        return {RATE: float(len(order))}

    results = Results()
    takes = {"a": lambda: take("a"), "b": lambda: take("b")}
    alternate(takes, results, repeat=3, label="x", progress=lambda *done: seen.append(done))
    assert order == ["a", "b"] * 3
    assert results.samples(RATE, "a") == Samples((1.0, 3.0, 5.0))
    assert results.samples(RATE, "b") == Samples((2.0, 4.0, 6.0))
    assert results.samples(RATE, "c") is None
    assert seen == [("x", done, 6) for done in range(7)]


# A whole run.


def test_the_order_of_a_run() -> None:
    log: list[tuple[Any, ...]] = []
    measured(PLAN, log)

    def turns(*what: Any, repeat: int = 3) -> list[tuple[Any, ...]]:
        return [(OURS, *what), (LLAMA_CPP, *what)] * repeat

    assert log == [
        *turns("start", repeat=1),
        *turns("start"),
        *turns("exercise", repeat=1),
        (OURS, "load"), (OURS, "compile"), (LLAMA_CPP, "load"),
        *turns("first token"),
        *turns("prefill", 100), *turns("prefill", 200),
        *turns("decode", 1, 10), *turns("decode", 4, 10),
        (LLAMA_CPP, "close"), (OURS, "close"),
    ]  # fmt: skip


def test_what_a_run_yields() -> None:
    results = measured(PLAN, [])
    ours, theirs = (
        {quantity.key: samples[name].values for quantity, samples in results.rows()
         if name in samples}
        for name in (OURS, LLAMA_CPP)
    )  # fmt: skip
    shared = {
        "load_seconds": (2.0,) * 3,
        "first_token_fresh_seconds": (3.0,) * 3,
        "peak_bytes": (5_000_000,),
    }
    assert ours == shared | {
        "compile_warm_seconds": (1.0,) * 3, "first_token_seconds": (2.0,) * 3,
        "prefill_100": (50.0,) * 3, "prefill_200": (100.0,) * 3,
        "decode_1": (5.0,) * 3, "decode_4": (20.0,) * 3,
    }  # fmt: skip
    assert theirs == shared | {
        "first_token_seconds": (1.0,) * 3,
        "prefill_100": (100.0,) * 3, "prefill_200": (200.0,) * 3,
        "decode_1": (10.0,) * 3, "decode_4": (40.0,) * 3,
    }  # fmt: skip


def test_a_cold_run_compiles_once_in_an_empty_folder() -> None:
    log: list[tuple[Any, ...]] = []
    plan = Plan(
        path=MODEL, streams=(1, 4), prefill=(100, 200), tokens=10, repeat=3, threads=2, is_cold=True
    )
    rows = {quantity.key: samples for quantity, samples in measured(plan, log).rows()}
    assert log.count((OURS, "cold")) == 1
    assert rows["compile_cold_seconds"] == {OURS: Samples((60.0,))}
    assert rows["compile_warm_seconds"] == {OURS: Samples((1.0,) * 3)}
    assert {name for name, *_ in log} == {OURS}


def test_subjects_are_closed_when_one_fails_to_load() -> None:
    log: list[tuple[Any, ...]] = []

    class Broken(FakeSubject):
        def load(self) -> float:
            raise RefimplError("out of order")

    subjects = {OURS: FakeSubject(OURS, log), LLAMA_CPP: Broken(LLAMA_CPP, log)}
    with pytest.raises(RefimplError, match="out of order"):
        run(PLAN, subjects, Results(), progress=silent, starter=FakeStarter([]))
    assert log == [(OURS, "load"), (OURS, "compile"), (LLAMA_CPP, "close"), (OURS, "close")]


# Reports.


def test_json_report() -> None:
    found = json.loads(json.dumps(to_json(report(measured(PLAN, [])))))
    rows = found.pop("rows")
    assert found == {
        "is_complete": True,
        "others_share_of_processors": 0.25,
        "versions": {"refimpl": "1.2.3"},
        "machine": {
            "processor": "an abacus", "cores": 2, "memory_bytes": 8_000_000_000,
            "load_average": 0.5, "copy_bytes_per_second": 4000.0, "system": "Linux",
            "python": "3.12", "jax": "0.12",
        },
        "model": {"name": "model.gguf", "weight_bytes_per_step": 200},
        "plan": {
            "subjects": ["refimpl", "llama.cpp"], "streams": [1, 4], "prefill": [100, 200],
            "tokens": 10, "repeat": 3, "threads": 2,
        },
    }  # fmt: skip
    assert [row["key"] for row in rows] == [
        "load_seconds", "compile_warm_seconds", "first_token_fresh_seconds", "first_token_seconds",
        "prefill_100", "prefill_200", "decode_1", "decode_4", "weights_read_bytes_per_second",
        "weights_read_of_copy_bandwidth", "peak_bytes",
    ]  # fmt: skip
    assert rows[6] == {
        "key": "decode_1", "label": "decode, 1 stream", "unit": "tokens/s",
        "is_better_higher": True, "ratio": 0.5,
        "subjects": {
            "refimpl": {"median": 5.0, "low": 5.0, "high": 5.0, "values": [5.0] * 3},
            "llama.cpp": {"median": 10.0, "low": 10.0, "high": 10.0, "values": [10.0] * 3},
        },
    }  # fmt: skip
    assert rows[1]["ratio"] is None
    assert list(rows[1]["subjects"]) == ["refimpl"]


def test_weights_read_follow_from_the_slowest_way_to_decode() -> None:
    """200 bytes at 5 steps a second are 1,000 bytes a second, a quarter of what is copied."""
    rows = {row["key"]: row for row in to_json(report(measured(PLAN, [])))["rows"]}
    assert rows["weights_read_bytes_per_second"]["subjects"]["refimpl"]["median"] == 1000.0
    assert rows["weights_read_of_copy_bandwidth"]["subjects"]["refimpl"]["median"] == 0.25
    four = Plan(path=MODEL, streams=(4,), prefill=(100,), tokens=10, repeat=3)
    results = Results()
    results.add(Quantity("decode_4", "decode, 4 streams in all", "tokens/s", True), OURS, 20.0)
    rows = {row["key"]: row for row in to_json(report(results, plan=four))["rows"]}
    assert rows["weights_read_bytes_per_second"]["subjects"]["refimpl"]["median"] == 1000.0


def test_table() -> None:
    text = StringIO()
    Console(file=text, width=140).print(to_table(report(measured(PLAN, []))))
    lines = text.getvalue().splitlines()
    row = next(line for line in lines if "decode, 4 streams in all" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == [
        "decode, 4 streams in all", "tokens/s", "20.0", "20.0 to 20.0", "40.0", "40.0 to 40.0",
        "0.50",
    ]  # fmt: skip
    row = next(line for line in lines if "peak resident memory" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")][2:4] == ["5", ""]
    assert "an abacus, 2 cores, 8 GB" in text.getvalue()
    assert "other programs used 25% of the processors meanwhile" in text.getvalue()
    assert "interrupted" not in text.getvalue()


def test_table_without_a_peer_has_no_ratio() -> None:
    text = StringIO()
    plan = Plan(path=MODEL, streams=(1, 4), prefill=(100, 200), tokens=10, repeat=3, threads=2)
    Console(file=text, width=140).print(to_table(report(measured(plan, []), plan=plan)))
    assert "ratio" not in text.getvalue()
    assert "llama.cpp" not in text.getvalue()


@pytest.mark.parametrize("as_json", [True, False])
def test_ctrl_c_prints_what_there_is(capsys, monkeypatch, tmp_path: Path, as_json: bool) -> None:
    monkeypatch.setattr("refimpl.bench.command.describe_machine", lambda: MACHINE)
    path = tmp_path / "model.gguf"
    write_gguf(path, {"a": (np.zeros((2, 3), np.float32), GGMLQuantizationType.F32)})
    log: list[tuple[Any, ...]] = []

    class Interrupted(FakeSubject):
        def prefill(self, num_tokens: int) -> float:
            if (self.name, "prefill", num_tokens) in log and self.name == LLAMA_CPP:
                raise KeyboardInterrupt
            return super().prefill(num_tokens)

    plan = Plan(path=path, peer=LLAMA_CPP, streams=(1,), prefill=(100,), repeat=3)
    with pytest.raises(KeyboardInterrupt):
        print_benchmark(
            plan,
            as_json=as_json,
            opener=lambda name, setup: Interrupted(name, log),
            starter=lambda name, setup, **_: FreshStart(
                first_token_seconds=1.0, load_seconds=1.0, compile_seconds=None, peak_bytes=1
            ),
        )
    printed = capsys.readouterr().out
    assert log[-2:] == [(LLAMA_CPP, "close"), (OURS, "close")]
    if as_json:
        found = json.loads(printed)
        assert found["is_complete"] is False
        assert found["model"]["weight_bytes_per_step"] == 24
        assert found["rows"][-2]["key"] == "prefill_100"
        assert [len(each["values"]) for each in found["rows"][-2]["subjects"].values()] == [2, 1]
    else:
        assert "model.gguf (interrupted)" in printed
        assert "prefill 100" in printed


# Options.


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("refimpl.bench.command.num_cores", lambda: 3)
    path = tmp_path / "model.gguf"
    path.touch()
    return str(path)


def test_defaults_and_quick(here: str) -> None:
    assert make_plan(here) == Plan(
        path=Path(here), peer=None, streams=(1, 2, 4, 8, 16), prefill=(128, 512, 2048), tokens=32,
        repeat=5, threads=3, is_cold=False,
    )  # fmt: skip
    assert make_plan(here, is_quick=True, repeat=7, streams="4,4", threads=1) == Plan(
        path=Path(here), peer=None, streams=(4,), prefill=(512,), tokens=16, repeat=7, threads=1
    )


def test_the_setup_has_room_for_the_plan() -> None:
    assert PLAN.setup == Setup(path=MODEL, threads=2, slots=4, context=256)
    assert Plan(path=MODEL, prefill=(5,), tokens=1000).setup.context == 1024


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"peer": "vllm"}, "--peer must be llama.cpp, got 'vllm'"),
        ({"streams": "one"}, "--streams takes numbers with commas between"),
        ({"streams": ""}, "--streams takes numbers with commas between"),
        ({"streams": "1,0"}, "--streams takes numbers of at least 1, got 1,0"),
        ({"prefill": "-5"}, "--prefill takes numbers of at least 1, got -5"),
        ({"repeat": 0}, "--repeat takes numbers of at least 1, got 0"),
        ({"tokens": 0}, "--tokens takes numbers of at least 1, got 0"),
        ({"threads": 0}, "--threads takes numbers of at least 1, got 0"),
    ],
)
def test_options_that_make_no_sense(here: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        make_plan(here, **options)


def test_a_missing_peer_says_how_to_get_it(here: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["refimpl", "bench", "-m", here, "--peer", "llama.cpp"])
    with pytest.raises(SystemExit) as stopped:
        entry.main()
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert "uv run --with xllamacpp refimpl bench --peer llama.cpp" in captured.err


# Subjects.


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
    subject = llama_cpp.LlamaCpp(PLAN.setup)
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

    subject = Ours(PLAN.setup, make=make)
    assert subject.load() == 1.0
    assert subject.compile() == 1.0
    assert made == [("the model of model.gguf", PLAN.setup)]
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
