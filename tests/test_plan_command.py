"""`refimpl models --plan` and `--markdown` as a user meets them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from refimpl_weights import synthetic_gguf
from refimpl_weights.synthetic import write_checkpoint

from refimpl import __main__ as entry
from refimpl.errors import CheckpointError, UnknownModelError
from refimpl.model.checkpoint import open_checkpoint
from refimpl.model.registry import REGISTRY
from refimpl.plan.command import config_of

Run = Callable[..., tuple[int, str, str]]
TINY = ("--plan", "gemma3:270m", "--memory")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `refimpl models` in this process: (status, standard output, standard error)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["refimpl", "models", *arguments])
        with pytest.raises(SystemExit) as stopped:
            sys.exit(entry.main())
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return call


def planned(run: Run, *arguments: str) -> dict[str, Any]:
    status, out, err = run("--plan", *arguments, "--json")
    assert (status, err) == (0, "")
    return json.loads(out)


def test_31b_on_four_devices(run):
    plan = planned(run, "google/gemma-4-31B-it", "--devices", "4", "--memory", "80GB")
    held = plan["bytes_of_each_device"]
    assert (plan["parameters"], plan["devices"], plan["slots"], plan["context"]) == (
        30_697_345_340, 4, 8, 4096,
    )  # fmt: skip
    assert held["weights"] == sum(held["weights_by_part"].values())
    assert held["caches"] == sum(held["caches_by_kind"].values())
    # 5 percent.
    assert held["margin"] == 4 * 10**9
    parts = ("weights", "caches", "slots", "prefix_cache", "working", "margin")
    assert held["total"] == sum(held[part] for part in parts)
    assert held["free"] == 80 * 10**9 - held["total"]
    assert plan["weights_of_one_copy"] == 2 * 30_697_345_340
    assert plan["fits"] is True
    assert (plan["remedies"], plan["copies"]) == ([], [])
    assert plan["largest_context_by_slots"]["1"] == 262_144
    assert plan["slots_at_full_context"] == 5

    contexts = list(plan["largest_context_by_slots"].values())
    assert contexts == sorted(contexts, reverse=True)


def test_the_table_says_the_same(run):
    plan = planned(run, "gemma3:270m", "--memory", "1GiB", "--slots", "2", "--context", "1000")
    status, out, err = run(*TINY, "1GiB", "--slots", "2", "--context", "1000")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == (
        "gemma3:270m: 268,098,176 parameters as bfloat16, numerics float32, 2 slots of 1,000 tokens"
    )
    cells = dict(line.rsplit("  ", 1) for line in lines[2:18] if "  " in line.strip())
    cells = {label.strip(): cell.strip() for label, cell in cells.items()}
    assert cells["weights"] == "536 MB"
    assert cells["memory"] == "1.07 GB"
    assert cells["prefix cache"] == "67.1 MB"
    assert cells["free"].split()[0] == f"{plan['bytes_of_each_device']['free'] / 1e6:.0f}"
    for slots, context in plan["largest_context_by_slots"].items():
        assert any(line.split()[:2] == [slots, f"{context:,}"] for line in lines)
    assert lines[-1] == (
        f"most slots with the full context of 32,768: {plan['slots_at_full_context']}"
    )


def test_what_does_not_fit_says_what_is_missing_and_what_helps(run):
    arguments = ("gemma3:270m", "--memory", "1GB")
    plan = planned(run, *arguments)
    missing = -plan["bytes_of_each_device"]["free"]
    assert plan["fits"] is False
    assert missing > 0
    status, out, _ = run("--plan", *arguments)
    assert status == 0
    text = " ".join(out.split())
    assert f"does not fit: each device lacks {missing / 1e6:.0f} MB; try --slots" in text
    assert f"missing {missing / 1e6:.0f} MB" in text
    for remedy in plan["remedies"]:
        assert planned(run, *arguments, *remedy.split())["fits"] is True

    text = " ".join(run(*TINY, "1MB")[1].split())
    assert "no single option is enough" in text
    assert "largest context with 1 slot: 0" in text


def test_what_devices_hold_alike_is_said(run):
    arguments = ("gemma4:e2b", "--devices", "2", "--memory", "80GB", "--slots", "1")
    plan = planned(run, *arguments)
    assert plan["copies"] == [
        "attention.key of 1 head is 1 share, each on 2 devices (15 layers)",
        "attention.value of 1 head is 1 share, each on 2 devices (15 layers)",
    ]
    text = " ".join(run("--plan", *arguments)[1].split())
    assert f"2 devices do not divide all: {'; '.join(plan['copies'])}" in text


def test_options_count(run):
    base = planned(run, "gemma3:270m", "--memory", "8GB")["bytes_of_each_device"]

    def changed(*options: str) -> dict[str, Any]:
        return planned(run, "gemma3:270m", "--memory", "8GB", *options)["bytes_of_each_device"]

    assert changed("--dtype", "float32")["weights"] == 2 * base["weights"]
    halved = changed("--numerics", "hf_bfloat16")["caches_by_kind"]
    positions = {"local": 8 * 640 * 4, "global": 8 * 4096 * 4}
    for kind, held in base["caches_by_kind"].items():
        assert 2 * (halved[kind] - positions[kind]) == held - positions[kind]
    assert 8 * changed("--slots", "1")["caches"] == base["caches"]
    assert changed("--context", "8192")["caches_by_kind"]["global"] == (
        2 * base["caches_by_kind"]["global"]
    )
    assert changed("--margin", "0B")["margin"] == 0
    assert changed("--margin", "1.5GB")["margin"] == 1_500_000_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--plan", "gemma3:270m"), "--plan needs --memory, what each device has, as in 80GB"),
        (("--memory", "8GB"), "--memory belongs to a plan: add --plan with a model's name"),
        (("--slots", "8", "--json"), "--slots belongs to a plan"),
        (("--markdown", "--json"), "--markdown stands alone"),
        (
            (*TINY, "80"),
            "--memory takes a number and a unit (B, kB, MB, GB, TB, KiB, MiB, GiB, TiB)",
        ),
        ((*TINY, "8GB", "--margin", "10%"), "--margin takes a number and a unit"),
        ((*TINY, "8GB", "--devices", "0"), "--devices must be a number from 1 to 1048576, got 0"),
        ((*TINY, "8GB", "--devices", "two"), "--devices"),
        ((*TINY, "8GB", "--slots", "-1"), "--slots must be a number from 1 to 65536, got -1"),
        ((*TINY, "8GB", "--context", "32769"), "--context must be a number from 1 to 32768"),
        ((*TINY, "8GB", "--dtype", "fp8"), "dtype must be one of bfloat16, float16, float32"),
        ((*TINY, "8GB", "--numerics", "float16"), "numerics must be one of float32, hf_bfloat16"),
        (("--plan", "gemma4:999b", "--memory", "8GB"), "called 'gemma4:999b'; --plan takes a name"),
        (("--plan", "", "--memory", "8GB"), "called ''"),
        (("--plan", "~nosuchuser/x", "--memory", "8GB"), "'~nosuchuser/x'"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(run, arguments, words):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert words in err
    assert len(err.strip().splitlines()) == 1


def test_help_has_examples(run):
    status, out, _ = run("--help")
    assert status == 0
    text = " ".join(out.replace("│", " ").split())
    assert "refimpl models --plan google/gemma-4-31B-it --devices 4 --memory 80GB" in text
    assert "refimpl models --markdown" in text


# Which model a name means.


@pytest.mark.parametrize("entry", REGISTRY, ids=lambda each: each.id)
def test_every_name_has_a_plan(entry):
    assert all(config_of(name) is entry.config for name in (entry.id, *entry.tags))


def test_a_folder_needs_no_weights(tmp_path: Path, run):
    write_checkpoint(tmp_path, "gemma4_moe")
    config = open_checkpoint(tmp_path).config
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    for path in (tmp_path, tmp_path / "config.json"):
        assert config_of(str(path)) == config
    assert planned(run, str(tmp_path), "--memory", "8GB")["parameters"] == config.parameter_count
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"there is no config\.json in"):
        config_of(str(tmp_path))


def test_a_gguf_file_by_its_header(tmp_path: Path):
    path = synthetic_gguf.write_gguf(
        tmp_path / "x.gguf", architecture="gemma2", tensor_type="Q8_0", layers=1
    )
    config = config_of(str(path))
    assert (config.family, config.num_layers) == ("gemma2", 1)


def test_a_hub_id_that_is_not_ours():
    with pytest.raises(
        UnknownModelError, match="no model, file or folder is called 'someone/else'"
    ):
        config_of("someone/else")
