"""What Prometheus is told. Names are vLLM's where it has them, so that its dashboards work.

Counters and histograms are filled in as requests go; what the engine knows is read when asked for.
`vllm:` times start when a request has come and end at tokens, as a client sees them; between the
two, it waits for a slot and its prompt is computed.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LABEL = "model_name"

# vLLM's buckets, in seconds.
_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160, 640, 2560,
)  # fmt: skip
_BETWEEN_TOKENS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
_WHOLE_REQUEST = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
_TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_CHOICES = (1, 2, 5, 10, 20, 50, 100)


@dataclass(frozen=True, kw_only=True)
class EngineStatistics:
    """How the engine stands.

    Attributes:
        running: requests of which every choice has a slot or has ended.
        waiting: requests of which some choice has no slot yet.
        slots: that there are.
        slots_in_use: of them.
        prefix_tokens_looked_up: tokens of whole blocks that were looked for in the prefix cache.
        prefix_tokens_found: of them.
        prefix_bytes: that the cache holds.
        compilations: programs compiled in this process.
        step_tokens: how many steps of the engine computed so many tokens.
    """

    running: int
    waiting: int
    slots: int
    slots_in_use: int
    prefix_tokens_looked_up: int
    prefix_tokens_found: int
    prefix_bytes: int
    compilations: int
    step_tokens: Mapping[int, int]


@dataclass(frozen=True, kw_only=True)
class Moments:
    """When a completion came to what, in seconds of `time.monotonic`.

    Attributes:
        came: its request.
        sent: to the engine.
        admitted: to a slot, the first one; None if nothing was to be computed.
        first_token: had come; of a completion without tokens, its end.
        last_token: as `first_token`.
        ended: all of it.
    """

    came: float
    sent: float
    admitted: float | None
    first_token: float
    last_token: float
    ended: float


class Metrics:
    """All that is counted and measured, in a registry of its own."""

    def __init__(self, model_name: str, *, read: Callable[[], EngineStatistics | None]) -> None:
        """Nothing counted yet.

        Args:
            model_name: value of the label of that name.
            read: how the engine stands now; None while there is none.
        """
        self._registry = CollectorRegistry()
        self._model_name = model_name
        self._registry.register(_EngineCollector(model_name, read))
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Tokens of prompts.")
        self._generation_tokens = self._counter("vllm:generation_tokens", "Tokens generated.")
        self._success = self._counter(
            "vllm:request_success", "Choices that ended as they should.", "finished_reason"
        )
        self._cancelled = self._counter(
            "refimpl:requests_cancelled", "Completions whose client left before their end."
        )
        self._rejected = self._counter(
            "refimpl:requests_rejected",
            "Completions that were refused for lack of room, by the error's code.",
            "reason",
        )
        self._errors = self._counter(
            "refimpl:errors",
            "Requests that ended with a status of 400 or above; 499, and errors of streams, too.",
            "status",
        )
        self._first_token = self._histogram(
            "vllm:time_to_first_token_seconds", "From coming to the first token.", _FIRST_TOKEN
        )
        self._between_tokens = self._histogram(
            "vllm:inter_token_latency_seconds",
            "From one token of a choice to the next.",
            _BETWEEN_TOKENS,
        )
        self._whole_request = self._histogram(
            "vllm:e2e_request_latency_seconds", "From coming to the last token.", _WHOLE_REQUEST
        )
        self._queue = self._histogram(
            "vllm:request_queue_time_seconds",
            "From going to the engine to the first slot.",
            _WHOLE_REQUEST,
        )
        self._prefill = self._histogram(
            "vllm:request_prefill_time_seconds",
            "From the first slot to the first token.",
            _WHOLE_REQUEST,
        )
        self._decode = self._histogram(
            "vllm:request_decode_time_seconds",
            "From the first token to the last.",
            _WHOLE_REQUEST,
        )
        self._inference = self._histogram(
            "vllm:request_inference_time_seconds",
            "From the first slot to the last token.",
            _WHOLE_REQUEST,
        )
        self._request_prompt_tokens = self._histogram(
            "vllm:request_prompt_tokens", "Tokens of a request's prompts.", _TOKENS
        )
        self._request_generation_tokens = self._histogram(
            "vllm:request_generation_tokens", "Tokens generated for a request.", _TOKENS
        )
        self._params_n = self._histogram("vllm:request_params_n", "The parameter n.", _CHOICES)
        self._params_max_tokens = self._histogram(
            "vllm:request_params_max_tokens", "The parameter max_tokens.", _TOKENS
        )

    def render(self) -> bytes:
        """Everything, in the format of Prometheus, of type `CONTENT_TYPE`."""
        return generate_latest(self._registry)

    def value(self, name: str, **labels: str) -> float | None:
        """One number by its sample's name; None if there is none."""
        return self._registry.get_sample_value(name, {LABEL: self._model_name, **labels})

    def started(self, *, prompt_tokens: int, n: int, max_tokens: int) -> None:
        """A completion's prompts go to the engine."""
        self._prompt_tokens.inc(prompt_tokens)
        self._request_prompt_tokens.observe(prompt_tokens)
        self._params_n.observe(n)
        self._params_max_tokens.observe(max_tokens)

    def first_token(self, seconds: float) -> None:
        """A completion's first token has come, so long after the request."""
        self._first_token.observe(seconds)

    def tokens(self, count: int, *, seconds_since_last: float | None) -> None:
        """Tokens of one choice have come together.

        Args:
            count: how many.
            seconds_since_last: from the token of this choice before them; None if they are first.
        """
        self._generation_tokens.inc(count)
        if seconds_since_last is not None:
            for _ in range(count):
                self._between_tokens.observe(seconds_since_last / count)

    def finished(self, reasons: Iterable[str], *, tokens: int, moments: Moments) -> None:
        """A completion has ended as it should.

        Args:
            reasons: why each choice ended.
            tokens: generated for it.
            moments: when it came to what.
        """
        for reason in reasons:
            self._success.labels(self._model_name, reason).inc()
        self._request_generation_tokens.observe(tokens)
        self._whole_request.observe(moments.ended - moments.came)
        self._decode.observe(moments.last_token - moments.first_token)
        if moments.admitted is not None:
            self._queue.observe(moments.admitted - moments.sent)
            self._prefill.observe(moments.first_token - moments.admitted)
            self._inference.observe(moments.last_token - moments.admitted)

    def cancelled(self) -> None:
        """A completion's client has left."""
        self._cancelled.inc()

    def rejected(self, reason: str) -> None:
        """A completion was refused for lack of room."""
        self._rejected.labels(self._model_name, reason).inc()

    def replied(self, status: int | None) -> None:
        """A request of any kind has ended."""
        if status is not None and status >= 400:
            self._errors.labels(self._model_name, str(status)).inc()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        counter = Counter(name, text, (LABEL, *labels), registry=self._registry)
        # One without labels of its own is there from the start, at 0.
        return counter if labels else counter.labels(self._model_name)

    def _histogram(self, name: str, text: str, buckets: tuple[int | float, ...]) -> Histogram:
        histogram = Histogram(name, text, (LABEL,), registry=self._registry, buckets=buckets)
        return histogram.labels(self._model_name)


class _EngineCollector(Collector):
    """Reads the engine when Prometheus asks."""

    def __init__(self, model_name: str, read: Callable[[], EngineStatistics | None]) -> None:
        self._model_name, self._read = model_name, read

    def collect(self) -> Iterator[Metric]:
        now = self._read()
        if now is None:
            return
        gauges = {
            "vllm:num_requests_running": ("Requests that run.", now.running),
            "vllm:num_requests_waiting": ("Requests that wait for a slot.", now.waiting),
            "vllm:kv_cache_usage_perc": (
                "Part of the slots, each of which has a cache of its own, that are in use; 0 to 1.",
                now.slots_in_use / now.slots,
            ),
            "refimpl:slots": ("Choices that can run at a time.", now.slots),
            "refimpl:slots_in_use": ("Slots that are taken.", now.slots_in_use),
            "refimpl:prefix_cache_bytes": ("Held by the prefix cache.", now.prefix_bytes),
        }
        counters = {
            "vllm:prefix_cache_queries": (
                "Tokens that were looked up in the prefix cache.",
                now.prefix_tokens_looked_up,
            ),
            "vllm:prefix_cache_hits": (
                "Tokens that were found in the prefix cache.",
                now.prefix_tokens_found,
            ),
            "refimpl:compilations": ("Programs compiled in this process.", now.compilations),
        }
        for kind, table in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (text, value) in table.items():
                family = kind(name, text, labels=(LABEL,))
                family.add_metric((self._model_name,), float(value))
                yield family
        yield self._step_tokens(now.step_tokens)

    def _step_tokens(self, steps: Mapping[int, int]) -> Metric:
        family = HistogramMetricFamily(
            "vllm:iteration_tokens_total",
            "Tokens that a step of the engine computed, of prompts or of choices.",
            labels=(LABEL,),
        )
        buckets = [
            (floatToGoString(most), float(sum(n for size, n in steps.items() if size <= most)))
            for most in (*_STEP_TOKENS, math.inf)
        ]
        total = float(sum(size * n for size, n in steps.items()))
        family.add_metric((self._model_name,), buckets, sum_value=total)
        return family

    def describe(self) -> Iterator[Metric]:
        """Nothing, so that registering it reads no engine."""
        return iter(())
