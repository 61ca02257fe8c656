"""The command line as a user meets it: results, one line for a mistake, exit statuses."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from refimpl_weights.synthetic import TINY, write_checkpoint

import refimpl
from refimpl import __main__ as entry
from refimpl import cli
from refimpl.engine.engine import Engine, EngineOptions
from refimpl.engine.events import Choice
from refimpl.engine.request import SamplingParams
from refimpl.model.gemma import load_checkpoint
from tests import compiled
from tests.tiny_variations import text_tensors, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), "gemma_mqa")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    options = EngineOptions(slots=1, context=1024, compile_at_start=False)
    with Engine(load_checkpoint(folder), options) as started:
        yield started


@pytest.fixture(autouse=True, scope="module")
def cache() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFIMPL_CACHE_DIR", str(compiled.folder()))
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


def logprobs_of(engine: Engine, prompt: str | list[int]) -> list[float | None]:
    return [None if entry is None else entry.logprob for entry in engine.score(prompt)]


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

    drawn = {seed: draw(seed) for seed in (-1, 1, 2)}
    assert draw(-1) == drawn[-1]
    assert len(set(map(tuple, drawn.values()))) == 3


def test_complete_is_what_the_engine_completes(run, folder: Path, engine: Engine) -> None:
    """Every option of how to draw reaches the engine, and the engine's size changes nothing."""
    named = {"max_tokens": 8, "temperature": 1.5, "top_p": 0.7, "top_k": 40, "seed": 3}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in named.items()]
    reply = json.loads(run("complete", "hello", "-m", str(folder), *options, "--json")[1])

    def complete(arguments: dict[str, Any]) -> Choice:
        return engine.complete("hello", SamplingParams(logprobs=0, **arguments)).choices[0]

    choice = complete(named)
    assert reply["ids"] == list(choice.token_ids)
    assert reply["logprobs"] == [entry.logprob for entry in choice.logprobs or ()]
    assert (reply["text"], reply["finish_reason"]) == (choice.text, choice.finish_reason)
    for name in named:  # Each of them matters here.
        others = {key: value for key, value in named.items() if key != name}
        assert complete({"seed": 4, **others}).token_ids != choice.token_ids, name


def test_a_stop_string_ends_the_text(run, folder: Path, engine: Engine) -> None:
    """The first one met, of several, and it is not printed."""
    whole = engine.complete("hello", SamplingParams(max_tokens=8, temperature=0)).choices[0].text
    # Two tokens' text, so that the first of them has to be held back.
    stop, wanted = whole[3:5], whole[:3]
    assert whole.index(stop) == 3
    arguments = ("complete", "hello", "-m", str(folder), "--max-tokens", "8")
    stops = ("--stop", "nothing like it", "--stop", stop)
    assert run(*arguments, *stops)[1] == f"hello{wanted}\n"
    reply = json.loads(run(*arguments, *stops, "--json")[1])
    assert (reply["text"], reply["finish_reason"]) == (wanted, "stop")


def test_text_is_printed_as_it_is_made(run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One write for each token, which may be of nothing while a character is incomplete."""
    written = list[str]()
    monkeypatch.setattr(cli, "_write", written.append)
    assert run("complete", "hello", "-m", str(folder), "--max-tokens", "8") == (0, "", "")
    pieces = written[1:-1]
    assert (written[0], written[-1], len(pieces)) == ("hello", "\n", 8)
    assert len([piece for piece in pieces if piece]) > 4


def test_a_model_that_breaks_down_says_so(run, tmp_path: Path) -> None:
    tensors = text_tensors("gemma_mqa", layers=TINY["gemma_mqa"]["num_hidden_layers"])
    tensors["norm.weight"][:] = 3e38
    folder = write_folder(tmp_path, "gemma_mqa", tensors)
    status, out, err = run("complete", "hello", "-m", str(folder), "--max-tokens", "5")
    assert (status, out) == (2, "hello\n")
    assert "not finite any more after 0 tokens" in err
    assert len(err.strip().splitlines()) == 1


def test_score_is_what_the_engine_scores(run, folder: Path, engine: Engine, tmp_path: Path) -> None:
    text = "one two"
    status, out, _ = run("score", text, "--model", str(folder), "--json")
    reply = json.loads(out)
    assert status == 0
    assert set(reply) == {"tokens", "ids", "logprobs"}
    assert reply["logprobs"][0] is None
    assert reply["ids"] == engine.gemma.tokenizer.encode(text)
    assert reply["logprobs"] == logprobs_of(engine, text)
    assert reply["tokens"][0] == "<bos>"

    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    assert run("score", "--file", str(file), "-m", str(folder), "--json")[1] == out
    table = run("score", text, "--model", str(folder))[1].splitlines()
    assert len(table) == len(reply["ids"]) + 1
    assert "per token" in table[-1]


def test_greedy_logprobs_of_complete_are_those_of_score(run, folder: Path, engine: Engine) -> None:
    """Within 1e-5: one makes them token by token, the other in chunks."""
    _, out, _ = run("complete", "hello", "-m", str(folder), "--max-tokens", "6", "--json")
    made = json.loads(out)
    assert logprobs_of(engine, made["prompt_ids"] + made["ids"])[-6:] == pytest.approx(
        made["logprobs"], abs=1e-5
    )


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
        (("complete", "hi", "--max-tokens", "-1"), "max_tokens must be an integer from 0 to"),
        (("complete", "hi", "--temperature", "3"), "temperature must be a number from 0 to 2"),
        (("complete", "hi", "--temperature", "nan"), "temperature must be a number from 0 to 2"),
        (("complete", "hi", "--seed", str(2**63)), f"seed must be an integer from {-(2**63)} to"),
        (("complete", "hi", "--top-p", "1.5"), "top_p must be a number from 0 to 1"),
        (("complete", "hi", "--top-k", "-2"), "top_k must be an integer from -1"),
        (("complete", "hi", "--stop", ""), "strings of at least one character"),
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


INTERRUPTED_WITHIN_A_CALLBACK = """
import gc, os, signal, sys
import refimpl
from refimpl.__main__ import main

def load(*_, **__):
    gc.callbacks.append(lambda *_: os.kill(os.getpid(), signal.SIGINT))
    gc.collect()
    sys.exit("it went on")

refimpl.load = load
sys.argv = ["refimpl", sys.argv[1], "text"]
main()
"""


@pytest.mark.parametrize("command", ["complete", "score"])
def test_ctrl_c_within_a_callback_is_heeded(command: str) -> None:
    """Python drops what is raised within a callback of the garbage collector, as JAX has one."""
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_WITHIN_A_CALLBACK, command],
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, b"", b"refimpl: interrupted\n")
