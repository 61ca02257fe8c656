"""A server over a tiny engine, and a client for it that needs no event loop of the test's."""

import asyncio
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from quart import Quart
from werkzeug.datastructures import Headers

from refimpl.engine.engine import Engine
from refimpl.server.app import create_app
from refimpl.server.lifecycle import Service
from refimpl.server.loading import Loaded
from refimpl.server.settings import ServerSettings
from tests.engines import tiny_engine

MODEL = "google/tiny"
NAMES = (MODEL, "tiny:1b")
# More choices than this at a time wait. Programs for wider batches take long to compile, and are
# the engine's own matter.
SLOTS = 2
FINGERPRINT = "fp_0123456789abcdef"


@dataclass(frozen=True)
class Got:
    """A reply."""

    status: int
    headers: Headers
    body: bytes

    @property
    def json(self) -> Any:
        """The body's value."""
        return json.loads(self.body)

    @property
    def choices(self) -> list[dict[str, Any]]:
        """Of a completion; fails with the error if it is none."""
        assert self.status == 200, self.body
        return self.json["choices"]

    @property
    def error(self) -> dict[str, Any]:
        """The error object, which has these four keys and nothing beside it."""
        assert list(self.json) == ["error"]
        error = self.json["error"]
        assert list(error) == ["message", "type", "param", "code"]
        return error

    @property
    def events(self) -> list[dict[str, Any]]:
        """The chunks of a stream, which must end as streams do."""
        assert self.status == 200, self.body
        frames = self.body.decode("ascii").split("\n\n")
        assert frames[-2:] == ["data: [DONE]", ""]
        assert all(frame.startswith("data: ") for frame in frames[:-1])
        return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]

    @property
    def assembled(self) -> list[dict[str, Any]]:
        """The choices of a stream, put together as a client does."""
        choices = dict[int, dict[str, Any]]()
        for event in self.events:
            for part in event["choices"]:
                _add(choices, part)
        return [choices[index] for index in sorted(choices)]


def _add(choices: dict[int, dict[str, Any]], part: dict[str, Any]) -> None:
    """More of one choice; its end has nothing else, and nothing comes after it."""
    whole = choices.setdefault(part["index"], part)
    if part["finish_reason"] is not None:
        assert part["text"] == ""
        assert part["logprobs"] is None or set(map(len, part["logprobs"].values())) == {0}
    if whole is part:
        return
    assert whole["finish_reason"] is None, "nothing comes after the end"
    assert "prompt_token_ids" not in part
    whole["text"] += part["text"]
    whole["finish_reason"] = part["finish_reason"]
    if "token_ids" in part:
        whole["token_ids"] += part["token_ids"]
    if part["logprobs"] is not None:
        for name, values in part["logprobs"].items():
            whole["logprobs"][name] += values


class Client:
    """Sends requests to an app, each in an event loop of its own."""

    def __init__(self, app: Quart, service: Service) -> None:
        self.app, self.service = app, service

    def complete(self, **body: Any) -> Got:
        """A completion by the tiny model, greedy unless the body says otherwise."""
        return self.post("/v1/completions", {"model": MODEL, "temperature": 0, **body})

    def post(self, path: str, body: Any, *, headers: dict[str, str] | None = None) -> Got:
        """A value as JSON."""
        data = json.dumps(body).encode()
        return self.send(
            "POST", path, data, {"Content-Type": "application/json", **(headers or {})}
        )

    def get(self, path: str, *, headers: dict[str, str] | None = None) -> Got:
        """No body."""
        return self.send("GET", path, b"", headers or {})

    def send(self, method: str, path: str, data: bytes, headers: dict[str, str]) -> Got:
        """Any request."""
        return asyncio.run(self._sent(method, path, data, headers))

    def complete_at_once(self, bodies: Iterable[dict[str, Any]]) -> list[Got]:
        """Completions that run at the same time, as they are but for the model."""
        headers = {"Content-Type": "application/json"}

        async def sent() -> list[Got]:
            datas = [json.dumps({"model": MODEL, **body}).encode() for body in bodies]
            return await asyncio.gather(
                *(self._sent("POST", "/v1/completions", data, headers) for data in datas)
            )

        return asyncio.run(sent())

    def ids_of(self, text: str) -> list[int]:
        """The ids of a text, with its beginning."""
        return self.service.engine.gemma.tokenizer.encode(text)

    async def _sent(self, method: str, path: str, data: bytes, headers: dict[str, str]) -> Got:
        client = self.app.test_client()
        response = await client.open(path, method=method, data=data, headers=headers)  # pyright: ignore[reportCallIssue]
        body = await response.get_data(as_text=False)
        return Got(response.status_code, response.headers, body)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something is so; fails if it is not soon."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass in 20 s"
        await asyncio.sleep(0.002)


def service_of(engine: Engine, *, fingerprint: str = FINGERPRINT, **settings: Any) -> Service:
    """A service that is ready, over an engine that runs."""
    loaded = Loaded(engine=engine, fingerprint=fingerprint, block=128, num_compilations=lambda: 0)
    return started(ServerSettings(**settings), load=lambda progress: loaded)


def started(settings: ServerSettings, *, load: Callable[[Any], Loaded]) -> Service:
    """A service that has loaded, or has failed to."""
    service = Service(settings, names=NAMES, load=load)
    service.begin()
    service.wait_until_loaded(10.0)
    assert not service.is_loading
    return service


def client_of(engine: Engine, **settings: Any) -> Client:
    """A client of a server over an engine that runs."""
    service = service_of(engine, **settings)
    return Client(create_app(service), service)


@contextmanager
def tiny_client(name: str = "gemma3", **settings: Any) -> Iterator[Client]:
    """A client of a server over an engine of its own."""
    engine = tiny_engine(name, slots=SLOTS)
    # Requests of tests are few and short, and use few of the programs.
    engine.options = replace(engine.options, compile_at_start=False)
    with engine:
        yield client_of(engine, **settings)
