"""The Hub's client against a Hub of our own, made of one function: no socket is ever opened.

The stand-in answers the few requests that a download consists of, so what is tested is the real
`huggingface_hub` with its real cache and its real errors.
"""

import errno
import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils._http import default_client_factory
from refimpl_weights.errors import FormatError, MissingError
from refimpl_weights.hub import fetch, local_snapshot
from refimpl_weights.safetensors import INDEX_FILE

REPOSITORY = "google/gemma-test"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}).encode()
# No two alike: the Hub's cache keeps equal contents once.
SMALL_FILES = {
    "config.json": b'{"model_type": "gemma3_text"}',
    "generation_config.json": b'{"eos_token_id": 1}',
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b'{"add_bos_token": true}',
}
SINGLE = {**SMALL_FILES, "model.safetensors": b"single"}
SHARDED = {**SMALL_FILES, INDEX_FILE: INDEX, SHARDS[0]: b"one", SHARDS[1]: b"two"}
OTHER_FILES = {
    "README.md": b"text",
    "pytorch_model.bin": b"pickle",
    "gemma-Q4_K_M.gguf": b"GGUF",
    "original/consolidated.safetensors": b"other layout",
    "original/config.json": b"{}",
}

Answer = Callable[[httpx2.Request], httpx2.Response]


@dataclass
class Hub:
    """One repository, and what the Hub says of it. `refuse` takes the place of every answer."""

    files: dict[str, bytes] = field(default_factory=lambda: {**SHARDED, **OTHER_FILES})
    refuse: Answer | None = None
    requests: list[httpx2.Request] = field(default_factory=list)

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        return self.answer(request) if self.refuse is None else self.refuse(request)

    def answer(self, request: httpx2.Request) -> httpx2.Response:
        path = request.url.path
        if path == f"/api/models/{REPOSITORY}/revision/main":
            return httpx2.Response(200, json={"id": REPOSITORY, "sha": COMMIT, "siblings": []})
        if path == f"/api/models/{REPOSITORY}/tree/{COMMIT}":
            return httpx2.Response(200, json=[self.listing(name) for name in self.files])
        for revision in ("main", COMMIT):
            prefix = f"/{REPOSITORY}/resolve/{revision}/"
            if path.startswith(prefix):
                return self.content(path.removeprefix(prefix))
        if path.startswith(f"/api/models/{REPOSITORY}/"):
            return refusal(404, "RevisionNotFound")(request)
        return refusal(401, "RepoNotFound")(request)

    def listing(self, name: str) -> dict[str, object]:
        content = self.files[name]
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": name, "size": len(content), "oid": oid}

    def content(self, name: str) -> httpx2.Response:
        headers = {"X-Repo-Commit": COMMIT}
        if name not in self.files:
            return httpx2.Response(404, headers={**headers, "X-Error-Code": "EntryNotFound"})
        headers["ETag"] = hashlib.sha1(self.files[name]).hexdigest()
        return httpx2.Response(200, headers=headers, content=self.files[name])

    def num_downloads(self) -> int:
        return sum(
            request.method == "GET" and "/resolve/" in request.url.path for request in self.requests
        )


def refusal(status: int, code: str | None = None, message: str | None = None) -> Answer:
    headers = {"X-Error-Code": code, "X-Error-Message": message}
    return lambda request: httpx2.Response(
        status, headers={key: value for key, value in headers.items() if value is not None}
    )


def failing(error: type[httpx2.TransportError]) -> Answer:
    def fail(request: httpx2.Request) -> NoReturn:
        raise error("no route to host", request=request)

    return fail


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, no token of the user's, and no network at all."""

    def refuse(*arguments: object, **keywords: object) -> NoReturn:
        raise AssertionError(f"a test wants the network: {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    disable_progress_bars()
    return tmp_path / "hub"


@pytest.fixture
def hub() -> Iterator[Hub]:
    """The stand-in, in the place of every connection that `huggingface_hub` would open."""
    hub = Hub()
    huggingface_hub.set_client_factory(
        lambda: httpx2.Client(transport=httpx2.MockTransport(hub), follow_redirects=True)
    )
    yield hub
    huggingface_hub.set_client_factory(default_client_factory)


def lay_out(
    cache: Path, files: dict[str, bytes], *, listed: dict[str, bytes] | None = None
) -> Path:
    """A cached snapshot as `huggingface_hub` leaves it: blobs, links to them, a ref for main."""
    repository = cache / f"models--{REPOSITORY.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository / "blobs", repository / "refs", repository / "trees", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for name, content in files.items():
        blob = hashlib.sha1(content + name.encode()).hexdigest()
        (repository / "blobs" / blob).write_bytes(content)
        (snapshot / name).symlink_to(Path("../../blobs") / blob)
    if listed is not None:
        entries = {
            name: {"size": len(content), "blob_id": "0" * 40} for name, content in listed.items()
        }
        (repository / "trees" / f"{COMMIT}.json").write_text(
            json.dumps({"format_version": 1, "files": entries})
        )
    return snapshot


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class TestDownload:
    @pytest.mark.parametrize("files", [SINGLE, SHARDED], ids=["single", "sharded"])
    def test_what_a_model_needs_and_nothing_else(
        self, hub: Hub, cache: Path, files: dict[str, bytes]
    ) -> None:
        hub.files = {**files, **OTHER_FILES}
        folder = fetch(REPOSITORY)
        assert files_in(folder) == files
        assert folder.is_relative_to(cache)
        assert hub.num_downloads() == len(files)
        assert local_snapshot(REPOSITORY) == folder

    def test_a_second_time_downloads_nothing(self, hub: Hub) -> None:
        folder = fetch(REPOSITORY)
        hub.requests.clear()
        assert fetch(REPOSITORY) == folder
        assert hub.num_downloads() == 0
        hub.requests.clear()
        assert fetch(REPOSITORY, offline=True) == folder
        assert hub.requests == []

    def test_a_complete_snapshot_serves_where_the_hub_does_not(self, hub: Hub) -> None:
        folder = fetch(REPOSITORY)
        for refuse in (failing(httpx2.ConnectError), refusal(503), refusal(401, "GatedRepo")):
            hub.refuse = refuse
            assert fetch(REPOSITORY) == folder

    def test_a_name_is_not_a_pattern(self, hub: Hub) -> None:
        hub.files["sub/a[b]*.gguf"] = b"odd"
        path = fetch(REPOSITORY, file_name="sub/a[b]*.gguf")
        assert path.read_bytes() == b"odd"
        with pytest.raises(MissingError, match=r"lacks \*\.gguf"):
            fetch(REPOSITORY, file_name="*.gguf")

    def test_one_file_by_name(self, hub: Hub) -> None:
        path = fetch(REPOSITORY, file_name="gemma-Q4_K_M.gguf")
        assert path.read_bytes() == b"GGUF"
        assert files_in(path.parent) == {"gemma-Q4_K_M.gguf": b"GGUF"}
        assert fetch(REPOSITORY, file_name="gemma-Q4_K_M.gguf", offline=True) == path
        assert local_snapshot(REPOSITORY) is None

    def test_a_commit_and_a_token(self, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_environment")
        fetch(REPOSITORY, revision=COMMIT)
        fetch(REPOSITORY, revision=COMMIT, file_name="README.md", token="hf_argument")
        sent = [request.headers.get("authorization") for request in hub.requests]
        assert set(sent) == {"Bearer hf_environment", "Bearer hf_argument"}

    def test_what_ctrl_c_interrupted_is_finished_by_the_next(self, hub: Hub, cache: Path) -> None:
        def interrupt(request: httpx2.Request) -> httpx2.Response:
            if request.method == "GET" and request.url.path.endswith(SHARDS[1]):
                raise KeyboardInterrupt
            return hub.answer(request)

        hub.refuse = interrupt
        with pytest.raises(KeyboardInterrupt):
            fetch(REPOSITORY)
        assert local_snapshot(REPOSITORY) is None
        assert list(cache.rglob("*.incomplete")) == []
        hub.refuse = None
        assert files_in(fetch(REPOSITORY)) == SHARDED


class TestRefusals:
    @pytest.mark.parametrize(
        ("refuse", "message"),
        [
            (
                refusal(401, "GatedRepo"),
                f"{REPOSITORY} is gated: accept its terms on {constants.ENDPOINT}/{REPOSITORY}, "
                "then set HF_TOKEN to an access token of the account that accepted them",
            ),
            (
                refusal(401, "RepoNotFound"),
                f"the Hub has no repository {REPOSITORY}, or it is private: look at "
                f"{constants.ENDPOINT}/{REPOSITORY}, and set HF_TOKEN for a private one",
            ),
            (
                refusal(401, None, "Invalid credentials in Authorization header"),
                f"the Hub answered 401 to the request for {REPOSITORY} (Invalid credentials in "
                "Authorization header): set HF_TOKEN to a valid access token, or unset it",
            ),
            (
                refusal(403, None, "Enable access to public gated repositories"),
                f"the Hub answered 403 to the request for {REPOSITORY} (Enable access to public "
                "gated repositories): give the access token the permission to read gated "
                "repositories",
            ),
            (
                refusal(503, None, "Down for maintenance"),
                f"the Hub answered 503 to the request for {REPOSITORY} (Down for maintenance): "
                "try again later",
            ),
        ],
    )
    def test_the_hub_says_no(self, hub: Hub, refuse: Answer, message: str) -> None:
        hub.refuse = refuse
        with pytest.raises(MissingError) as caught:
            fetch(REPOSITORY)
        assert str(caught.value) == message

    @pytest.mark.parametrize("error", [httpx2.ConnectError, httpx2.ConnectTimeout])
    @pytest.mark.parametrize("file_name", [None, "x.gguf"])
    def test_no_network(
        self, hub: Hub, cache: Path, error: type[httpx2.TransportError], file_name: str | None
    ) -> None:
        hub.refuse = failing(error)
        with pytest.raises(MissingError) as caught:
            fetch(REPOSITORY, file_name=file_name)
        assert str(caught.value) == (
            f"{REPOSITORY} is not, or not completely, in the cache {cache}, and the Hub cannot be "
            f"reached ({error.__name__}: no route to host): see to the network or the proxy"
        )

    @pytest.mark.parametrize("error", [httpx2.ProxyError, httpx2.RemoteProtocolError])
    def test_a_connection_that_breaks(self, hub: Hub, error: type[httpx2.TransportError]) -> None:
        hub.refuse = failing(error)
        with pytest.raises(MissingError, match=f"could not be fetched .*{error.__name__}.*try ag"):
            fetch(REPOSITORY)

    def test_something_that_is_not_the_hub(self, hub: Hub) -> None:
        # The sign-in page of a hotel's network, for example.
        hub.refuse = lambda request: httpx2.Response(200, html="<h1>Welcome</h1>")
        with pytest.raises(MissingError, match=r"could not be fetched to .*JSONDecodeError"):
            fetch(REPOSITORY)

    def test_no_such_revision_repository_or_file(self, hub: Hub) -> None:
        with pytest.raises(MissingError, match=f"{REPOSITORY} has no revision 'v9': look at"):
            fetch(REPOSITORY, revision="v9")
        with pytest.raises(MissingError, match="the Hub has no repository google/gemma-tset"):
            fetch("google/gemma-tset")
        message = rf"lacks x\.gguf: .*what {constants.ENDPOINT}/{REPOSITORY} has"
        with pytest.raises(MissingError, match=message):
            fetch(REPOSITORY, file_name="x.gguf")

    @pytest.mark.parametrize("name", ["./folder/model", "a/b/c", "", "a b", "model.git"])
    def test_what_is_no_name_at_all(self, name: str) -> None:
        with pytest.raises(MissingError, match="is not a repository, expected owner/name"):
            fetch(name)
        assert local_snapshot(name) is None

    @pytest.mark.parametrize("file_name", ["../../refs/main", "/etc/hostname", "a\\b", "", "."])
    def test_a_file_outside_the_repository(self, cache: Path, file_name: str) -> None:
        lay_out(cache, SINGLE)
        with pytest.raises(MissingError, match="is not the name of a file in"):
            fetch(REPOSITORY, file_name=file_name, offline=True)

    def test_a_repository_that_lacks_a_shard(self, hub: Hub) -> None:
        del hub.files[SHARDS[1]]
        with pytest.raises(MissingError, match=rf"lacks {SHARDS[1]}: go online and"):
            fetch(REPOSITORY)
        assert local_snapshot(REPOSITORY) is None

    def test_a_repository_without_such_a_model(self, hub: Hub) -> None:
        hub.files = {"README.md": b"", "x.gguf": b"GGUF"}
        with pytest.raises(
            MissingError, match=r"lacks config\.json, model\.safetensors: go online"
        ):
            fetch(REPOSITORY)

    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
            RuntimeError("Data processing error: No space left on device (os error 28)"),
        ],
    )
    def test_a_full_disk(
        self, cache: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*arguments: object, **keywords: object) -> NoReturn:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(MissingError) as caught:
            fetch(REPOSITORY)
        assert str(caught.value) == (
            f"the disk is full, there is no room for {REPOSITORY} in {cache}: make room, or set "
            "HF_HOME to a folder on another disk"
        )
        assert caught.value.__cause__ is error


class TestOffline:
    def test_nothing_in_the_cache(self, hub: Hub, cache: Path) -> None:
        message = (
            f"{REPOSITORY} is not, or not completely, in the cache {cache}, and downloads are "
            "switched off: go online for a first fetch, without HF_HUB_OFFLINE"
        )
        for file_name in (None, "x.gguf"):
            with pytest.raises(MissingError) as caught:
                fetch(REPOSITORY, offline=True, file_name=file_name)
            assert str(caught.value) == message
        assert local_snapshot(REPOSITORY) is None
        assert hub.requests == []

    @pytest.mark.parametrize("offline", [None, False])
    def test_the_environment_decides(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch, offline: bool | None
    ) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(MissingError, match="downloads are switched off"):
            fetch(REPOSITORY, offline=offline)

    @pytest.mark.parametrize("files", [SINGLE, SHARDED], ids=["single", "sharded"])
    @pytest.mark.parametrize("with_listing", [True, False])
    def test_a_complete_snapshot(
        self, hub: Hub, cache: Path, files: dict[str, bytes], with_listing: bool
    ) -> None:
        snapshot = lay_out(cache, files, listed={**files, **OTHER_FILES} if with_listing else None)
        assert local_snapshot(REPOSITORY) == snapshot
        assert local_snapshot(REPOSITORY, revision=COMMIT) == snapshot
        assert local_snapshot(REPOSITORY, revision="v9") is None
        assert fetch(REPOSITORY, offline=True) == snapshot
        assert hub.requests == []

    @pytest.mark.parametrize("with_listing", [True, False])
    @pytest.mark.parametrize(
        ("files", "name"),
        [
            (SINGLE, "config.json"),
            (SINGLE, "model.safetensors"),
            (SHARDED, "config.json"),
            (SHARDED, INDEX_FILE),
            (SHARDED, SHARDS[0]),
        ],
    )
    def test_an_incomplete_snapshot(
        self, cache: Path, files: dict[str, bytes], name: str, with_listing: bool
    ) -> None:
        snapshot = lay_out(cache, files, listed=files if with_listing else None)
        # A link without its blob is what remains when somebody makes room by hand.
        (snapshot / name).resolve().unlink()
        assert local_snapshot(REPOSITORY) is None
        with pytest.raises(MissingError, match=r"not completely, in the cache|lacks .*go online"):
            fetch(REPOSITORY, offline=True)

    def test_a_damaged_index(self, cache: Path) -> None:
        lay_out(cache, {**SHARDED, INDEX_FILE: b"{"})
        assert local_snapshot(REPOSITORY) is None
        with pytest.raises(FormatError, match=INDEX_FILE):
            fetch(REPOSITORY, offline=True)

    def test_the_environment_as_a_user_sets_it(self, tmp_path: Path) -> None:
        snapshot = lay_out(tmp_path / "home" / "hub", SINGLE)
        script = f"from refimpl_weights.hub import fetch; print(fetch({REPOSITORY!r}))"
        environment = {
            **os.environ,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        environment.pop("HF_HUB_CACHE", None)
        child = subprocess.run(
            [sys.executable, "-c", script],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert child.stdout.strip() == str(snapshot)
