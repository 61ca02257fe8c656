"""Our float32 forward pass against the float64 NumPy oracle, which shares no line with it.

Bound: 1e-5, absolutely, on logits and on the residual stream after every layer, in models whose
stream has a root mean square of 1 to 2. Far from the start the oracle takes float32 rope angles:
an angle of 5,000 radians has an error of 2e-4 in float32, in every program that forms it so.
"""

import numpy as np
import pytest
from refimpl_weights import synthetic

from tests.checkpoint_files import bare
from tests.oracle import float32_angles, forward, from_hugging_face
from tests.oracle.rope import exact_angles
from tests.tiny_models import full_pass, golden_case

BOUND = 1e-5


@pytest.mark.parametrize("case", ["short", "long", "far", "left_padded"])
@pytest.mark.parametrize("name", sorted(synthetic.TINY))
def test_logits_and_every_residual(name: str, case: str) -> None:
    golden = golden_case(name, case)
    rows, length = golden.is_token.shape
    tokens, positions = golden.tokens[:rows, :length], golden.positions[:rows, :length]

    logits, trace = full_pass(name)(golden.tokens, golden.positions)
    ours = [np.asarray(value)[..., :rows, :length, :] for value in trace.values()]

    exact = forward(
        from_hugging_face(synthetic.TINY[name]),
        bare(name),
        tokens,
        np.maximum(positions, 0),
        visible=golden.is_token,
        angle_function=float32_angles if case == "far" else exact_angles,
    )
    assert len(ours) == len(exact.residuals)
    for index, (got, wanted) in enumerate(zip(ours, exact.residuals, strict=True)):
        difference = np.abs(got - wanted)[..., golden.is_token, :].max()
        assert difference < BOUND, f"stream {index}: {difference:.1e}"
    got = np.asarray(logits)[:rows, :length]
    difference = np.abs(got - exact.logits)[golden.is_token].max()
    assert difference < BOUND, f"logits: {difference:.1e}"
