"""`refimpl bench --server` on a tiny model: what it prints. No measured time decides a test."""

import json
from dataclasses import fields
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from refimpl_weights import synthetic
from rich.console import Console

from refimpl.bench import command, server
from refimpl.bench.command import print_server_benchmark
from refimpl.bench.machine import Machine
from refimpl.bench.measure import Results
from refimpl.bench.run import Plan, decode_quantity

MACHINE = Machine(
    processor="an abacus", cores=2, memory_bytes=8_000_000_000, load_average=0.5,
    copy_bytes_per_second=4000.0, system="Linux", python="3.12", jax="0.12",
)  # fmt: skip


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("gemma3")
    synthetic.write_checkpoint(folder, "gemma3")
    return Plan(path=folder, streams=(1,), prefill=(8,), tokens=100, repeat=2)


@pytest.mark.timeout(900)
def test_what_is_printed(plan: Plan, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "describe_machine", lambda: MACHINE)
    monkeypatch.setenv("REFIMPL_CACHE_DIR", str(plan.path.parent))
    print_server_benchmark(plan, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["machine", "model", "plan", "rows"]
    assert set(found["machine"]) == {field.name for field in fields(Machine)}
    assert found["model"] == {"name": Path(plan.path).name}
    assert found["plan"] == {"streams": [1], "tokens": 100, "repeat": 2}
    [row] = found["rows"]
    assert (row["key"], row["unit"]) == ("decode_1", "tokens/s")
    rates = {name: each["values"] for name, each in row["subjects"].items()}
    assert set(rates) == {"engine", "server"}
    assert all(len(values) == 2 and min(values) > 0 for values in rates.values())
    medians = [row["subjects"][name]["median"] for name in ("server", "engine")]
    assert row["ratio"] == pytest.approx(medians[0] / medians[1], rel=1e-12)


def test_the_table_says_on_what_it_was_measured(plan: Plan) -> None:
    results, text = Results(), StringIO()
    results.add(decode_quantity(2), server.ENGINE, 20.0)
    results.add(decode_quantity(2), server.SERVER, 19.0)
    Console(file=text, width=140).print(server.to_table(plan, results, MACHINE))
    assert "an abacus, 2 cores, 8 GB; jax 0.12, python 3.12" in text.getvalue()
    row = next(line for line in text.getvalue().splitlines() if "decode, 2 streams" in line)
    assert row.strip("│ ").endswith("0.950")
