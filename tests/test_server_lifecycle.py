"""The life of a service, who is let in meanwhile, and what is written down of them."""

import asyncio
import io
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from quart import Quart, Response, request
from werkzeug.datastructures import Headers

from refimpl.server import access_log, errors
from refimpl.server.access_log import AccessLog
from refimpl.server.errors import Problem
from refimpl.server.keys import Key
from refimpl.server.lifecycle import Service
from refimpl.server.loading import UNKNOWN_WAIT, Load, Loaded, Pace, Progress
from refimpl.server.metrics import EngineStatistics, Metrics, Moments
from refimpl.server.rates import Allowance, Budget
from refimpl.server.settings import ServerSettings


class FakeEngine:
    """As much of an engine as a service sees."""

    def __init__(self) -> None:
        self.is_healthy = True
        self.options = SimpleNamespace(slots=4)
        prefix = SimpleNamespace(hits=3, misses=2, stored_bytes=77)
        self.worker = SimpleNamespace(
            num_in_flight=5,
            scheduler=SimpleNamespace(num_waiting=2, num_free=1),
            prefix=SimpleNamespace(statistics=prefix),
            # Seven steps of one token, two of sixteen, and one of more than any bucket holds.
            step_tokens={1: 7, 16: 2, 20_000: 1},
        )

    def close(self) -> None:
        self.is_healthy = False


def loaded_of(engine: FakeEngine) -> Loaded:
    return Loaded(
        engine=engine,  # pyright: ignore[reportArgumentType]
        fingerprint="fp_1",
        block=128,
        num_compilations=lambda: 9,
    )


def service_of(load: Load | None = None, **settings: Any) -> Service:
    """Not begun. By default it loads at once."""
    return Service(
        ServerSettings(**settings),
        names=("google/tiny", "tiny:1b"),
        load=load or (lambda _: loaded_of(FakeEngine())),
    )


def begun(load: Load | None = None, **settings: Any) -> Service:
    """Begun, and ended with loading."""
    service, ended = service_of(load, **settings), threading.Event()
    service.begin(ended=ended.set)
    assert ended.wait(5)
    return service


def in_a_request[Result](do: Callable[[], Result]) -> Result:
    """Call something inside of a Quart request."""

    async def main() -> Result:
        async with Quart(__name__).test_request_context("/v1/completions", method="POST"):
            return do()

    return asyncio.run(main())


def refused(service: Service, key: Key | None = None) -> Problem:
    def attempt() -> Problem:
        with pytest.raises(Problem) as caught, service.admit(key):
            pass
        return caught.value

    return in_a_request(attempt)


# States.


def test_it_loads_and_is_ready():
    reports, may_go_on = list[tuple[str, int, int]](), threading.Event()

    def load(progress: Progress) -> Loaded:
        progress("loading weights", 1, 2)
        assert may_go_on.wait(5)
        return loaded_of(FakeEngine())

    ended = threading.Event()
    service = Service(
        ServerSettings(aliases=("tea", "tiny:1b")),
        names=("google/tiny", "tiny:1b"),
        load=load,
        progress=lambda *report: reports.append(report),
    )
    service.begin(ended=ended.set)
    assert (service.state, service.is_loading) == ("loading", True)
    problem = refused(service)
    assert (problem.status, problem.code) == (503, "model_loading")
    assert problem.headers == {"Retry-After": "5"}
    assert service.statistics() is None
    with pytest.raises(Problem, match="loading"):
        _ = service.engine
    may_go_on.set()
    assert ended.wait(5)
    assert (service.state, service.fingerprint) == ("ready", "fp_1")
    assert service.engine.is_healthy
    assert reports == [("loading weights", 1, 2)]
    assert service.names == ("google/tiny", "tiny:1b", "tea")


def test_whoever_comes_while_it_loads_is_told_when_that_should_end():
    goes_on, may_end = threading.Event(), threading.Event()

    def load(progress: Progress) -> Loaded:
        progress("compiling", 0, 41)
        time.sleep(0.2)
        progress("compiling", 1, 41)
        goes_on.set()
        assert may_end.wait(5)
        return loaded_of(FakeEngine())

    service = service_of(load)
    service.begin()
    assert goes_on.wait(5)
    # A fifth of a second and more for each of those that are left.
    assert int(refused(service).headers["Retry-After"]) >= 8
    may_end.set()
    service.wait_until_loaded(5.0)
    assert (service.state, service.retry_after) == ("ready", 1)


def test_a_stage_of_the_loading_ends_as_fast_as_it_went():
    now = [100.0]
    pace = Pace(clock=lambda: now[0])
    seen = list[float]()
    # Weights by their bytes, and then programs, of which the first two came from a cache.
    for moment, done, total in (
        (100, 0, 80), (102, 20, 80), (104, 40, 80), (105, 2, 12), (106, 2, 12), (108, 4, 12),
    ):  # fmt: skip
        now[0] = moment
        pace.report(done, total)
        seen.append(pace.seconds_left)
    assert seen == [UNKNOWN_WAIT, 6, 4, UNKNOWN_WAIT, UNKNOWN_WAIT, 12]
    now[0] = 109
    assert pace.seconds_left == 16, "what takes longer than foreseen is foreseen to take longer"


def test_what_keeps_it_from_loading_is_kept():
    fault = MemoryError("too big")

    def load(_: Progress) -> Loaded:
        raise fault

    service = begun(load)
    assert (service.state, service.error) == ("failed", fault)
    problem = refused(service)
    assert (problem.status, problem.code) == (503, "failed")
    assert "too big" not in problem.message
    assert "Retry-After" not in problem.headers


def test_an_engine_that_breaks_down_later_is_a_failure_too():
    service = begun()
    service.engine.close()
    assert service.state == "failed"
    assert refused(service).code == "failed"


def test_draining_lets_nothing_in_and_leaves_what_runs():
    service = begun(drain_seconds=20)

    def drain_in_the_middle() -> None:
        with service.admit(None):
            service.drain()
            assert service.state == "draining"
            assert service.engine.is_healthy, "what runs has its engine"
            assert 19 < service.drain_seconds_left <= 20

    in_a_request(drain_in_the_middle)
    problem = refused(service)
    assert (problem.status, problem.code) == (503, "shutting_down")
    assert problem.headers == {"Retry-After": "20"}
    service.close()
    assert service.state == "draining"
    assert not service.is_loading


def test_closing_breaks_loading_off_at_its_next_report():
    goes_on, seen = threading.Event(), list[int]()

    def load(progress: Progress) -> Loaded:
        for step in range(1000):
            progress("compiling", step, 1000)
            seen.append(step)
            goes_on.set()
            time.sleep(0.01)
        return loaded_of(FakeEngine())

    service = service_of(load)
    service.begin()
    assert goes_on.wait(5)
    begin = time.monotonic()
    service.close()
    assert time.monotonic() - begin < 2
    assert not service.is_loading
    assert len(seen) < 900
    assert service.error is None


def test_an_engine_that_is_there_only_after_closing_is_closed():
    engine, is_closed = FakeEngine(), threading.Event()

    def load(_: Progress) -> Loaded:
        assert is_closed.wait(5)
        return loaded_of(engine)

    service, ended = service_of(load), threading.Event()
    service.begin(ended=ended.set)
    service.close(timeout=0.01)
    assert service.is_loading
    is_closed.set()
    assert ended.wait(5)
    assert not engine.is_healthy


# Tickets.


def test_a_ticket_holds_places_and_gives_them_back():
    service = begun(max_queue=8)

    def hold() -> None:
        with service.admit(None) as ticket:
            assert service.queue.num_held == 1
            ticket.hold(6)
            ticket.start(prompt_tokens=5, n=2, max_tokens=10)
            assert service.queue.outstanding == 60
            ticket.tokens(20)
            assert service.queue.outstanding == 40
            with pytest.raises(Problem, match="full"), service.admit(None) as other:
                other.hold(3)
            assert service.queue.num_held == 6
            assert 599 < ticket.deadline - time.monotonic() <= 600

    in_a_request(hold)
    assert (service.queue.num_held, service.queue.outstanding) == (0, 0)
    assert service.metrics.value("refimpl:requests_rejected_total", reason="overloaded") == 1


def test_a_ticket_spends_the_budget_of_its_key():
    service = begun()
    key = Key("alice", b"", Budget(Allowance(tokens_per_minute=600, concurrency=1)))

    def spend() -> None:
        with service.admit(key) as ticket:
            assert refused_here(service, key).headers["Retry-After"] == "1"
            ticket.hold(2)
            ticket.start(prompt_tokens=100, n=2, max_tokens=50)
            assert key.budget.headers()["x-ratelimit-remaining-tokens"] == "400"
            ticket.tokens(10)
        with service.admit(key) as ticket, pytest.raises(Problem) as caught:
            ticket.start(prompt_tokens=1, n=1, max_tokens=600)
        assert (caught.value.status, caught.value.headers["x-should-retry"]) == (429, "false")

    def refused_here(service: Service, key: Key) -> Problem:
        with pytest.raises(Problem) as caught, service.admit(key):
            pass
        return caught.value

    in_a_request(spend)
    # 100 of the prompt and 10 that were made; some come back meanwhile.
    assert 490 <= int(key.budget.headers()["x-ratelimit-remaining-tokens"]) <= 500
    assert service.queue.num_held == 0


@pytest.mark.parametrize("error", [asyncio.CancelledError, GeneratorExit])
def test_a_client_that_leaves_is_counted_once_it_has_started(error):
    service = begun()

    def leave(*, is_started: bool) -> None:
        with service.admit(None) as ticket:
            if is_started:
                ticket.start(prompt_tokens=1, n=1, max_tokens=1)
            raise error

    with pytest.raises(error):
        in_a_request(lambda: leave(is_started=False))
    assert service.metrics.value("refimpl:requests_cancelled_total") == 0
    with pytest.raises(error):
        in_a_request(lambda: leave(is_started=True))
    assert service.metrics.value("refimpl:requests_cancelled_total") == 1
    assert service.queue.num_held == 0


def test_a_ticket_moves_the_counters_exactly():
    service = begun()

    def complete() -> None:
        with service.admit(None) as ticket:
            ticket.hold(2)
            ticket.start(prompt_tokens=7, n=2, max_tokens=16)
            ticket.admitted(time.monotonic())
            ticket.tokens(1, choice=0)
            ticket.tokens(1, choice=1)
            ticket.tokens(3, choice=0)
            ticket.finished(["stop", "length"])

    in_a_request(complete)
    value = service.metrics.value
    assert value("vllm:prompt_tokens_total") == 7
    assert value("vllm:generation_tokens_total") == 5
    assert value("vllm:request_success_total", finished_reason="stop") == 1
    assert value("vllm:request_success_total", finished_reason="length") == 1
    assert value("vllm:time_to_first_token_seconds_count") == 1
    assert value("vllm:inter_token_latency_seconds_count") == 3
    assert value("vllm:e2e_request_latency_seconds_count") == 1
    for phase in ("queue", "prefill", "decode", "inference"):
        assert value(f"vllm:request_{phase}_time_seconds_count") == 1
    assert value("vllm:request_prompt_tokens_sum") == 7
    assert value("vllm:request_generation_tokens_sum") == 5
    assert value("vllm:request_params_n_sum") == 2
    assert value("vllm:request_params_max_tokens_sum") == 16
    assert value("refimpl:requests_cancelled_total") == 0


def test_of_several_prompts_the_first_slot_counts():
    service = begun()

    def complete() -> None:
        with service.admit(None) as ticket:
            ticket.start(prompt_tokens=7, n=1, max_tokens=0)
            now = time.monotonic()
            for seconds in (2048, 1024, 4096):
                ticket.admitted(now + seconds)
            ticket.finished(["length", "length", "length"])

    in_a_request(complete)
    # Some microseconds have passed since the start, and a test machine may stand still.
    assert 1024 <= (service.metrics.value("vllm:request_queue_time_seconds_sum") or 0) < 1124


# Metrics.


def test_the_time_of_a_completion_is_divided_at_its_first_slot_and_token():
    metrics = Metrics("tiny", read=lambda: None)
    moments = Moments(
        came=1.0, sent=1.25, admitted=3.25, first_token=7.25, last_token=15.25, ended=15.5
    )
    metrics.finished(["stop"], tokens=5, moments=moments)
    # Nothing was to be computed, so it had no slot to wait for.
    metrics.finished(["length"], tokens=0, moments=replace(moments, admitted=None))
    names = ("queue_time", "prefill_time", "decode_time", "inference_time")
    sums = [metrics.value(f"vllm:request_{name}_seconds_sum") for name in names]
    assert sums == [2.0, 4.0, 2 * 8.0, 12.0]
    counts = [metrics.value(f"vllm:request_{name}_seconds_count") for name in names]
    assert counts == [1, 1, 2, 1]
    assert metrics.value("vllm:e2e_request_latency_seconds_sum") == 2 * 14.5
    # vLLM's buckets: its dashboards add up those of the same limit.
    assert metrics.value("vllm:request_queue_time_seconds_bucket", le="1.5") == 0
    assert metrics.value("vllm:request_queue_time_seconds_bucket", le="2.0") == 1
    assert metrics.value("vllm:request_queue_time_seconds_bucket", le="7680.0") == 1


def test_what_the_engine_knows_is_read_when_asked_for():
    value = begun().metrics.value
    assert value("vllm:num_requests_running") == 3
    assert value("vllm:num_requests_waiting") == 2
    assert value("vllm:kv_cache_usage_perc") == 0.75
    assert value("refimpl:slots") == 4
    assert value("refimpl:slots_in_use") == 3
    assert value("vllm:prefix_cache_queries_total") == 5 * 128
    assert value("vllm:prefix_cache_hits_total") == 3 * 128
    assert value("refimpl:prefix_cache_bytes") == 77
    assert value("refimpl:compilations_total") == 9
    assert value("vllm:iteration_tokens_total_count") == 7 + 2 + 1
    assert value("vllm:iteration_tokens_total_sum") == 7 * 1 + 2 * 16 + 20_000
    buckets = {"1.0": 7, "8.0": 7, "16.0": 9, "16384.0": 9, "+Inf": 10}
    for most, count in buckets.items():
        assert value("vllm:iteration_tokens_total_bucket", le=most) == count


def test_without_an_engine_there_are_the_other_figures():
    metrics = Metrics("tiny", read=lambda: None)
    metrics.replied(200)
    metrics.replied(None)
    metrics.replied(404)
    text = metrics.render().decode()
    assert 'refimpl:errors_total{model_name="tiny",status="404"} 1.0' in text
    assert 'status="200"' not in text
    assert "refimpl:slots" not in text
    assert metrics.value("vllm:generation_tokens_total") == 0


def test_two_services_count_apart():
    statistics: EngineStatistics | None = None
    one, other = (Metrics("tiny", read=lambda: statistics) for _ in range(2))
    one.cancelled()
    assert one.value("refimpl:requests_cancelled_total") == 1
    assert other.value("refimpl:requests_cancelled_total") == 0


# The access log.


@pytest.fixture
def lines() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """What has been logged since, as JSON."""
    written, logger = io.StringIO(), logging.getLogger(access_log.LOGGER)
    before = logger.handlers, logger.propagate, logger.level
    access_log.configure("json")
    logger.handlers[0].setStream(written)  # pyright: ignore[reportAttributeAccessIssue]
    yield lambda: [json.loads(line) for line in written.getvalue().splitlines()]
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])


def logged_app(service: Service) -> Quart:
    app = Quart(__name__)
    errors.register(app)

    @app.post("/v1/completions")
    async def complete() -> Response:  # pyright: ignore[reportUnusedFunction]
        with service.admit(None) as ticket:
            await request.get_data()
            ticket.start(prompt_tokens=3, n=1, max_tokens=4, user='a "b"\nc')
            ticket.tokens(2)
            ticket.finished(["length"])
        return Response("secret completion", headers={"x-request-id": "req_1"})

    @app.post("/slow")
    async def slow() -> str:  # pyright: ignore[reportUnusedFunction]
        await asyncio.sleep(30)
        return ""

    app.asgi_app = AccessLog(  # pyright: ignore[reportAttributeAccessIssue]
        app.asgi_app,  # pyright: ignore[reportArgumentType]
        ended=lambda trail: service.metrics.replied(trail.outcome),
    )
    return app


def post(app: Quart, path: str) -> int:
    async def sent() -> int:
        headers = Headers({"Authorization": "Bearer secret key"})
        client = app.test_client()
        return (await client.post(path, data=b"secret prompt", headers=headers)).status_code

    return asyncio.run(asyncio.wait_for(sent(), 10))


def test_a_line_says_what_a_request_came_to_and_no_secret(lines):
    assert post(logged_app(begun()), "/v1/completions") == 200
    [line] = lines()
    times = {name: line.pop(name) for name in ("time", "first_token_seconds", "total_seconds")}
    assert line == {
        "level": "info", "status": 200, "method": "POST", "path": "/v1/completions",
        "request_id": "req_1", "user": 'a "b"\nc', "prompt_tokens": 3, "completion_tokens": 2,
    }  # fmt: skip
    assert 0 < times["first_token_seconds"] <= times["total_seconds"] < 10
    assert "secret" not in json.dumps(lines())


def test_an_error_that_ends_a_stream_is_logged_and_counted_for_what_it_is(lines):
    service = begun()
    app = logged_app(service)

    @app.post("/broken")
    async def broken() -> str:  # pyright: ignore[reportUnusedFunction]
        with service.admit(None) as ticket:
            ticket.broke_off(504)
        return "data: an error"

    assert post(app, "/broken") == 200
    assert [(line["status"], line["stream_error"]) for line in lines()] == [(200, 504)]
    assert service.metrics.value("refimpl:errors_total", status="504") == 1


def test_an_error_is_counted_by_its_status(lines):
    service = begun()
    assert post(logged_app(service), "/nowhere") == 404
    assert [line["status"] for line in lines()] == [404]
    assert service.metrics.value("refimpl:errors_total", status="404") == 1


def test_a_client_that_leaves_gets_499(lines):
    service = begun()
    app = logged_app(service)

    async def leave() -> None:
        scope = {
            "type": "http", "http_version": "1.1", "method": "POST", "path": "/slow",
            "raw_path": b"/slow", "query_string": b"", "scheme": "http", "root_path": "",
            "headers": [], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
            "asgi": {"version": "3.0"}, "extensions": {},
        }  # fmt: skip
        messages = asyncio.Queue[dict[str, Any]]()
        messages.put_nowait({"type": "http.request", "body": b"", "more_body": False})
        messages.put_nowait({"type": "http.disconnect"})
        await app(scope, messages.get, messages.put)  # pyright: ignore[reportArgumentType]

    asyncio.run(asyncio.wait_for(leave(), 10))
    assert [line["status"] for line in lines()] == [499]
    assert service.metrics.value("refimpl:errors_total", status="499") == 1


def test_a_line_of_text_stays_one_line(lines):
    post(logged_app(begun()), "/v1/completions")
    del lines
    record = logging.LogRecord("x", logging.INFO, "x", 1, "", (), None)
    record.refimpl_fields = {"status": 200, "path": "/a b\nstatus=500", "user": 'say "hi"'}
    text = access_log.TextFormatter().format(record)
    assert text.split(" ", 1)[1] == ('status=200 path="/a b\\nstatus=500" user="say \\"hi\\""')
    assert "\n" not in text
