"""What the README shows is what the commands print."""

import sys
from pathlib import Path

import pytest

from refimpl import __main__ as entry
from refimpl.catalogue import markdown
from refimpl.model.registry import REGISTRY
from refimpl.model.variants import VARIANTS

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BEGIN = "<!-- begin: uv run refimpl models --markdown -->\n"
END = "<!-- end -->\n"


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def rows(heading: str) -> dict[str, list[str]]:
    """The rows of the table whose first heading this is, by their first cell."""
    lines = markdown().splitlines()
    start = next(i for i, line in enumerate(lines) if cells(line)[0] == heading)
    end = lines.index("", start) if "" in lines[start:] else len(lines)
    return {row[0]: row[1:] for row in map(cells, lines[start + 2 : end])}


def test_the_tables_are_those_that_the_command_prints(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["refimpl", "models", "--markdown"])
    with pytest.raises(SystemExit) as stopped:
        sys.exit(entry.main())
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert README.count(BEGIN) == README.count(END) == 1
    shown = README.split(BEGIN)[1].split(END)[0]
    assert shown.strip() == printed.strip(), "put the command's output between the README's markers"


def test_every_name_and_count_of_the_registry_is_there():
    table = rows("architecture")
    assert set(table) == set(VARIANTS)
    for registered in REGISTRY:
        parameters, context, *_, names = table[registered.variant]
        assert parameters == f"{registered.config.parameter_count:,}"
        assert context == f"{registered.config.context_length:,}"
        line = " ".join(
            f"`{name}`" for name in (registered.id.removeprefix("google/"), *registered.tags)
        )
        assert line in names.split("<br>")


def test_what_a_row_says_of_its_layers():
    table = rows("architecture")

    def of(name: str) -> tuple[str, str, str]:
        _, _, layers, heads, beside, _ = table[name]
        return layers, heads, beside

    assert of("gemma-7b") == ("28, all global", "16/16 x 256", "")
    assert of("gemma-2-27b") == (
        "46, 1 local to 1 global, window 4,096",
        "32/16 x 128",
        "scores divided by the root of 144, not of the head width",
    )
    assert of("gemma-4-26b-a4b") == (
        "30, 5 local to 1 global, window 1,024",
        "local 16/8 x 256, global 16/2 x 512",
        "global layers take raw keys for values; 128 experts beside the dense feed-forward, "
        "8 for each token",
    )
    assert of("gemma-4-e2b") == (
        "35, 4 local to 1 global, window 512",
        "local 8/1 x 256, global 8/1 x 512",
        "the last 20 layers read keys and values of earlier ones; inputs of width 256 for each "
        "layer; feed-forward widths 6,144 and 12,288",
    )


def test_what_a_family_has_in_common():
    table = rows("family")
    assert table["gemma"] == table["vaultgemma"] == ["nothing"]
    assert table["gemma3"] == [
        "norms after each part; normalised queries and keys; rope theta 10,000, of global layers "
        "1,000,000"
    ]
    assert "4 alternating streams (AltUp)" in table["gemma3n"][0]
    assert "global layers turn 25% of a head's pairs" in table["gemma4"][0]


def test_every_family_is_one_row():
    families = {config.family for config in VARIANTS.values()}
    assert families == {
        "gemma", "gemma2", "vaultgemma", "gemma3_text", "gemma3n_text", "gemma4_text",
        "gemma4_unified_text",
    }  # fmt: skip
    assert list(rows("family")) == ["gemma", "gemma2", "vaultgemma", "gemma3", "gemma3n", "gemma4"]
