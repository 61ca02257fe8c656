"""What the server costs: tokens a second through it, and of the engine itself, in turns.

Both use one engine in this process. Through the server every stream is a request of its own, sent
by a process of clients over loopback; of the engine itself the streams are one request's choices.
"""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

from rich.table import Table

from refimpl.bench.machine import Machine
from refimpl.bench.measure import Quantity, Results, Samples, alternate, ratio
from refimpl.bench.ours import Ours, step_seconds
from refimpl.bench.run import Plan, decode_quantity
from refimpl.errors import EngineError
from refimpl.progress import Progress
from refimpl.server.app import create_app
from refimpl.server.lifecycle import Service
from refimpl.server.listener import Listener
from refimpl.server.loading import Loaded
from refimpl.server.run import Server
from refimpl.server.settings import ServerSettings

ENGINE, SERVER = "engine", "server"
# A turn is some seconds, and the machine's moods average out over them only in many.
_CLIENT_SECONDS = 600


def measure(plan: Plan) -> Results:
    """Tokens a second of both, for each number of streams planned.

    Raises:
        RefimplError: the model cannot be had, or the server failed.
    """
    results, ours = Results(), Ours(plan.serving)
    try:
        with Progress() as progress:
            for step, (label, do) in enumerate(
                {"load": ours.load, "compile": ours.compile}.items()
            ):
                progress.update(label, step, 2)
                do()
                progress.update(label, 2, 2)
            with _served(ours.engine) as port:
                for streams in plan.streams:
                    quantity = decode_quantity(streams)
                    takes = {
                        ENGINE: partial(_of_engine, quantity, ours, streams, plan.tokens),
                        SERVER: partial(_of_server, quantity, port, streams, plan.tokens),
                    }
                    alternate(
                        takes,
                        results,
                        repeat=plan.repeat,
                        label=quantity.label,
                        progress=progress.update,
                    )
    finally:
        ours.close()
    return results


def to_json(plan: Plan, results: Results, machine: Machine) -> dict[str, Any]:
    """What was measured, and on what, as one JSON object."""
    return {
        "machine": asdict(machine),
        "model": {"name": plan.path.name},
        "plan": {
            "streams": list(plan.streams), "tokens": plan.tokens, "repeat": plan.repeat,
        },
        "rows": [
            {
                "key": quantity.key,
                "unit": quantity.unit,
                "subjects": {
                    name: {"median": each.median, "values": list(each.values)}
                    for name, each in samples.items()
                },
                "ratio": ratio(samples, ours=SERVER, peer=ENGINE),
            }
            for quantity, samples in results.rows()
        ],
    }  # fmt: skip


def to_table(plan: Plan, results: Results, machine: Machine) -> Table:
    """What was measured, and on what, as a table: medians, and in brackets the range."""
    table = Table(
        title=plan.path.name,
        title_justify="left",
        caption=f"{machine.processor}, {machine.cores} cores, {machine.memory_bytes / 1e9:.0f} GB; "
        f"jax {machine.jax}, python {machine.python}\n"
        f"median of {plan.repeat}, in turns; {plan.tokens} tokens a stream; over loopback",
        caption_justify="left",
    )
    for heading in ("", "unit", ENGINE, SERVER, "server / engine"):
        table.add_column(heading, justify="right" if heading else "left")
    for quantity, samples in results.rows():
        share = ratio(samples, ours=SERVER, peer=ENGINE)
        table.add_row(
            quantity.label,
            quantity.unit,
            *(_cell(samples[name]) for name in (ENGINE, SERVER)),
            "" if share is None else f"{share:.3f}",
        )
    return table


@contextmanager
def _served(engine: Any) -> Iterator[int]:
    """The port of a server over an engine that runs."""
    settings = ServerSettings(port=0, drain_seconds=0.0)
    loaded = Loaded(engine=engine, fingerprint="fp_bench", block=1, num_compilations=lambda: 0)
    service = Service(settings, names=("bench",), load=lambda _: loaded)
    listener = Listener(settings, service.keyring)
    server, is_ready = Server(create_app(service), service, listener), threading.Event()
    thread = threading.Thread(
        target=lambda: asyncio.run(server.run(on_ready=is_ready.set)), name="refimpl-bench-server"
    )
    thread.start()
    try:
        is_ready.wait()
        yield listener.socket.getsockname()[1]
    finally:
        server.stop()
        thread.join()


def _of_engine(quantity: Quantity, ours: Ours, streams: int, tokens: int) -> dict[Quantity, float]:
    return {quantity: streams * tokens / ours.decode(streams, tokens)}


def _of_server(quantity: Quantity, port: int, streams: int, tokens: int) -> dict[Quantity, float]:
    arguments = [str(port), str(streams), str(tokens + 1)]
    ended = subprocess.run(
        [sys.executable, "-m", "refimpl.bench.clients", *arguments],
        capture_output=True, text=True, timeout=_CLIENT_SECONDS, check=False,
    )  # fmt: skip
    if ended.returncode != 0:
        raise EngineError(f"the clients of the server failed: {ended.stderr.strip():.500}")
    arrivals = [
        [(moment, count) for moment, count in stream] for stream in json.loads(ended.stdout)
    ]
    return {quantity: streams / step_seconds(arrivals)}


def _cell(samples: Samples) -> str:
    return f"{samples.median:,.1f} ({samples.low:,.1f} to {samples.high:,.1f})"
