"""The benchmark with fake subjects: what it measures, in which order, and how it reports it.

No measured time decides a test.
"""

import json
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from rich.console import Console

from refimpl import __main__ as entry
from refimpl.bench import llama_cpp
from refimpl.bench.command import make_plan, print_benchmark
from refimpl.bench.fresh import Exercise, FreshStart
from refimpl.bench.machine import Machine
from refimpl.bench.measure import Quantity, Results, Samples, alternate, ratio
from refimpl.bench.report import Report, to_json, to_table
from refimpl.bench.run import Plan, run
from refimpl.bench.subject import LLAMA_CPP, OURS, Setup
from refimpl.errors import InvalidRequestError, RefimplError
from tests.bench_subjects import FakeSubject
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
        kind = "cold" if cache_dir else "start" if exercise is None else "exercise"
        assert setup == (PLAN.one if setup.is_for_one else PLAN.serving)
        assert cache_dir is None or list(cache_dir.iterdir()) == []
        self._log.append((name, "start for one" if setup.is_for_one else kind))
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
        *turns("start for one", repeat=1), (OURS, "start"),
        *turns("start for one"),
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
        "compile_warm_seconds": (1.0,), "first_token_seconds": (2.0,) * 3,
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
    assert rows["compile_warm_seconds"] == {OURS: Samples((1.0,))}
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
    assert PLAN.serving == Setup(path=MODEL, threads=2, slots=4, context=256)
    assert Plan(path=MODEL, prefill=(5,), tokens=1000).serving.context == 1024
    assert PLAN.one == Setup(path=MODEL, threads=2, slots=1, context=1024, is_for_one=True)


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
