"""`refimpl bench`: from options to a plan, and from what was measured to standard output."""

import json
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from refimpl.bench.fresh import run_fresh
from refimpl.bench.machine import describe_machine, num_cores
from refimpl.bench.neighbours import share_of_others, usage
from refimpl.bench.report import Report, to_json, to_table
from refimpl.bench.run import Opener, Plan, Starter, run, weight_bytes_per_step
from refimpl.bench.subject import LLAMA_CPP, open_subject
from refimpl.errors import InvalidRequestError
from refimpl.model.registry import locate
from refimpl.progress import Progress

# Of a table that goes to a file: enough for one that compares.
_WIDTH = 140


def make_plan(
    model: str | None = None,
    *,
    peer: str | None = None,
    streams: str | None = None,
    prefill: str | None = None,
    repeat: int | None = None,
    tokens: int | None = None,
    threads: int | None = None,
    is_quick: bool = False,
    is_cold: bool = False,
) -> Plan:
    """The plan that options ask for; None is the default, which `is_quick` makes smaller.

    Raises:
        InvalidRequestError: an option that makes no sense, or a peer that cannot be had.
        UnknownModelError, CheckpointError: no such model.
    """
    if peer not in (None, LLAMA_CPP):
        raise InvalidRequestError(f"--peer must be {LLAMA_CPP}, got {peer!r}", parameter="peer")
    default_streams, default_prefill, default_repeat, default_tokens = (
        ("1,8", "512", 3, 16) if is_quick else ("1,2,4,8,16", "128,512,2048", 5, 32)
    )
    return Plan(
        path=locate(model),
        peer=peer,
        streams=_numbers("streams", default_streams if streams is None else streams),
        prefill=_numbers("prefill", default_prefill if prefill is None else prefill),
        repeat=default_repeat if repeat is None else repeat,
        tokens=default_tokens if tokens is None else tokens,
        threads=num_cores() if threads is None else threads,
        is_cold=is_cold,
    )


def print_benchmark(
    plan: Plan, *, as_json: bool, opener: Opener = open_subject, starter: Starter = run_fresh
) -> None:
    """Measure, and print a table or one JSON object.

    Whatever stops it early, Ctrl-C or an error, what has been measured by then is printed.

    Args:
        plan: what to measure.
        as_json: print JSON.
        opener: opens a subject in this process.
        starter: runs a subject in a fresh one.

    Raises:
        RefimplError: a subject cannot be had, or has failed.
    """
    # Before all else, because that is where a missing package is found out.
    subjects = {name: opener(name, plan.serving) for name in plan.subjects}
    report = Report(
        plan=plan,
        machine=describe_machine(),
        versions={subject.package: subject.version for subject in subjects.values()},
        weight_bytes=weight_bytes_per_step(plan.path),
    )
    begin = usage()
    try:
        with Progress() as progress:
            run(plan, subjects, report.results, progress=progress.update, starter=starter)
        report.is_complete = True
    finally:
        report.others_share = share_of_others(begin, usage())
        if report.results.taken:
            _print(report, as_json=as_json)


def print_server_benchmark(plan: Plan, *, as_json: bool) -> None:
    """Measure the server against the engine in it, and print a table or one JSON object.

    Raises:
        RefimplError: the model cannot be had, or the server failed.
    """
    # Imported here, because no other benchmark needs a server.
    from refimpl.bench import server

    machine = describe_machine()
    results = server.measure(plan)
    if as_json:
        print(json.dumps(server.to_json(plan, results, machine), ensure_ascii=False))
    else:
        _print_table(server.to_table(plan, results, machine))


def _print(report: Report, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(to_json(report), ensure_ascii=False))
    else:
        _print_table(to_table(report))


def _print_table(table: Table) -> None:
    width = None if sys.stdout.isatty() else _WIDTH
    Console(width=width, highlight=False).print(table)


def _numbers(option: str, text: str) -> Sequence[int]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise InvalidRequestError(
            f"--{option} takes numbers with commas between, as in 1,8; got {text!r}",
            parameter=option,
        ) from error
