"""Records that cross between host and device: one integer array each way, whatever they hold.

A transfer costs about the same for one number as for a thousand, so a program takes one array and
gives one. Floats travel as the integers that have their bits. This module writes and reads the
host's side, in NumPy; `refimpl.engine.programs` has the device's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refimpl.engine.request import MAX_TOP_LOGPROBS, SamplingParams

# Most ids that can end a text: the model's own and those of the request.
MAX_STOP_IDS = 32

ADMISSION_INTEGERS = (
    "slot", "token", "position", "last_position", "first_stop", "wants_top", "is_biased",
    "top_k", "choice", "seed_low", "seed_high",
)  # fmt: skip
ADMISSION_FLOATS = ("temperature", "top_p", "min_p", "frequency", "presence", "repetition")

# Of a step's row: token, whether the slot still runs, whether its numbers are finite, its
# log-probability, then the likeliest ids and theirs.
STEP_FIELDS = 4 + 2 * MAX_TOP_LOGPROBS
# Of a scored token: its log-probability, then the likeliest ids and theirs.
SCORE_FIELDS = 1 + 2 * MAX_TOP_LOGPROBS


@dataclass(frozen=True)
class StepRow:
    """What one step gave one slot.

    Attributes:
        token: the id drawn.
        is_running: whether the slot goes on.
        is_finite: whether every number behind the token was finite.
        logprob: raw log-probability of the token.
        top: the likeliest ids and their log-probabilities, if the slot wants them.
    """

    token: int
    is_running: bool
    is_finite: bool
    logprob: float
    top: tuple[tuple[int, float], ...]


def pack_admission(
    *,
    slot: int,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    seed: tuple[int, int],
    choice: int,
    stop_ids: Sequence[int],
    is_biased: bool,
) -> np.ndarray:
    """What a slot needs to know to begin: it is decoded from the prompt's last token on."""
    length = len(prompt_ids)
    low, high = np.array(seed, np.uint32).view(np.int32)
    integers = {
        "slot": slot,
        "token": prompt_ids[-1],
        "position": length - 1,
        "last_position": length - 1 + params.max_tokens,
        "first_stop": length + params.min_tokens,
        "wants_top": bool(params.logprobs),
        "is_biased": is_biased,
        "top_k": max(params.top_k, 0),
        "choice": choice,
        "seed_low": low,
        "seed_high": high,
    }
    floats = {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "frequency": params.frequency_penalty,
        "presence": params.presence_penalty,
        "repetition": params.repetition_penalty,
    }
    ends = np.full(MAX_STOP_IDS, -1, np.int32)
    ends[: len(stop_ids)] = stop_ids
    return np.concatenate([
        np.array([integers[name] for name in ADMISSION_INTEGERS], np.int32),
        np.array([floats[name] for name in ADMISSION_FLOATS], np.float32).view(np.int32),
        ends,
    ])  # fmt: skip


def unpack_step(row: np.ndarray) -> StepRow:
    """Read one row `[STEP_FIELDS]` of what a decode program gave."""
    token, is_running, is_finite = (int(value) for value in row[:3])
    floats = row.view(np.float32)
    return StepRow(token, bool(is_running), bool(is_finite), float(floats[3]), _top(row, start=4))


def unpack_score(row: np.ndarray) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Read one row `[SCORE_FIELDS]` of what a score program gave: log-probability and top list."""
    return float(row.view(np.float32)[0]), _top(row, start=1)


def _top(row: np.ndarray, *, start: int) -> tuple[tuple[int, float], ...]:
    middle = start + MAX_TOP_LOGPROBS
    ids, values = row[start:middle], row[middle:].view(np.float32)
    return tuple((int(i), float(value)) for i, value in zip(ids, values, strict=True) if i >= 0)
