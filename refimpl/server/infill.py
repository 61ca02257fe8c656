"""Text for a gap: what comes between a prompt and a suffix.

Models that were trained for it (CodeGemma) are asked in their own form: `fim_request` makes the
request, and what it generates is the text. Every other Gemma knows only how to go on, and gets the
gap filled by posterior resampling, `infill`:

1. Draw candidates for the middle: go on from the prompt as the request says, `InfillLimits.
   candidates` times for each choice wanted (for each of `best_of`, if that is set), 128 at most.
   They are choices 0, 1, 2, ... of one request, so that they depend on nothing but its seed. At
   temperature 0 all of them would be the same, and one for each choice is drawn.
2. Cut them: a text that goes on for as long as it may rarely stops where the suffix begins. Each
   candidate offers up to `InfillLimits.cuts` texts: the whole, none at all, and what stands before
   places between its tokens, evenly spaced.
3. Score each text: the mean log-probability of all tokens of prompt + middle + suffix but the first
   one, which follows nothing. It is the sum that the posterior of the middle is proportional to,
   p(middle | prompt) p(suffix | prompt, middle), but for each token, as otherwise the shortest
   middle would nearly always win. A token that is likelier than the mean raises it, so that a
   middle may be long if it is fluent, until it gets in the way of the suffix.
4. Each candidate stands for its best text, and the n best candidates are the choices, best first.
   On ties the shorter text wins, and the lower candidate.

Bias, penalties, masks and temperature shape what is drawn; the scores are the model's own.

The seam. Prompt and middle keep their ids, those that the model has seen and made. The suffix is
encoded by itself, so that no token reaches over the seam before it. If the tokenizer would have
made one there, the model finds the suffix less likely; that holds for all middles that end alike.

The cost. With p, m and s tokens in prompt, middle and suffix, c candidates and k texts of each, up
to c m tokens are generated, and up to c k (p + m + s) scored, one text after the other in a slot.
Equal texts are scored once. For p = s = 100, m = 16 and the default limits of 8 and 4, that is 128
tokens generated and at most 25 x 216 = 5,400 scored.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from refimpl.engine.engine import Engine
from refimpl.engine.events import Choice, Completion, FinishReason, TokenLogprob, collect
from refimpl.engine.request import MAX_CHOICES, Request, SamplingParams
from refimpl.errors import InvalidRequestError, TokenizerError
from refimpl.server.middles import middles_of


@dataclass(frozen=True, kw_only=True)
class InfillLimits:
    """How much work an infill may be.

    Attributes:
        candidates: texts to draw for each choice, 1 to 128.
        cuts: texts that a candidate offers, itself among them; at least 1.
        suffix_tokens: most tokens of a suffix; at least 1.
    """

    candidates: int = 8
    cuts: int = 4
    suffix_tokens: int = 1024

    def __post_init__(self) -> None:
        """Refuse limits that no infill can keep.

        Raises:
            InvalidRequestError: naming the limit.
        """
        for name, most in (("candidates", MAX_CHOICES), ("cuts", 2**31), ("suffix_tokens", 2**31)):
            value = getattr(self, name)
            if not 1 <= value <= most:
                raise InvalidRequestError(
                    f"{name} must be from 1 to {most}, got {value}", parameter=name
                )


@dataclass(frozen=True)
class Infilled:
    """What filled the gap, and what that took.

    Attributes:
        completion: as of any request; prompt_tokens is of the prompt alone, and completion_tokens
            of all candidates, uncut. A choice that was cut has the finish_reason "stop" and no
            stop; its token_ids and logprobs are those that are left, as they were generated.
        suffix_tokens: length of the suffix.
        scored_tokens: in all texts that were scored.
    """

    completion: Completion
    suffix_tokens: int
    scored_tokens: int


def fim_request(
    engine: Engine, request: Request, *, suffix: str, limits: InfillLimits
) -> Request | None:
    """The request that fills a gap with a model that was trained to; None if it was not.

    `<bos>` comes first and once, whether the prompt has it or not. Besides the model's ends of
    text, every control piece of the form ends the middle, unless the request ignores them.

    Args:
        engine: has the model.
        request: its prompt is what comes before the gap.
        suffix: what comes after the gap.
        limits: of which only the suffix's length matters.

    Raises:
        InvalidRequestError: naming "suffix", if that is the one at fault.
    """
    form = engine.gemma.tokenizer.fill_in_the_middle
    if form is None:
        return None
    engine.check(request)
    suffix_ids = _suffix_ids(engine, suffix, limits)
    bos = engine.gemma.tokenizer.bos_id
    prefix_ids = request.prompt_ids[int(request.prompt_ids[0] == bos) :]
    params = request.params
    if not params.ignore_eos:
        ends = (form.file_separator, form.prefix, form.suffix, form.middle)
        params = replace(
            params, stop_token_ids=tuple(dict.fromkeys((*params.stop_token_ids, *ends)))
        )
    ids = (bos, form.prefix, *prefix_ids, form.suffix, *suffix_ids, form.middle)
    _check_room(engine, request, len(ids) - len(request.prompt_ids))
    return replace(request, prompt_ids=ids, params=params)


async def infill(
    engine: Engine, request: Request, *, suffix: str, limits: InfillLimits
) -> Infilled:
    """Fill the gap between a prompt and a suffix by posterior resampling.

    If anything is broken off, by the deadline or an error, so is the whole, and every choice says
    why. Cancelling the task frees all slots within one step.

    Args:
        engine: does all the work; others may use it meanwhile and change nothing.
        request: its prompt is what comes before the gap; its deadline is that of the whole.
        suffix: what comes after the gap.
        limits: of the work.

    Raises:
        InvalidRequestError: naming "suffix", if that is the one at fault.
        EngineError: the engine does not run, or failed meanwhile.
    """
    engine.check(request)
    suffix_ids = _suffix_ids(engine, suffix, limits)
    _check_room(engine, request, len(suffix_ids))
    drawn = await _complete(engine, _candidates(request, limits))
    scorer = _Scorer(engine, request, suffix_ids)
    try:
        choices = await _best(scorer, drawn, most=limits.cuts)
    except _BrokenOffError as broken:
        choices = [replace(choice, finish_reason=broken.reason) for choice in drawn.choices]
    kept = [
        replace(choice, index=index, logprobs=_wanted(request, choice))
        for index, choice in enumerate(choices[: request.params.n])
    ]
    return Infilled(replace(drawn, choices=tuple(kept)), len(suffix_ids), scorer.num_tokens)


class _BrokenOffError(Exception):
    """The deadline has passed, or numbers were not finite any more."""

    def __init__(self, reason: FinishReason) -> None:
        super().__init__(reason)
        self.reason: FinishReason = reason


class _Scorer:
    """Says how likely texts are, each distinct one at the price of one pass over it."""

    def __init__(self, engine: Engine, request: Request, suffix_ids: Sequence[int]) -> None:
        self.engine, self.num_tokens = engine, 0
        self.params = request.params
        self._suffix_ids = tuple(suffix_ids)
        self._request = replace(request, params=SamplingParams(max_tokens=0), prompt_logprobs=0)
        self._scores = dict[tuple[int, ...], float]()

    async def score(self, middle_ids: tuple[int, ...]) -> float:
        """Mean log-probability of prompt, these ids and suffix.

        It is minus infinity if there are too many of them, as there may be where a stop string's
        beginning made the end of a text be encoded anew.
        """
        ids = (*self._request.prompt_ids, *middle_ids, *self._suffix_ids)
        if len(ids) > self.engine.context:
            return -math.inf
        if ids not in self._scores:
            scored = await _complete(self.engine, replace(self._request, prompt_ids=ids))
            _check_unbroken(scored)
            assert scored.prompt_logprobs is not None, "they were asked for"
            self.num_tokens += len(ids)
            self._scores[ids] = fmean(
                entry.logprob for entry in scored.prompt_logprobs if entry is not None
            )
        return self._scores[ids]


async def _best(scorer: _Scorer, drawn: Completion, *, most: int) -> list[Choice]:
    """The best text of each candidate, the best candidate first."""
    _check_unbroken(drawn)
    best = list[tuple[float, Choice]]()
    for candidate in drawn.choices:
        middles = middles_of(scorer.engine.gemma.tokenizer, scorer.params, candidate, most=most)
        scored = [(await scorer.score(middle.ids), middle.choice) for middle in middles]
        best.append(max(scored, key=_score_of))
    # Both keep the order of equals.
    return [choice for _, choice in sorted(best, key=_score_of, reverse=True)]


def _score_of(scored: tuple[float, Choice]) -> float:
    return scored[0]


def _candidates(request: Request, limits: InfillLimits) -> Request:
    params = request.params
    each = limits.candidates if params.temperature > 0 else 1
    count = min(params.num_candidates * each, MAX_CHOICES)
    # Cuts need to know what the tokens that are left add up to.
    logprobs = params.logprobs or 0
    return replace(request, params=replace(params, n=count, best_of=None, logprobs=logprobs))


def _wanted(request: Request, choice: Choice) -> tuple[TokenLogprob, ...] | None:
    return None if request.params.logprobs is None else choice.logprobs


async def _complete(engine: Engine, request: Request) -> Completion:
    async with contextlib.aclosing(engine.generate(request)) as events:
        return collect(request, [event async for event in events])


def _check_unbroken(completion: Completion) -> None:
    for choice in completion.choices:
        if choice.finish_reason not in ("stop", "length"):
            raise _BrokenOffError(choice.finish_reason)


def _suffix_ids(engine: Engine, suffix: str, limits: InfillLimits) -> list[int]:
    try:
        ids = engine.gemma.tokenizer.encode(suffix, add_bos=False)
    except TokenizerError as error:
        raise InvalidRequestError(f"suffix: {error}", parameter="suffix") from error
    if not 1 <= len(ids) <= limits.suffix_tokens:
        raise InvalidRequestError(
            f"suffix must have from 1 to {limits.suffix_tokens} tokens, got {len(ids)}: shorten "
            "it, or leave it out if nothing follows",
            parameter="suffix",
        )
    return ids


def _check_room(engine: Engine, request: Request, added: int) -> None:
    num_prompt, max_tokens = len(request.prompt_ids), request.params.max_tokens
    if num_prompt + max_tokens + added > engine.context:
        raise InvalidRequestError(
            f"the engine takes {engine.context} tokens; the prompt has {num_prompt}, the suffix "
            f"adds {added} and max_tokens is {max_tokens}: shorten one of them",
            parameter="suffix",
        )
