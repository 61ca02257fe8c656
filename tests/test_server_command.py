"""`refimpl serve` as a user starts it: a process of its own, a real socket, the official client."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from refimpl_weights.synthetic import write_checkpoint

from refimpl import __main__ as entry
from refimpl.serve.fingerprint import fingerprint
from refimpl.serve.names import names_of
from refimpl.server.keys import read_keys
from refimpl.server.sources import FIELDS, flag_of
from tests.served import eventually

# Programs are compiled from nothing, on a machine that may have much else to do.
START_SECONDS = 240
STOP_SECONDS = 30
# Longer than a test would wait, so that one that drains is not one that ends at once.
DRAIN_SECONDS = 120
KEY = "sk-test-key-that-nobody-knows"
PROMPT = "secretive prompt"


class Process:
    """The command, and what it has printed so far."""

    def __init__(self, *arguments: str, **variables: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "refimpl", "serve", "--port", "0", *arguments],
            env={**os.environ, "HF_HUB_OFFLINE": "1", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.out, self.err = list[str](), list[str]()
        self._readers = [
            threading.Thread(target=lines.extend, args=[stream], daemon=True)
            for lines, stream in (
                (self.out, self._process.stdout), (self.err, self._process.stderr),
            )
        ]  # fmt: skip
        for reader in self._readers:
            reader.start()

    def wait_for(self, pattern: str, lines: list[str], *, seconds: float) -> str:
        """The first match in what it prints."""
        until = time.monotonic() + seconds
        while (found := re.search(pattern, "".join(lines))) is None:
            assert self._process.poll() is None, "".join(self.err)
            assert time.monotonic() < until, "".join(self.err)
            time.sleep(0.05)
        return found[0]

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def ended(self) -> int:
        """Its exit status; it has left no process behind."""
        status = self._process.wait(STOP_SECONDS)
        for reader in self._readers:
            reader.join(5)
        with pytest.raises(ProcessLookupError):
            os.killpg(self._process.pid, 0)
        return status

    def close(self) -> None:
        """End it if it runs, whatever went wrong."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(STOP_SECONDS)
        for reader in self._readers:
            reader.join(5)
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()


@contextmanager
def started(*arguments: str, **variables: str) -> Iterator[Process]:
    process = Process(*arguments, **variables)
    try:
        yield process
    finally:
        process.close()


class Server(Process):
    """One that is ready."""

    url: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, beside which is what was compiled for it."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", "gemma_mqa")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    process = Server(
        "--model", str(folder), "--slots", "1", "--context", "128", "--log-format", "json",
        REFIMPL_API_KEYS=KEY, REFIMPL_ALIASES="tea", REFIMPL_DRAIN_SECONDS=str(DRAIN_SECONDS),
        REFIMPL_CACHE_DIR=str(folder.parent),
    )  # fmt: skip
    try:
        process.url = process.wait_for(
            r"http://127\.0\.0\.1:\d+", process.err, seconds=START_SECONDS
        )
        process.wait_for(r"Ctrl-C stops it", process.out, seconds=START_SECONDS)
        yield process
    finally:
        process.close()


def client_of(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60)


def body(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": PROMPT, "max_tokens": 6, "temperature": 0, **more}


def test_the_printed_lines_work_as_they_stand(server: Server) -> None:
    printed = "".join(server.out)
    curl = re.search(r"^curl .*?'$", printed, re.DOTALL | re.MULTILINE)
    snippet = re.search(r"^import os.*?^print\(.*?$", printed, re.DOTALL | re.MULTILINE)
    assert curl is not None
    assert snippet is not None
    assert "tiny is ready" in printed
    assert "also called tea" in printed
    environment = {**os.environ, "REFIMPL_KEY": KEY}
    replied = subprocess.run(
        ["bash", "-c", f"{curl[0]} --silent --show-error --fail"],
        env=environment, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    reply = json.loads(replied.stdout)
    [choice], num_tokens = reply["choices"], reply["usage"]["completion_tokens"]
    # Sampled, and so it may end early.
    assert num_tokens == 16 if choice["finish_reason"] == "length" else 1 <= num_tokens <= 16
    subprocess.run(
        [sys.executable, "-c", snippet[0]], env=environment, timeout=60, check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip


def test_the_official_client_streaming_and_not(server: Server) -> None:
    client = client_of(server)
    whole = client.completions.create(**body(logprobs=1, seed=1))
    assert (whole.model, whole.object, whole.choices[0].finish_reason) == (
        "tiny", "text_completion", "length",
    )  # fmt: skip
    assert whole.system_fingerprint is not None
    assert re.fullmatch(r"fp_[0-9a-f]{12}", whole.system_fingerprint)
    assert whole.model_extra == {}, "the client knows every field"
    chunks = list(client.completions.create(**body(seed=1, stream=True)))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks].count("length") == 1
    assert client.models.list().data[0].id == "tiny"


def test_the_official_client_in_an_event_loop(server: Server) -> None:
    async def many() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:

            async def one() -> str:
                stream = await client.completions.create(**body(stream=True, model="tea"))
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(one() for _ in range(3)))

    texts = asyncio.run(asyncio.wait_for(many(), 60))
    alone = client_of(server).completions.create(**body()).choices[0].text
    assert texts == [alone] * 3


def test_errors_reach_the_official_client_as_what_they_are(server: Server) -> None:
    with pytest.raises(openai.AuthenticationError) as wrong:
        client_of(server).with_options(api_key="sk-wrong").models.list()
    assert wrong.value.code == "invalid_api_key"
    assert wrong.value.request_id is not None
    with pytest.raises(openai.NotFoundError) as unknown:
        client_of(server).completions.create(**body(model="gpt-9"))
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")


def test_http_2_without_tls(server: Server) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx2.Client(http1=False, http2=True, headers=headers, timeout=60) as client:
        reply = client.post(f"{server.url}/v1/completions", json=body())
        assert (reply.http_version, reply.status_code) == ("HTTP/2", 200)
        with client.stream("POST", f"{server.url}/v1/completions", json=body(stream=True)) as got:
            assert list(got.iter_lines())[-2:] == ["data: [DONE]", ""]
        figures = client.get(f"{server.url}/metrics").text
    assert 'vllm:request_success_total{finished_reason="length",model_name="tiny"}' in figures
    assert re.search(r"^refimpl:slots_in_use\{.*\} 0\.0$", figures, re.MULTILINE)
    compilations = re.search(r"^refimpl:compilations_total\{.*\} (\d+)", figures, re.MULTILINE)
    assert compilations is not None
    assert int(compilations[1]) >= 5


def num_requests(server: Server) -> int:
    """Requests that run or wait in the engine."""
    figures = httpx2.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    return sum(int(count) for count in re.findall(r"num_requests_\w+{.*} (\d+)", figures))


def test_one_signal_lets_what_runs_end_another_does_not_and_either_exits_with_0(
    server: Server,
) -> None:
    """Comes last: the server is gone afterwards."""
    client = client_of(server)

    def asked(n: int) -> openai.types.Completion:
        # Each is a hundred tokens in the one slot, and this many of them one after the other.
        return client.completions.create(
            **body(max_tokens=100, n=n, extra_body={"ignore_eos": True})
        )

    with ThreadPoolExecutor() as pool:
        few = pool.submit(asked, 10)
        eventually(lambda: num_requests(server) == 1)
        many = pool.submit(asked, 100)
        eventually(lambda: num_requests(server) == 2)
        server.signal(signal.SIGTERM)
        assert [choice.finish_reason for choice in few.result(60).choices] == ["length"] * 10
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            asked(1)
        assert not many.done()
        server.signal(signal.SIGTERM)
        with pytest.raises(openai.APIError):
            many.result(STOP_SECONDS)
    # Far less than the time to drain.
    assert server.ended() == 0
    lines = [json.loads(line) for line in server.err if line.startswith("{")]
    [whole] = [line for line in lines if line.get("completion_tokens") == 1000]
    assert (whole["status"], whole["key"]) == (200, "key-1")
    assert {line["level"] for line in lines} == {"info"}
    printed = "".join(server.out + server.err)
    assert KEY not in printed
    assert PROMPT not in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("is_asked", [False, True])
def test_however_often_it_is_told_to_stop_it_exits_with_0(folder: Path, is_asked: bool) -> None:
    with started(
        "--model", str(folder), "--slots", "1", "--context", "128", "--no-require-model",
        REFIMPL_CACHE_DIR=str(folder.parent),
    ) as process:  # fmt: skip
        url = process.wait_for(r"http://127\.0\.0\.1:\d+", process.err, seconds=START_SECONDS)
        process.wait_for(r"Ctrl-C stops it", process.out, seconds=START_SECONDS)
        with ThreadPoolExecutor() as pool, httpx2.Client(timeout=60) as client:
            if is_asked:
                asked = body(max_tokens=100, n=100)
                pool.submit(client.post, f"{url}/v1/completions", json=asked)
                time.sleep(0.5)
            # More often than any step of its end takes, until Python's own is over, too.
            while process.is_running:
                process.signal(signal.SIGINT)
                time.sleep(0.02)
        assert process.ended() == 0
        printed = "".join(process.err)
        assert "Traceback" not in printed
        assert "FATAL" not in printed


def test_ctrl_c_while_it_loads_exits_with_0(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny", "gemma_mqa")
    with started("--model", str(folder), REFIMPL_CACHE_DIR=str(tmp_path)) as process:
        process.wait_for(r"answers; loading tiny", process.err, seconds=60)
        process.signal(signal.SIGINT)
        assert process.ended() == 0
        assert "Traceback" not in "".join(process.err)


def test_what_it_cannot_load_is_said_in_one_line(tmp_path: Path) -> None:
    with started("--model", "no-such-model", REFIMPL_CACHE_DIR=str(tmp_path)) as process:
        assert process.ended() == 2
        assert "no model, file or folder is called 'no-such-model'" in process.err[-1]
        assert "Traceback" not in "".join(process.err)


# What it prints instead of serving.


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command in this process: (status, standard output, standard error)."""

    def call(*arguments: str, **variables: str) -> tuple[int, str, str]:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["refimpl", "serve", *arguments])
        with pytest.raises(SystemExit) as stopped:
            entry.main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return call


def test_settings_are_shown_with_their_origins_and_without_keys(printed, tmp_path: Path) -> None:
    file = tmp_path / "refimpl.toml"
    file.write_text("max_queue = 7\nslots = 3\n", encoding="utf-8")
    status, out, err = printed(
        "--config", str(file), "--slots", "5", "--no-list-end-of-text", "--show-config",
        REFIMPL_PORT="9000", REFIMPL_API_KEYS=f"{KEY},sk-2", REFIMPL_SLOT="4",
    )  # fmt: skip
    assert status == 0
    lines = out.splitlines()
    assert "slots = 5  # --slots" in lines
    assert f"max_queue = 7  # {file}" in lines
    assert "port = 9000  # REFIMPL_PORT" in lines
    assert "list_end_of_text = false  # --list-end-of-text" in lines
    assert 'numerics = "float32"  # default' in lines
    assert "# 2 API keys  # REFIMPL_API_KEYS" in lines
    assert KEY not in out + err
    assert "REFIMPL_API_KEYS" not in os.environ
    assert "REFIMPL_SLOT begins with REFIMPL_ and is no setting" in err


def test_mistakes_end_with_one_line_and_status_2(printed) -> None:
    status, out, err = printed("--host", "0.0.0.0", "--port", "0")
    assert (status, out) == (2, "")
    assert "--allow-unauthenticated" in err
    status, out, err = printed("--slots", "none")
    assert (status, out) == (2, "")
    assert err.startswith("refimpl: --slots: input should be a valid integer")
    assert err.count("\n") == 1
    assert printed("--new-key", "a b")[0] == 2


def test_a_new_key_is_an_entry_for_the_file_of_keys(printed, tmp_path: Path) -> None:
    status, out, err = printed("--new-key", "alice")
    assert status == 0
    key = err.split()[-1]
    assert key not in out
    file = tmp_path / "keys.toml"
    file.write_text(out, encoding="utf-8")
    found = read_keys(file).find(f"Bearer {key}")
    assert found is not None
    assert found.name == "alice"


def test_there_is_a_flag_for_every_setting(printed) -> None:
    status, out, _ = printed("--help", COLUMNS="200")
    assert status == 0
    assert [name for name in FIELDS if flag_of(name) not in out] == []


# The fingerprint.


def test_a_fingerprint_follows_whatever_a_reply_depends_on(tmp_path: Path) -> None:
    file = tmp_path / "weights.gguf"
    file.write_bytes(bytes(range(256)) * 1024)
    weights = {"embed": np.zeros((2, 3), np.float32)}

    def of(path: Path = file, **more: Any) -> str:
        return fingerprint(path, **{"parameters": weights, "numerics": "float32", **more})

    first = of()
    assert re.fullmatch(r"fp_[0-9a-f]{12}", first)
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(file.read_bytes())
    assert of(copy) == first, "a file's name says nothing"
    seen = {
        first,
        of(numerics="hf_bfloat16"),
        of(parameters={"embed": np.zeros((3, 2), np.float32)}),
        of(parameters={"other": np.zeros((2, 3), np.float32)}),
    }
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    copy.write_bytes(changed)
    seen.add(of(copy))
    copy.write_bytes(file.read_bytes() + b"x")
    seen.add(of(copy))
    assert len(seen) == 6


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (None, ("google/gemma-3-270m", "gemma3:270m")),
        ("gemma3:4b", ("google/gemma-3-4b-it", "gemma3:4b", "gemma3:4b-it")),
        ("GOOGLE/gemma-3-4b-it", ("google/gemma-3-4b-it", "gemma3:4b", "gemma3:4b-it")),
        ("somebody/gemma-tuned", ("somebody/gemma-tuned",)),
        ("there/my-weights.gguf", ("my-weights",)),
    ],
)
def test_names_that_a_model_answers_to(model, names):
    assert names_of(model) == names


def test_a_folder_is_called_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert names_of(".") == (tmp_path.name,)
