"""The command line as a user meets it: results, one line for a mistake, exit statuses."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from refimpl_weights.synthetic import write_checkpoint

import refimpl
from refimpl import __main__ as entry
from refimpl.engine.generate import score
from refimpl.engine.programs import Programs
from refimpl.model.gemma import load_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), "gemma_mqa")


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFIMPL_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command line in this process: (status, standard output, standard error)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["refimpl", *arguments])
        with pytest.raises(SystemExit) as stopped:
            sys.exit(entry.main())
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return call


def test_complete_prints_the_prompt_and_what_follows(run, folder: Path) -> None:
    arguments = ("complete", "hello", "--model", str(folder), "--max-tokens", "5")
    status, out, err = run(*arguments)
    assert (status, err) == (0, "")
    assert out.startswith("hello")
    assert out.endswith("\n")

    status, as_json, _ = run(*arguments, "--json")
    reply = json.loads(as_json)
    assert status == 0
    assert out == f"hello{reply['text']}\n"
    assert len(reply["ids"]) == len(reply["logprobs"]) == 5
    assert reply["finish_reason"] == "length"
    assert all(value < 0 for value in reply["logprobs"])


def test_a_seed_repeats_a_draw_and_another_differs(run, folder: Path) -> None:
    def draw(seed: int) -> list[int]:
        arguments = ("complete", "hello", "-m", str(folder), "--temperature", "1.5", "--json")
        _, out, _ = run(*arguments, "--seed", str(seed), "--max-tokens", "8")
        return json.loads(out)["ids"]

    assert draw(-1) == draw(-1)
    assert len({tuple(draw(seed)) for seed in (1, 2, 3)}) == 3


def test_score_is_what_the_engine_scores(run, folder: Path, tmp_path: Path) -> None:
    text = "one two"
    status, out, _ = run("score", text, "--model", str(folder), "--json")
    reply = json.loads(out)
    assert status == 0
    assert set(reply) == {"tokens", "ids", "logprobs"}
    assert reply["logprobs"][0] is None
    gemma = load_checkpoint(folder)
    assert reply["ids"] == gemma.tokenizer.encode(text)
    assert reply["logprobs"] == score(Programs(gemma), reply["ids"])
    assert reply["tokens"][0] == "<bos>"

    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    assert run("score", "--file", str(file), "-m", str(folder), "--json")[1] == out
    table = run("score", text, "--model", str(folder))[1].splitlines()
    assert len(table) == len(reply["ids"]) + 1
    assert "per token" in table[-1]


def test_greedy_logprobs_of_complete_are_those_of_score(run, folder: Path) -> None:
    """Within 1e-5: one makes them token by token, the other in chunks."""
    _, out, _ = run("complete", "hello", "-m", str(folder), "--max-tokens", "6", "--json")
    made = json.loads(out)
    scored = score(Programs(load_checkpoint(folder)), made["prompt_ids"] + made["ids"])
    assert scored[-6:] == pytest.approx(made["logprobs"], abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("complete", ""), "the prompt is empty"),
        (("score", ""), "the text is empty"),
        (("score",), "give either TEXT or --file"),
        (("complete",), "Missing argument 'prompt'"),
        (("nosuch",), "No such command 'nosuch'"),
        (("complete", "hi", "--temperature", "hot"), "--temperature"),
        (("complete", "hi", "--model", "~nosuchuser/x"), "no model, file or folder"),
        (("complete", "hi", "--model", "x" * 5000), "no model, file or folder"),
        (("score", "a", "--file", "b"), "give either TEXT or --file"),
        (("score", "--file", "/nonexistent.txt"), "cannot read /nonexistent.txt"),
        (("complete", "hi", "--model", "gemma3:999b"), "did you mean"),
        (("complete", "hi", "--model", ""), "the model's name is empty"),
        (("complete", "hi", "--model", "./missing.gguf"), "no model, file or folder"),
        (("complete", "hi", "--model", "google/gemma-3-4b-it"), "google/gemma-3-4b-it"),
        (("complete", "hi", "--max-tokens", "-1"), "max_tokens must be at least 0"),
        (("complete", "hi", "--temperature", "3"), "between 0 (greedy) and 2"),
        (("complete", "hi", "--temperature", "nan"), "between 0 (greedy) and 2"),
        (("complete", "hi", "--seed", str(2**63)), "signed 64-bit"),
        (("complete", "hi", "--numerics", "float16"), "hf_bfloat16"),
        (("complete", "a\udc80"), "surrogate"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(run, arguments: tuple[str, ...], words: str) -> None:
    status, out, err = run(*arguments)
    assert status == 2
    assert out == ""
    assert words in err
    assert len(err.strip().splitlines()) == 1


def test_a_prompt_longer_than_the_context_is_refused(run, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text("~" * 40_000, encoding="utf-8")
    status, _, err = run("score", "--file", str(file), "--model", str(folder))
    assert status == 2
    assert "context is 32768 tokens; the prompt has 40001" in err
    status, _, err = run("complete", "hi", "-m", str(folder), "--max-tokens", "32768")
    assert status == 2
    assert "max_tokens is 32768" in err


def test_a_file_that_is_not_text_or_not_a_model(run, tmp_path: Path) -> None:
    file = tmp_path / "bytes"
    file.write_bytes(b"abc\xff")
    status, _, err = run("score", "--file", str(file))
    assert (status, "byte 3 is 0xff" in err) == (2, True)
    status, _, err = run("complete", "hi", "--model", str(file))
    assert status == 2
    assert len(err.strip().splitlines()) == 1


def test_models_lists_every_entry(run) -> None:
    status, out, _ = run("models")
    assert status == 0
    assert "google/gemma-3-27b-it" in out
    assert "gemma3:27b" in out
    listed = json.loads(run("models", "--json")[1])["models"]
    default = next(row for row in listed if row["is_default"])
    assert default["id"] == "google/gemma-3-270m"
    assert default["is_local"] is True
    assert default["parameters"] == 268_098_176


def test_version_and_help(run) -> None:
    assert run("--version")[1] == f"refimpl {refimpl.__version__}\n"
    for command in ((), ("complete",), ("score",), ("models",)):
        status, out, _ = run(*command, "--help")
        assert status == 0
        assert "refimpl" in out
    assert "Examples" in run("complete", "--help")[1]


def test_a_reader_that_leaves_ends_the_script_quietly() -> None:
    command = [sys.executable, "-m", "refimpl", "models"]
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = subprocess.run(
            command, stdout=writing, stderr=subprocess.PIPE, timeout=120, check=False
        )
    finally:
        os.close(writing)
    assert ended.returncode != 0
    assert ended.stderr == b""


def test_a_terminal_without_the_characters_gets_escapes(folder: Path) -> None:
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "refimpl",
            "complete",
            "日本",
            "-m",
            str(folder),
            "--max-tokens",
            "0",
        ],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        timeout=120,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"\\u65e5\\u672c\n", b"")


def test_ctrl_c_while_starting_ends_the_script_quietly(monkeypatch, capsys) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(entry, "_run", interrupted)
    with pytest.raises(SystemExit) as stopped:
        entry.main()
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "refimpl: interrupted\n"
