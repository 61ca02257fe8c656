"""tanh in whole vectors: the function, and a row's bits whatever stands beside it."""

import jax.numpy as jnp
import numpy as np
import pytest
from refimpl_kernels.tanh import tanh

from tests.kernel_cases import assert_same_bits, normal, row_stable


@pytest.mark.parametrize("width", [1, 4, 24, 40, 100, 256])
def test_a_row_has_the_same_bits_alone_and_among_others(width: int) -> None:
    x = jnp.asarray(3 * normal(16, width))
    compiled = row_stable(tanh)
    together = compiled(x)
    for rows in (1, 2, 3, 8):
        assert_same_bits(compiled(x[:rows]), together[:rows])
    # Within five units in the last place, as far as any tanh of float32 is from the function.
    np.testing.assert_allclose(together, np.tanh(np.float64(x)), rtol=6e-7, atol=1e-7)


def test_a_number_is_a_row_of_its_own() -> None:
    assert tanh(jnp.float32(0)).shape == ()
    assert float(tanh(jnp.float32(20))) == 1
