"""What `import refimpl` gives: a few names, and nothing that takes long to import."""

import subprocess
import sys

import pytest

import refimpl
from refimpl.engine.engine import Engine, EngineOptions
from refimpl.engine.request import SamplingParams
from refimpl.errors import RefimplError
from refimpl.loading import load

NAMES = {
    "Engine": Engine,
    "EngineOptions": EngineOptions,
    "RefimplError": RefimplError,
    "SamplingParams": SamplingParams,
    "load": load,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_the_thing_itself(name: str) -> None:
    assert getattr(refimpl, name) is NAMES[name]
    assert name in dir(refimpl)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match=r"module 'refimpl' has no attribute 'nosuch'"):
        _ = refimpl.nosuch  # pyright: ignore[reportAttributeAccessIssue]


HEAVY = "import sys; print(sorted({'flax', 'jax', 'numpy', 'tokenizers'} & set(sys.modules)))"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import refimpl, refimpl.cli; refimpl.load", "[]"),
        # A request needs numpy, for the integers of its arrays, and no device.
        ("import refimpl; refimpl.SamplingParams(top_p=0.9)", "['numpy']"),
        # What was compiled by an earlier start runs without Flax, which takes half a second.
        ("import refimpl; refimpl.Engine", "['jax', 'numpy', 'tokenizers']"),
    ],
)
def test_what_an_import_brings(source: str, expected: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", f"{source}; {HEAVY}"],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    assert ended.stdout.strip() == expected
