"""How sparse a gate is: the share that is cut off, and the standard deviations where the cut lies.

Files say either. The gate's inputs are taken for normally distributed, so that the quantile of the
standard normal distribution leads from one to the other (Gemma 3n).
"""

from statistics import NormalDist

from refimpl.errors import ConfigError

_NORMAL = NormalDist()
# A float32 quantile, as torch and Go compute it, is within so much of the exact one, relatively.
_FLOAT32_QUANTILE = 4e-7


def cutoff_of_share(share: int | float) -> float | None:
    """Standard deviations above the mean below which a share lies; None where nothing is cut.

    >>> round(cutoff_of_share(0.95), 6)
    1.644854

    Raises:
        ConfigError: not a share: below 0, or all.
    """
    if not 0 <= share < 1:
        raise ConfigError(f"a gate's sparsity must be at least 0 and below 1, got {share!r:.80}")
    return _NORMAL.inv_cdf(share) if share > 0 else None


def share_below(cutoff: float | None) -> float:
    """The inverse."""
    # Rounded as nobody writes more digits: 0.95, and not 0.9500000000000001.
    return 0.0 if cutoff is None else round(_NORMAL.cdf(cutoff), 12)


def cutoff_of_multiplier(multiplier: int | float) -> float | None:
    """The cutoff that a GGUF file stores in float32, minus infinity for none.

    As with every decimal number that went through float32, the short one is what was meant: the
    quantile of 0.95, and not the float32 beside it.
    """
    if multiplier == float("-inf"):
        return None
    share = round(_NORMAL.cdf(multiplier), 6)
    if not 0 < share < 1:
        return float(multiplier)
    exact = _NORMAL.inv_cdf(share)
    return exact if abs(exact - multiplier) <= _FLOAT32_QUANTILE * abs(exact) else float(multiplier)
