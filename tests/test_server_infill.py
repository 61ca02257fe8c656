"""Text for a gap by posterior resampling, held to its definition."""

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import pytest

from refimpl.engine.engine import Engine
from refimpl.engine.events import Choice, Completion, TokenLogprob
from refimpl.engine.request import Request, SamplingParams
from refimpl.errors import InvalidRequestError
from refimpl.server import infill as infill_module
from refimpl.server.infill import Infilled, InfillLimits, fim_request, infill
from refimpl.server.middles import middles_of
from tests.coders import coder_engine
from tests.engines import CONTEXT, prompt_ids, request_of, tiny_engine, tiny_gemma

# The first test that needs an engine compiles its programs.
pytestmark = pytest.mark.timeout(900)

SECONDS = 60.0
SUFFIX = " AND SO ON."
LIMITS = InfillLimits(candidates=3, cuts=100)
# Capital letters never merge, so that any text of them has one way to be encoded.
LETTERS = tuple(tiny_gemma("gemma3").tokenizer.encode("ABCDEFGHIJKLMNOPQRSTUVWXYZ", add_bos=False))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with tiny_engine() as started:
        yield started


@pytest.fixture(scope="module")
def coder(engine: Engine) -> Iterator[Engine]:
    del engine  # Its programs are compiled by now.
    with coder_engine() as started:
        yield started


def letters(seed: int, **params: Any) -> Request:
    """A request whose middle is of capital letters, and may end."""
    allowed = (*LETTERS, *tiny_gemma("gemma3").eos_ids)
    given = {"max_tokens": 7, "seed": seed, "allowed_token_ids": allowed, "temperature": 1.5}
    return request_of(prompt_ids(seed, 12), **given | params)


def filled(
    engine: Engine, request: Request, *, suffix: str = SUFFIX, limits: InfillLimits = LIMITS
) -> Infilled:
    return asyncio.run(infill(engine, request, suffix=suffix, limits=limits))


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.002)


# By its definition


def mean_logprob(engine: Engine, ids: Sequence[int]) -> float:
    return fmean(entry.logprob for entry in engine.score(ids) if entry is not None)


def drawn(engine: Engine, request: Request, count: int) -> Completion:
    """The candidates, as the engine itself makes them."""
    params = replace(request.params, n=count, best_of=None, logprobs=request.params.logprobs or 0)
    return engine.complete(request.prompt_ids, params)


def every_text(engine: Engine, request: Request, candidate: Choice) -> list[tuple[float, Choice]]:
    """All that a candidate of capital letters offers, each with its score."""
    tokenizer = engine.gemma.tokenizer
    suffix_ids = tokenizer.encode(SUFFIX, add_bos=False)
    ids = tuple(i for i in candidate.token_ids if i not in engine.gemma.eos_ids)
    texts = list[tuple[float, Choice]]()
    for count in range(len(ids) + 1):
        kept = candidate
        if count < len(ids):
            assert candidate.logprobs is not None
            logprobs = candidate.logprobs[:count]
            kept = replace(
                candidate,
                text=tokenizer.decode(ids[:count]),
                token_ids=ids[:count],
                logprobs=logprobs,
                finish_reason="stop",
                stop=None,
                mean_logprob=sum(e.logprob for e in logprobs) / count if count else None,
            )
        whole = (*request.prompt_ids, *ids[:count], *suffix_ids)
        texts.append((mean_logprob(engine, whole), kept))
    return texts


@pytest.mark.parametrize(
    ("n", "best_of", "count"), [(1, None, 3), (2, None, 6), (1, 2, 6), (3, 4, 12)]
)
def test_the_best_texts_of_the_best_candidates_win(
    engine: Engine, n: int, best_of: int | None, count: int
) -> None:
    request = letters(7, n=n, best_of=best_of, logprobs=2)
    got = filled(engine, request)
    candidates = drawn(engine, request, count)
    offers = [every_text(engine, request, candidate) for candidate in candidates.choices]
    best = [max(texts, key=lambda each: each[0]) for texts in offers]
    best.sort(key=lambda each: -each[0])
    wanted = [replace(choice, index=index) for index, (_, choice) in enumerate(best[:n])]
    assert list(got.completion.choices) == wanted
    assert got.completion.completion_tokens == candidates.completion_tokens
    assert got.completion.prompt_tokens == 12
    assert got.suffix_tokens == len(engine.gemma.tokenizer.encode(SUFFIX, add_bos=False))
    distinct = {choice.text for texts in offers for _, choice in texts}
    total = sum(12 + len(text) + got.suffix_tokens for text in distinct)
    assert got.scored_tokens == total


def test_texts_end_in_each_of_the_three_ways(engine: Engine) -> None:
    """Cut, at an end of text, and at `max_tokens`; so the test above saw them all."""
    ends = set[tuple[str, str]]()
    for seed in range(12):
        for choice in filled(engine, letters(seed, n=2)).completion.choices:
            kind = "none" if choice.stop is None else "end of text"
            ends.add((choice.finish_reason, kind))
            assert choice.logprobs is None
    assert ends == {("stop", "none"), ("stop", "end of text"), ("length", "none")}


def test_a_text_is_cut_where_the_suffix_goes_on(engine: Engine) -> None:
    """A short prompt, for in the mean over a long unlikely one every likely token is welcome."""
    greedy = request_of(
        (2,), temperature=0.0, max_tokens=12, ignore_eos=True, allowed_token_ids=LETTERS
    )
    ids = engine.complete(greedy.prompt_ids, greedy.params).choices[0].token_ids
    for count in (3, 5, 9):
        suffix = engine.gemma.tokenizer.decode(ids[count:])
        (choice,) = filled(engine, greedy, suffix=suffix).completion.choices
        # What follows the cut is what the model itself finds likeliest at each place.
        assert choice.token_ids == ids[:count]
        assert choice.text + suffix == engine.gemma.tokenizer.decode(ids)
        assert (choice.finish_reason, choice.stop) == ("stop", None)


def test_at_temperature_0_one_candidate_does_for_each_choice(engine: Engine) -> None:
    request = letters(2, temperature=0.0, n=2, ignore_eos=True, allowed_token_ids=LETTERS)
    got = filled(engine, request).completion
    assert got.completion_tokens == 2 * 7
    first, second = got.choices
    assert second == replace(first, index=1)


def test_there_are_never_more_candidates_than_a_request_has_choices(engine: Engine) -> None:
    request = letters(3, n=20, max_tokens=1)
    got = filled(engine, request, limits=InfillLimits(candidates=8, cuts=1))
    assert got.completion.completion_tokens == 128
    assert [choice.index for choice in got.completion.choices] == list(range(20))


def test_a_prompt_s_own_score_comes_too(engine: Engine) -> None:
    request = replace(letters(4), prompt_logprobs=2)
    assert filled(engine, request).completion.prompt_logprobs == engine.score(
        request.prompt_ids, top=2
    )
    assert filled(engine, letters(4)).completion.prompt_logprobs is None


def test_no_tokens_leave_no_text(engine: Engine) -> None:
    got = filled(engine, letters(5, max_tokens=0, n=2))
    assert [(c.text, c.finish_reason) for c in got.completion.choices] == [("", "length")] * 2
    assert got.completion.completion_tokens == 0
    assert got.scored_tokens == 12 + got.suffix_tokens


# What it depends on


def test_it_depends_on_the_seed_alone(engine: Engine) -> None:
    requests = [letters(seed, n=2, logprobs=1) for seed in range(4)]
    alone = [filled(engine, request) for request in requests]

    async def together() -> list[Infilled]:
        noise = [
            engine.complete_async([2, 9, number], SamplingParams(max_tokens=60, n=5))
            for number in range(5)
        ]
        others = asyncio.gather(*noise)
        tasks = (infill(engine, each, suffix=SUFFIX, limits=LIMITS) for each in requests)
        results = await asyncio.gather(*tasks)
        await others
        return results

    assert asyncio.run(together()) == alone
    assert filled(engine, replace(requests[0], params=requests[1].params)) != alone[0]


# How it ends


@pytest.mark.parametrize("seconds", [0.001, 0.01, 0.03, 0.1])
def test_a_cancelled_task_frees_its_slots(engine: Engine, seconds: float) -> None:
    async def give_up() -> None:
        request = letters(6, n=4, max_tokens=200, ignore_eos=True, allowed_token_ids=LETTERS)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(seconds):
                await infill(engine, request, suffix=SUFFIX, limits=LIMITS)

    asyncio.run(give_up())
    worker = engine.worker
    assert worker is not None
    wait_until(lambda: worker.num_in_flight == 0)
    assert worker.scheduler.num_free == 16
    assert worker.scheduler.is_idle


def test_a_deadline_breaks_off_the_whole(engine: Engine) -> None:
    got = filled(engine, replace(letters(8, n=2), deadline=time.monotonic() - 1))
    ends = [(c.index, c.text, c.finish_reason) for c in got.completion.choices]
    assert ends == [(0, "", "deadline"), (1, "", "deadline")]
    assert (got.completion.completion_tokens, got.scored_tokens) == (0, 0)


@pytest.mark.parametrize("reason", ["deadline", "error"])
def test_a_score_that_is_broken_off_breaks_off_the_whole(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, reason: Any
) -> None:
    complete = infill_module._complete
    calls = list[Request]()

    async def breaks(on: Engine, request: Request) -> Completion:
        calls.append(request)
        whole = await complete(on, request)
        if len(calls) < 4:
            return whole
        broken = tuple(replace(choice, finish_reason=reason) for choice in whole.choices)
        return replace(whole, choices=broken, prompt_logprobs=None)

    monkeypatch.setattr(infill_module, "_complete", breaks)
    request = replace(letters(8, n=2), deadline=time.monotonic() + 1000)
    got = filled(engine, request)
    assert [choice.finish_reason for choice in got.completion.choices] == [reason] * 2
    assert got.completion.completion_tokens > 0
    # The two scores before it.
    assert got.scored_tokens == sum(len(call.prompt_ids) for call in calls[1:3])
    assert [call.deadline for call in calls] == [request.deadline] * 4


# What is refused


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        ("", "suffix must have from 1 to 20 tokens, got 0"),
        ("ABCDEFGHIJKLMNOPQRSTU", "suffix must have from 1 to 20 tokens, got 21"),
        ("A\ud800", "suffix: the text has a lone surrogate"),
    ],
)
def test_suffixes_that_are_refused(
    engine: Engine, coder: Engine, suffix: str, message: str
) -> None:
    limits = InfillLimits(suffix_tokens=20)
    with pytest.raises(InvalidRequestError, match=message) as caught:
        filled(engine, letters(1), suffix=suffix, limits=limits)
    assert caught.value.parameter == "suffix"
    with pytest.raises(InvalidRequestError, match=message) as caught:
        fim_request(coder, letters(1), suffix=suffix, limits=limits)
    assert caught.value.parameter == "suffix"
    assert fim_request(engine, letters(1), suffix=suffix, limits=limits) is None


def test_prompt_suffix_and_middle_must_fit_together(engine: Engine, coder: Engine) -> None:
    room = CONTEXT - 12 - 4
    longest = letters(1, max_tokens=room)
    with pytest.raises(InvalidRequestError, match="384 tokens; the prompt has 12, the suffix "
                       "adds 5 and max_tokens is 368") as caught:  # fmt: skip
        filled(engine, longest, suffix="ABCDE")
    assert caught.value.parameter == "suffix"
    with pytest.raises(InvalidRequestError, match="adds 8 and max_tokens is 365") as caught:
        fim_request(coder, letters(1, max_tokens=room - 3), suffix="ABCDE", limits=LIMITS)
    assert caught.value.parameter == "suffix"
    form = fim_request(coder, letters(1, max_tokens=room - 4), suffix="ABCDE", limits=LIMITS)
    assert form is not None
    coder.check(form)
    # What would not fit without a suffix either is not the suffix's fault.
    with pytest.raises(InvalidRequestError) as caught:
        filled(engine, letters(1, max_tokens=CONTEXT))
    assert caught.value.parameter == "max_tokens"


@pytest.mark.parametrize("limits", [{"candidates": 0}, {"candidates": 129}, {"cuts": 0},
                                    {"suffix_tokens": 0}])  # fmt: skip
def test_limits_that_nothing_can_keep(limits: dict[str, int]) -> None:
    ((name, _),) = limits.items()
    with pytest.raises(InvalidRequestError, match=f"{name} must be from 1 to") as caught:
        InfillLimits(**limits)
    assert caught.value.parameter == name


# Where a text may be cut


def candidate_of(
    ids: Sequence[int], *, text: str | None = None, stop: str | int | None = None
) -> Choice:
    """A candidate that the engine might have made of these ids."""
    decoded = tiny_gemma("gemma3").tokenizer.decode(ids, skip_special=True)
    return Choice(
        index=0,
        text=decoded if text is None else text,
        token_ids=tuple(ids),
        logprobs=tuple(TokenLogprob(i, -1.0 - n, ()) for n, i in enumerate(ids)),
        finish_reason="length" if stop is None else "stop",
        stop=stop,
        mean_logprob=-math.pi,
    )


def texts_of(candidate: Choice, *, most: int = 100, **params: Any) -> list[str]:
    tokenizer = tiny_gemma("gemma3").tokenizer
    middles = middles_of(tokenizer, SamplingParams(**params), candidate, most=most)
    assert middles[-1].choice is candidate
    for middle in middles:
        # What is scored reads like what is returned.
        assert tokenizer.decode(middle.ids, skip_special=True) == middle.choice.text
    return [middle.choice.text for middle in middles]


def ids_of(text: str) -> list[int]:
    return tiny_gemma("gemma3").tokenizer.encode(text, add_bos=False)


def test_a_text_is_cut_between_any_two_tokens() -> None:
    candidate = candidate_of(ids_of("ABCD"))
    assert texts_of(candidate) == ["", "A", "AB", "ABC", "ABCD"]
    assert texts_of(candidate, min_tokens=2) == ["AB", "ABC", "ABCD"]
    middles = middles_of(tiny_gemma("gemma3").tokenizer, SamplingParams(), candidate, most=9)
    cut = middles[2].choice
    assert (cut.token_ids, cut.mean_logprob) == (candidate.token_ids[:2], -1.5)
    assert candidate.logprobs is not None
    assert cut.logprobs == candidate.logprobs[:2]
    assert (cut.finish_reason, cut.stop) == ("stop", None)
    assert middles[0].choice.mean_logprob is None


def test_of_many_cuts_some_are_kept() -> None:
    candidate = candidate_of(ids_of("ABCDEFGH"))
    assert texts_of(candidate, most=1) == ["ABCDEFGH"]
    assert texts_of(candidate, most=2) == ["", "ABCDEFGH"]
    assert texts_of(candidate, most=3) == ["", "ABCD", "ABCDEFGH"]
    assert texts_of(candidate, most=5) == ["", "AB", "ABCD", "ABCDEF", "ABCDEFGH"]
    assert len(texts_of(candidate, most=8)) == 8
    assert len(texts_of(candidate, most=9)) == 9
    assert texts_of(candidate, most=3, min_tokens=4) == ["ABCD", "ABCDEF", "ABCDEFGH"]


def test_no_character_is_cut_in_two() -> None:
    ids = ids_of("AøB")
    assert len(ids) == 4
    assert texts_of(candidate_of(ids)) == ["", "A", "Aø", "AøB"]
    # One that breaks off is spelt as it is returned.
    assert texts_of(candidate_of(ids[:2])) == ["", "A", "A\ufffd"]


def test_an_end_of_text_is_not_scored() -> None:
    (eos, *_) = tiny_gemma("gemma3").eos_ids
    candidate = candidate_of([*ids_of("AB"), eos], stop=eos)
    assert texts_of(candidate) == ["", "A", "AB"]
    whole = middles_of(tiny_gemma("gemma3").tokenizer, SamplingParams(), candidate, most=9)[-1]
    assert whole.ids == candidate.token_ids[:2]


def test_a_stop_string_is_scored_as_far_as_it_is_returned() -> None:
    the = ids_of(" the")
    assert len(the) == 1
    cut_off = candidate_of([*ids_of("AB"), *the, *ids_of("C")][:3], text="AB t", stop="he")
    assert texts_of(cut_off, stop=("he",)) == ["", "A", "AB", "AB t"]
    nothing = candidate_of(the, text="", stop=" the")
    assert texts_of(nothing, stop=(" the",)) == [""]
    kept = candidate_of([*ids_of("AB"), *the], stop="he")
    assert texts_of(kept, stop=("he",), include_stop_str_in_output=True) == [
        "", "A", "AB", "AB the",
    ]  # fmt: skip
