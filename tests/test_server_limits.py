"""Places, and what keys may use: against a clock that only moves when it is told to."""

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.server.errors import Problem
from refimpl.server.limits import HALF_LIFE, LONGEST_WAIT, Place, Queue, Throughput
from refimpl.server.rates import Allowance, Bucket, Budget


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# Throughput.


def test_throughput_is_tokens_a_busy_second():
    clock = Clock()
    throughput = Throughput(clock=clock)
    assert throughput.per_second is None
    throughput.set_busy(True)
    for _ in range(100):
        clock.now += 0.1
        throughput.add(5)
    # Each token weighs a little less by the end of the tenth of a second after it.
    assert throughput.per_second == pytest.approx(50, rel=0.01)
    throughput.set_busy(False)
    clock.now += 3600
    assert throughput.per_second == pytest.approx(50, rel=0.01), "idle time counts for nothing"


def test_throughput_follows_a_change_with_its_half_life():
    clock = Clock()
    throughput = Throughput(clock=clock)
    throughput.set_busy(True)

    def run(rate: int, seconds: float) -> None:
        for _ in range(int(seconds * 10)):
            clock.now += 0.1
            throughput.add(rate // 10)

    run(100, 20 * HALF_LIFE)
    run(20, HALF_LIFE)
    # Half of the weight is on 100 a second still, half on 20.
    assert throughput.per_second == pytest.approx(60, rel=0.01)


# The queue.


def refused(queue: Queue, choices: int = 1) -> Problem:
    with pytest.raises(Problem) as caught, queue.reserve(choices):
        pass
    return caught.value


def test_a_full_queue_says_so_and_when_to_come_again():
    clock = Clock()
    queue = Queue(4, clock=clock)
    with queue.reserve(4) as place:
        place.expect(1000)
        for _ in range(10):
            clock.now += 1
            place.made(10)
        problem = refused(queue)
        assert (problem.status, problem.type, problem.code) == (503, "server_error", "overloaded")
        # 900 tokens to come, a quarter of which frees a place, at 10 a second (a little more,
        # since what was made last weighs most).
        assert 22 <= int(problem.headers["Retry-After"]) <= 23
        assert "4 of 4 places" in problem.message
        # Two places take twice as long.
        assert 43 <= int(refused(queue, 2).headers["Retry-After"]) <= 45
    with queue.reserve(4):
        assert queue.num_held == 4
    assert (queue.num_held, queue.num_requests, queue.outstanding) == (0, 0, 0)


def test_the_wait_is_one_second_if_nothing_is_measured_and_two_minutes_at_most():
    clock = Clock()
    queue = Queue(1, clock=clock)
    with queue.reserve() as place:
        place.expect(10**6)
        assert refused(queue).headers["Retry-After"] == "1"
        clock.now += 1
        place.made(1)
        assert refused(queue).headers["Retry-After"] == str(LONGEST_WAIT)


def test_what_can_never_fit_is_a_mistake_of_the_request():
    queue = Queue(4)
    with queue.reserve() as place:
        with pytest.raises(Problem, match=r"makes 5 choices at a time.*at most 4") as caught:
            place.resize(5)
        assert place.choices == 1
    assert (caught.value.status, caught.value.param) == (400, "prompt")
    assert queue.num_held == 0


def test_more_places_than_are_left_leave_what_is_held():
    queue = Queue(4)
    with queue.reserve(2), queue.reserve() as place:
        with pytest.raises(Problem, match=r"needs 2 more"):
            place.resize(3)
        assert (place.choices, queue.num_held) == (1, 3)
        place.resize(2)
        assert queue.num_held == 4


def test_what_keeps_everybody_out_comes_before_room():
    def closed() -> None:
        raise Problem(503, "closed", code="shutting_down")

    assert refused(Queue(4, check=closed)).code == "shutting_down"


def test_a_queue_that_empties_wakes_who_waits_for_that():
    async def main() -> list[str]:
        queue, seen = Queue(2), list[str]()
        await queue.wait_until_empty()

        async def wait() -> None:
            await queue.wait_until_empty()
            seen.append("empty")

        with queue.reserve():
            waiting = asyncio.create_task(wait())
            await asyncio.sleep(0)
            seen.append("held")
        await asyncio.wait_for(waiting, 5)
        return seen

    assert asyncio.run(main()) == ["held", "empty"]


@given(
    st.integers(1, 20),
    st.lists(st.tuples(st.sampled_from(["open", "resize", "close"]), st.integers(0, 25))),
)
def test_a_queue_never_holds_more_than_it_has_and_forgets_nothing(most, actions):
    queue = Queue(most)
    held = list[tuple[ExitStack, Place]]()

    def others(place: Place | None) -> int:
        return sum(each.choices for _, each in held if each is not place)

    def attempt(place: Place | None, choices: int, do: Callable[[], object]) -> None:
        room = most - others(place)
        if choices <= room:
            do()
        else:
            with pytest.raises(Problem) as caught:
                do()
            assert caught.value.status == (400 if choices > most else 503)

    def open_one() -> None:
        stack = ExitStack()
        held.append((stack, stack.enter_context(queue.reserve(number))))

    for action, number in actions:
        if action == "open":
            attempt(None, number, open_one)
        elif held and action == "resize":
            place = held[number % len(held)][1]
            attempt(place, number, partial(place.resize, number))
        elif held:
            held.pop(number % len(held))[0].close()
        assert queue.num_held == others(None) <= most
        assert queue.num_requests == len(held)
    for stack, _ in held:
        stack.close()
    assert (queue.num_held, queue.num_requests) == (0, 0)


# Budgets of keys.


def limited(budget: Budget) -> Problem:
    with pytest.raises(Problem) as caught, budget.spend():
        pass
    return caught.value


def test_requests_of_a_minute():
    clock = Clock()
    budget = Budget(Allowance(requests_per_minute=2), clock=clock)
    for _ in range(2):
        with budget.spend():
            pass
    problem = limited(budget)
    assert (problem.status, problem.type, problem.code) == (
        429, "rate_limit_exceeded", "rate_limit_exceeded",
    )  # fmt: skip
    assert problem.headers == {
        "Retry-After": "30",
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "1m0s",
    }
    clock.now += 29.5
    assert limited(budget).headers["Retry-After"] == "1"
    clock.now += 0.5
    with budget.spend():
        pass


def test_requests_at_a_time():
    budget = Budget(Allowance(concurrency=2))
    with budget.spend(), budget.spend():
        problem = limited(budget)
        assert (problem.status, problem.headers["Retry-After"]) == (429, "1")
        assert "2 requests of this key are running" in problem.message
    with budget.spend(), budget.spend():
        pass


def test_tokens_are_taken_first_and_what_was_not_used_comes_back():
    clock = Clock()
    budget = Budget(Allowance(tokens_per_minute=600), clock=clock)
    with budget.spend() as expense:
        expense.expect(400)
        assert budget.headers()["x-ratelimit-remaining-tokens"] == "200"
        with (
            pytest.raises(Problem, match=r"come to 500 tokens.*200 are left") as caught,
            budget.spend() as other,
        ):
            other.expect(500)
        # 300 are missing, and 10 come back a second.
        assert caught.value.headers["Retry-After"] == "30"
        expense.use(150)
    assert budget.headers() == {
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "450",
        "x-ratelimit-reset-tokens": "15s",
    }


def test_a_request_beyond_the_whole_budget_is_not_to_be_sent_again():
    budget = Budget(Allowance(tokens_per_minute=600))
    with (
        pytest.raises(Problem, match=r"601 tokens, and this key has 600 a minute") as caught,
        budget.spend() as expense,
    ):
        expense.expect(601)
    assert caught.value.status == 429
    assert caught.value.headers["x-should-retry"] == "false"
    assert budget.headers()["x-ratelimit-remaining-tokens"] == "600"


def test_no_limits_no_headers():
    budget = Budget(Allowance())
    with budget.spend() as expense:
        expense.expect(10**9)
        assert budget.headers() == {}


@given(
    st.integers(1, 100),
    st.lists(st.tuples(st.floats(0, 100), st.integers(1, 60)), max_size=40),
)
def test_nobody_gets_more_of_a_bucket_than_it_held_and_what_flowed_in(limit, steps):
    clock = Clock()
    bucket = Bucket(limit, clock=clock)
    taken = 0
    for seconds, amount in steps:
        clock.now += seconds
        wait = bucket.seconds_until(amount)
        if wait == 0:
            bucket.take(amount)
            taken += amount
        elif amount <= limit:
            # The wait is neither too short nor too long.
            clock.now += wait + 1e-6
            assert bucket.seconds_until(amount) == 0
        assert taken <= limit * (1 + (clock.now - 1000) / 60) + 1e-6
        assert 0 <= bucket.remaining <= limit
        assert 0 <= bucket.seconds_until_full <= 60 + 1e-6
