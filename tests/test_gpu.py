"""What only a GPU can show: float32 means float32 there, and bfloat16 rounds where it says."""

import jax
import numpy as np
import pytest

from tests.tiny_models import full_pass, golden_case


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gemma_mha"])
def test_float32_products_are_not_tf32(name: str) -> None:
    """TF32 keeps 10 bits of a factor and would move these logits by about 1e-3."""
    assert jax.default_backend() == "gpu"
    golden = golden_case(name, "long")
    rows, length = golden.is_token.shape
    logits, _ = full_pass(name)(golden.tokens, golden.positions)
    assert np.abs(np.asarray(logits)[:rows, :length] - golden.logits).max() < 5e-5
