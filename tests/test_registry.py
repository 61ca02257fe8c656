"""Names of models: the hub's ids and Ollama's tags, each for one published architecture."""

import pytest

from refimpl.errors import UnknownModelError
from refimpl.model.registry import DEFAULT, REGISTRY, find, locate
from refimpl.model.variants import VARIANTS


def test_every_name_is_there_once():
    names = [name.lower() for entry in REGISTRY for name in (entry.id, *entry.tags)]
    assert len(names) == len(set(names))
    assert all(tag == tag.lower() for entry in REGISTRY for tag in entry.tags)
    assert {entry.variant for entry in REGISTRY} == set(VARIANTS)
    assert DEFAULT.id == "google/gemma-3-270m"


@pytest.mark.parametrize(
    ("name", "identifier", "parameters"),
    [
        ("gemma3n:e2b", "google/gemma-3n-E2B-it", 4_435_182_688),
        ("gemma3n:e4b-it", "google/gemma-3n-E4B-it", 6_835_235_568),
        ("google/gemma-3n-E4B", "google/gemma-3n-E4B", 6_835_235_568),
        ("gemma4:e2b", "google/gemma-4-E2B-it", 4_628_569_379),
        ("gemma4:e4b-pt", "google/gemma-4-E4B", 7_463_013_418),
        ("gemma4:12b", "google/gemma-4-12B-it", 11_907_350_320),
        # Ollama serves the mixture of experts under the shorter tag.
        ("gemma4:26b", "google/gemma-4-26B-A4B-it", 25_233_141_790),
        ("gemma4:26b-a4b-it", "google/gemma-4-26B-A4B-it", 25_233_141_790),
        ("google/gemma-4-26b-a4b", "google/gemma-4-26B-A4B", 25_233_141_790),
        ("GEMMA4:31B", "google/gemma-4-31B-it", 30_697_345_340),
        ("Google/Gemma-3-4B-it", "google/gemma-3-4b-it", 3_880_263_168),
    ],
)
def test_a_name_in_any_case(name, identifier, parameters):
    entry = find(name)
    assert entry is not None
    assert (entry.id, entry.config.parameter_count) == (identifier, parameters)


def test_a_name_that_is_almost_one():
    assert find("gemma4:e3b") is None
    with pytest.raises(UnknownModelError, match=r"did you mean gemma4:e[24]b"):
        locate("gemma4:e3b")
