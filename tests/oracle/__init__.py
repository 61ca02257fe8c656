"""A second opinion: the Gemma text models in float64 NumPy, one whole pass, no cache, no tricks.

It shares no line, constant or helper with the packages it judges, and imports numpy only. Axis
letters in einsum strings and docstrings: b batch, t query position, s key position, d model width,
n query heads, k key/value heads, g queries per key/value head (n = k g), h head width,
f feed-forward width, v vocabulary, l layer; and of Gemma 3n and 4: i, j streams of AltUp,
p width of per-layer inputs, e experts, r rank of LAuReL. Where a projection's output has no name of
its own, its axis is e too.
"""

from tests.oracle.config import LayerConfig, OracleConfig
from tests.oracle.gemma import OracleResult, forward, log_probabilities, sample_greedy
from tests.oracle.hugging_face import from_hugging_face
from tests.oracle.rope import float32_angles

__all__ = [
    "LayerConfig",
    "OracleConfig",
    "OracleResult",
    "float32_angles",
    "forward",
    "from_hugging_face",
    "log_probabilities",
    "sample_greedy",
]
