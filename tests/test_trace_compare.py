"""Differences of traces as numbers, infinite and undefined ones among them, and their report."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from refimpl.errors import TraceError
from refimpl.model import trace
from refimpl.model.trace import Difference


def difference(ours: Any, theirs: Any, bound: float = 0.0) -> Difference:
    (only,) = trace.compare({"x": np.asarray(ours)}, {"x": np.asarray(theirs)}, bound=bound)
    return only


def test_numbers_of_a_difference():
    # Root mean square of the first: sqrt((9 + 16 + 0 + 0) / 4) = 2.5.
    got = difference([[3.0, 4.0], [0.0, 0.0]], [[3.0, 4.5], [0.0, -1.0]], bound=0.4)
    assert got == Difference(
        name="x", largest=1.0, mean=0.375, relative=0.4, where=(1, 1), is_within=True
    )


@pytest.mark.parametrize(
    ("ours", "bound", "is_within"),
    [
        # The bound grows with the values above 1, and does not shrink with them below.
        ([100.0, 100.0], 0.01, True),
        ([100.0, 100.0], 0.0099, False),
        ([0.001, 0.001], 1.0, True),
        ([0.001, 0.001], 0.99, False),
    ],
)
def test_the_bound_is_relative_to_large_values_only(ours, bound, is_within):
    assert difference(ours, np.add(ours, [0.0, 1.0]), bound=bound).is_within is is_within


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("ours", "theirs", "largest", "where"),
    [
        ([1.0, NAN], [1.0, NAN], 0.0, (0,)),
        ([1.0, INF], [1.0, INF], 0.0, (0,)),
        ([-INF, INF], [-INF, INF], 0.0, (0,)),
        ([NAN, NAN], [NAN, NAN], 0.0, (0,)),
        ([1.0, NAN], [1.0, 2.0], INF, (1,)),
        ([1.0, 2.0], [1.0, NAN], INF, (1,)),
        ([1.0, INF], [1.0, -INF], INF, (1,)),
        ([1.0, INF], [1.0, 3e38], INF, (1,)),
        ([5.0, NAN], [1.0, INF], INF, (1,)),
    ],
)
def test_values_that_are_not_finite(ours, theirs, largest, where):
    got = difference(np.float32(ours), np.float32(theirs), bound=1e9)
    assert (got.largest, got.where, got.is_within) == (largest, where, largest == 0)


def test_types_may_differ():
    narrow = np.array([1.0, 2.0], ml_dtypes.bfloat16)
    assert difference(narrow, np.array([1.0, 2.0625])).largest == 0.0625


@pytest.mark.parametrize("shape", [(0,), (2, 0), ()])
def test_arrays_without_entries_or_axes(shape):
    assert difference(np.ones(shape), np.ones(shape)) == Difference("x", 0.0, 0.0, 0.0, (), True)


def test_shapes_that_differ():
    with pytest.raises(TraceError) as caught:
        difference(np.zeros((2, 3)), np.zeros((3, 2)))
    assert str(caught.value) == (
        "x has shape (2, 3) in one trace and (3, 2) in the other; "
        "were both made from the same tokens?"
    )


def test_traces_with_nothing_in_common():
    theirs = {f"layer.{i}": np.zeros(1) for i in range(5)}
    with pytest.raises(TraceError) as caught:
        trace.compare({"embed": np.zeros(1)}, theirs, bound=0.0)
    assert str(caught.value) == (
        "the traces have no name in common: one has embed, the other layer.0, layer.1, layer.2, ..."
    )
    with pytest.raises(TraceError, match="one has nothing, the other nothing"):
        trace.compare({}, {}, bound=0.0)


def test_only_common_names_are_compared():
    ours = {name: np.zeros(2) for name in ("logits", "embed", "layers.0.middle")}
    theirs = {name: np.zeros(2) for name in ("logits", "layers.0.middle", "layers.0.residual")}
    compared = trace.compare(ours, theirs, bound=0.0)
    assert [difference.name for difference in compared] == ["layers.0.middle", "logits"]


def test_the_report():
    differences = [
        Difference("embed", 0.0, 0.0, 0.0, (0, 0, 0), True),
        Difference("layers.0.middle", 1.2e-6, 3e-8, 2e-6, (0, 4, 17), True),
        Difference("layers.0.residual", 0.031, 0.0012, 0.05, (1, 2, 3), False),
        Difference("logits", float("inf"), float("inf"), float("inf"), (5,), False),
    ]
    assert trace.report(differences).splitlines() == [
        "[OK]   embed              max 0.0e+00  mean 0.0e+00  rel 0.0e+00  at 0,0,0",
        "[OK]   layers.0.middle    max 1.2e-06  mean 3.0e-08  rel 2.0e-06  at 0,4,17",
        "[DIFF] layers.0.residual  max 3.1e-02  mean 1.2e-03  rel 5.0e-02  at 1,2,3  <- first",
        "[DIFF] logits             max     inf  mean     inf  rel     inf  at 5",
    ]
    assert trace.report([]) == ""
