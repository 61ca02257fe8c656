"""A second opinion: the Gemma text models in float64 NumPy, one whole pass, no cache, no tricks.

It shares no line, constant or helper with the packages it judges, and imports numpy only. Axis
letters in einsum strings and docstrings: b batch, t query position, s key position, d model width,
n query heads, k key/value heads, g queries per key/value head (n = k g), h head width,
f feed-forward width, v vocabulary.
"""

from tests.oracle.config import LayerConfig, OracleConfig, from_hugging_face
from tests.oracle.gemma import OracleResult, forward, log_probabilities, sample_greedy
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
