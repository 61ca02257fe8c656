"""Which fast path each operation takes. An explicit choice, made where a program is built."""

from dataclasses import dataclass
from typing import Literal

import jax
from refimpl_kernels.attention import AttentionImplementation
from refimpl_kernels.linear import LinearImplementation

from refimpl.model.numerics import Numerics


@dataclass(frozen=True, kw_only=True)
class Implementations:
    """Names of implementations, as `refimpl_kernels` spells them.

    Attributes:
        linear: "dot" is fast for many rows; "chain" streams the stored weights once, and its bits
            do not depend on the number of rows.
        attention: "dense" hands out scores and rounds like the bfloat16 references; "blocked"
            takes time linear in what is visible, and its bits do not depend on the cache's length;
            "rows" is "blocked", but row after row on a CPU, for calls of one query a row.
    """

    linear: LinearImplementation = "dot"
    attention: AttentionImplementation = "dense"


REFERENCE = Implementations()


def implementations_for(
    numerics: Numerics, *, phase: Literal["prefill", "decode"]
) -> Implementations:
    """What the programs over a cache use: many rows at once in prefill, one a request in decode.

    Blocked attention keeps a running softmax in float32, so the bfloat16 numerics, which round the
    finished weights, take the dense form. Rows one after the other are for a CPU: an accelerator
    would stand idle.
    """
    return Implementations(
        linear="dot" if phase == "prefill" else "chain", attention=_attention(numerics, phase)
    )


def _attention(numerics: Numerics, phase: Literal["prefill", "decode"]) -> AttentionImplementation:
    if numerics.activation != "float32":
        return "dense"
    return "rows" if phase == "decode" and jax.default_backend() == "cpu" else "blocked"
