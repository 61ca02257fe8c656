"""Sparsity of gates: shares and standard deviations, as files of both formats say them."""

import math

import numpy as np
import pytest

from refimpl.errors import ConfigError
from refimpl.model.gate_sparsity import cutoff_of_multiplier, cutoff_of_share, share_below

# Quantiles of the standard normal distribution in tables of statistics.
TABLE = {0.8: 0.841621, 0.9: 1.281552, 0.95: 1.644854, 0.975: 1.959964, 0.99: 2.326348}
# What torch 2.13 computes in float32; llama.cpp's converter stores these.
TORCH = {
    0.8: 0.8416212797164917,
    0.9: 1.281551480293274,
    0.95: 1.6448535919189453,
    0.99: 2.326348304748535,
}


@pytest.mark.parametrize(("share", "quantile"), TABLE.items())
def test_a_share_and_its_quantile(share, quantile):
    cutoff = cutoff_of_share(share)
    assert cutoff == pytest.approx(quantile, abs=5e-7)
    assert share_below(cutoff) == share


def test_the_published_share_has_the_float32_quantile_of_transformers():
    assert np.float32(cutoff_of_share(0.95)) == np.float32(TORCH[0.95])


@pytest.mark.parametrize(("share", "multiplier"), TORCH.items())
def test_a_stored_float32_means_the_exact_quantile(share, multiplier):
    assert cutoff_of_multiplier(multiplier) == cutoff_of_share(share)
    # As llama.cpp's own constant, which is 1.6e-7 lower.
    assert cutoff_of_multiplier(1.6448533535003662) == cutoff_of_share(0.95)


@pytest.mark.parametrize("multiplier", [1.6, 1.645, 3, 40.0, -1.0])
def test_a_number_that_is_no_short_shares_quantile_stays(multiplier):
    assert cutoff_of_multiplier(multiplier) == multiplier


def test_nothing_cut():
    assert cutoff_of_share(0) is None
    assert cutoff_of_multiplier(-math.inf) is None
    assert share_below(None) == 0.0


@pytest.mark.parametrize("share", [1.0, -0.1, math.nan, math.inf])
def test_not_a_share(share):
    with pytest.raises(ConfigError, match=f"at least 0 and below 1, got {share!r}"):
        cutoff_of_share(share)
