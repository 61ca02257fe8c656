"""A request's prompts: from any of the six forms to ids, and to the text that they are.

Owns the beginning of text: a text gets it exactly once, ids are taken as they are. What is echoed
of a text is that text; what is echoed of ids is what they spell.
"""

import asyncio
from dataclasses import dataclass

from refimpl.engine.engine import Engine
from refimpl.errors import TokenizerError
from refimpl.server.contract import CompletionRequest
from refimpl.server.errors import Problem, refusal
from refimpl.server.schema import brief
from refimpl.server.vocabulary import Tokenizer

# Encoding so many characters takes some milliseconds, which is long for an event loop.
_LONG = 10_000


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        ids: as the model gets them.
        text: as it is echoed, and as offsets count it.
        is_bos_ours: the first id is a beginning of text that the server put there, which is no
            part of the text however special tokens are spelt.
        warning: what is likely a mistake of the client, or "".
    """

    ids: tuple[int, ...]
    text: str
    is_bos_ours: bool
    warning: str = ""


async def read_prompts(request: CompletionRequest, engine: Engine) -> list[Prompt]:
    """The prompts in the request's order.

    Raises:
        Problem: 400, naming the prompt, or what is too long together with it.
    """
    reader = _Reader(request, engine)
    raw = _listed(request.prompt)
    if sum(len(each) for each in raw if isinstance(each, str)) > _LONG:
        return await asyncio.to_thread(reader.read_all, raw)
    return reader.read_all(raw)


def _listed(prompt: str | list[str] | list[int] | list[list[int]] | None) -> list[str | list[int]]:
    if prompt is None:
        return [""]
    if isinstance(prompt, str):
        return [prompt]
    ids = [each for each in prompt if isinstance(each, int)]
    return [ids] if ids else [each for each in prompt if not isinstance(each, int)]


class _Reader:
    """What one request says about all of its prompts."""

    def __init__(self, request: CompletionRequest, engine: Engine) -> None:
        self._request, self._context = request, engine.context
        self._tokenizer: Tokenizer = engine.gemma.tokenizer
        self._vocab_size = engine.gemma.vocab_size

    def read_all(self, raw: list[str | list[int]]) -> list[Prompt]:
        return [self._read(each) for each in raw]

    def _read(self, raw: str | list[int]) -> Prompt:
        prompt = self._of_text(raw) if isinstance(raw, str) else self._of_ids(raw)
        prompt = self._truncated(prompt)
        if not prompt.ids:
            raise refusal(
                "the prompt has no token: give text, or leave 'add_special_tokens' and "
                "'truncate_prompt_tokens' out",
                "prompt",
            )
        self._check_length(len(prompt.ids))
        return prompt

    def _of_text(self, text: str) -> Prompt:
        is_bos_ours = self._request.add_special_tokens
        try:
            ids = self._tokenizer.encode(text, add_bos=is_bos_ours)
        except TokenizerError as error:
            raise refusal(str(error), "prompt") from None
        return Prompt(tuple(ids), text, is_bos_ours)

    def _of_ids(self, ids: list[int]) -> Prompt:
        strange = next((i for i in ids if i >= self._vocab_size), None)
        if strange is not None:
            raise refusal(
                f"token id {brief(strange)} is out of vocabulary: ids go from 0 to "
                f"{self._vocab_size - 1} - 'prompt'",
                "prompt",
            )
        return Prompt(tuple(ids), self._spelt(ids), is_bos_ours=False, warning=self._warning(ids))

    def _truncated(self, prompt: Prompt) -> Prompt:
        most = self._request.truncate_prompt_tokens
        if most == -1:
            most = max(self._context - self._request.max_tokens, 0)
        if most is None or len(prompt.ids) <= most:
            return prompt
        cut = len(prompt.ids) - most
        is_left = self._request.truncation_side == "left"
        ids = prompt.ids[cut:] if is_left else prompt.ids[:most]
        is_bos_ours = prompt.is_bos_ours and not is_left and most > 0
        return Prompt(
            ids, self._spelt(ids[int(is_bos_ours) :]), is_bos_ours, warning=self._warning(ids)
        )

    def _spelt(self, ids: list[int] | tuple[int, ...]) -> str:
        try:
            return self._tokenizer.decode(ids, skip_special=self._request.skip_special_tokens)
        except TokenizerError as error:
            raise refusal(str(error), "prompt") from None

    def _warning(self, ids: list[int] | tuple[int, ...]) -> str:
        bos = self._tokenizer.bos_id
        if ids[:1] == [bos] or ids[:1] == (bos,):
            return ""
        return f"a prompt does not begin with the beginning of text, id {bos}"

    def _check_length(self, num_prompt: int) -> None:
        max_tokens = self._request.max_tokens
        if num_prompt + max_tokens <= self._context:
            return
        raise _too_long(self._context, num_prompt, max_tokens)


def _too_long(context: int, num_prompt: int, max_tokens: int) -> Problem:
    return refusal(
        f"This model's maximum context length is {context} tokens, and you asked for "
        f"{brief(num_prompt + max_tokens)}: {num_prompt} in the prompt and {brief(max_tokens)} for "
        "the completion. Shorten the prompt or lower max_tokens.",
        "prompt" if num_prompt > context else "max_tokens",
        code="context_length_exceeded",
    )
