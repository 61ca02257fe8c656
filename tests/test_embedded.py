"""The embedded model: assembled once, by any number of processes, whatever befalls them."""

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import platformdirs
import pytest
from refimpl_weights import embedded
from refimpl_weights.errors import FormatError, MissingError

NAME = "tiny.gguf"
# Two and a half blocks and a bit: the first part ends inside a block, the last is a short one.
PART_BYTES = (embedded.BLOCK_BYTES * 2 + 7, 5, embedded.BLOCK_BYTES // 2)
NUM_BLOCKS = 3 + 1 + 1
DEADLINE_SECONDS = 60.0


@dataclass(frozen=True)
class Package:
    """A stand-in for the real package, with the same face and parts of a few megabytes."""

    root: Path
    content: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def part(self, number: int) -> Path:
        return self.root / embedded.PACKAGE / "data" / f"{NAME}.part{number:02}"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Package]:
    """The stand-in, importable here and in child processes in front of the real package."""
    content = os.urandom(sum(PART_BYTES))
    package = Package(tmp_path / "site", content)
    package.part(0).parent.mkdir(parents=True)
    start = 0
    for number, size in enumerate(PART_BYTES):
        package.part(number).write_bytes(content[start : start + size])
        start += size
    (package.root / embedded.PACKAGE / "data" / "GEMMA_TERMS.html").write_text("terms")
    (package.root / embedded.PACKAGE / "__init__.py").write_text(
        "from pathlib import Path\n"
        f"MODEL_NAME = {NAME!r}\n"
        f"EXPECTED_SHA256 = {package.sha256!r}\n"
        "def chunk_paths():\n"
        f"    return sorted(Path(__file__).parent.glob('data/{NAME}.part*'))\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.root), *sys.path]))
    monkeypatch.setenv(embedded.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(package.root)
    sys.modules.pop(embedded.PACKAGE, None)
    yield package
    sys.modules.pop(embedded.PACKAGE, None)


@pytest.fixture
def cache(package: Package) -> Path:
    """The folder that the file goes to; it does not exist yet."""
    return embedded.cache_folder()


def files_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def partials_in(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*.partial"))


FINISHED = {NAME, f".{NAME}.verified"}


def forbid_hashing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError("hashed a file that the marker vouches for")

    monkeypatch.setattr(hashlib, "sha256", refuse)


class TestAssemble:
    def test_the_parts_make_the_file(self, package: Package, cache: Path) -> None:
        calls: list[tuple[int, int]] = []
        path = embedded.assemble(progress=lambda done, total: calls.append((done, total)))
        assert path == embedded.embedded_path() == cache / NAME
        assert path.read_bytes() == package.content
        assert files_in(cache) == FINISHED
        total = len(package.content)
        assert len(calls) == NUM_BLOCKS
        assert [calls[0], calls[-1]] == [(embedded.BLOCK_BYTES, total), (total, total)]
        assert calls == sorted(calls)

    def test_others_may_read_it_as_far_as_the_umask_allows(self, cache: Path) -> None:
        previous = os.umask(0o027)
        try:
            mode = embedded.assemble().stat().st_mode
        finally:
            os.umask(previous)
        assert mode & 0o777 == 0o640

    def test_a_warm_start_neither_copies_nor_hashes(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = embedded.assemble().stat()
        forbid_hashing(monkeypatch)
        calls: list[int] = []
        after = embedded.assemble(progress=lambda done, total: calls.append(done)).stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
        assert calls == []

    @pytest.mark.parametrize("marker", [None, b"", b"\xff\0", b"sha256 x size 1 mtime_ns 1\n"])
    def test_a_sound_file_with_a_bad_marker_is_hashed_once_and_kept(
        self, cache: Path, marker: bytes | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = embedded.assemble().stat()
        path = cache / f".{NAME}.verified"
        path.unlink() if marker is None else path.write_bytes(marker)
        calls: list[tuple[int, int]] = []
        after = embedded.assemble(progress=lambda done, total: calls.append((done, total))).stat()
        assert after.st_ino == before.st_ino
        assert calls[-1] == (sum(PART_BYTES), sum(PART_BYTES))
        forbid_hashing(monkeypatch)
        assert embedded.assemble() == cache / NAME

    @pytest.mark.parametrize(
        ("damage", "num_blocks_hashed"),
        [
            (lambda content: b"", 0),
            (lambda content: content[:-1], 0),
            (lambda content: content + b"\0", 0),
            (lambda content: bytes(len(content)), 3),
        ],
        ids=["empty", "truncated", "longer", "zeros"],
    )
    def test_a_damaged_file_is_rebuilt(
        self,
        package: Package,
        cache: Path,
        damage: Callable[[bytes], bytes],
        num_blocks_hashed: int,
    ) -> None:
        path = embedded.assemble()
        path.write_bytes(damage(package.content))
        calls: list[int] = []
        assert embedded.assemble(progress=lambda done, total: calls.append(done)) == path
        assert path.read_bytes() == package.content
        assert files_in(cache) == FINISHED
        # A wrong size is reason enough, without a look at the content.
        assert len(calls) == num_blocks_hashed + NUM_BLOCKS

    def test_a_file_of_another_version_is_replaced(self, package: Package, cache: Path) -> None:
        cache.mkdir()
        (cache / NAME).write_bytes(os.urandom(len(package.content)))
        assert embedded.assemble().read_bytes() == package.content


class TestFailure:
    def test_ctrl_c_leaves_nothing_behind(self, cache: Path) -> None:
        def interrupt(done: int, total: int) -> None:
            if done > embedded.BLOCK_BYTES:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            embedded.assemble(progress=interrupt)
        assert files_in(cache) == set()

    def test_a_full_disk_is_noticed_before_anything_is_written(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[Path] = []

        def disk_usage(path: Path) -> SimpleNamespace:
            asked.append(path)
            return SimpleNamespace(free=sum(PART_BYTES) - 1)

        monkeypatch.setattr(shutil, "disk_usage", disk_usage)
        with pytest.raises(MissingError, match=r"no room .* needs 3 MB; make room, or set REFIMPL"):
            embedded.assemble()
        assert asked == [cache.parent]
        assert not cache.exists()

    def test_a_disk_that_fills_up_meanwhile(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fsync(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(MissingError, match="no room"):
            embedded.assemble()
        assert files_in(cache) == set()

    def test_a_cache_that_cannot_be_a_folder(
        self, package: Package, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(embedded.CACHE_VARIABLE, str(package.part(0) / "cache"))
        with pytest.raises(MissingError, match=r"Not a directory.*set REFIMPL_CACHE_DIR"):
            embedded.assemble()

    def test_damaged_parts_are_not_passed_on(self, package: Package, cache: Path) -> None:
        package.part(1).write_bytes(b"wrong")
        with pytest.raises(FormatError, match=f"expected {package.sha256}; install .* again"):
            embedded.assemble()
        assert files_in(cache) == set()

    def test_a_package_without_its_parts(self, package: Package) -> None:
        package.part(1).unlink()
        package.part(1).symlink_to("nowhere")
        assert not embedded.is_installed()
        with pytest.raises(MissingError, match=r"it lacks .*tiny\.gguf\.part01; install it again"):
            embedded.assemble()

    def test_no_package(self, package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, embedded.PACKAGE, None)
        assert not embedded.is_installed()
        for ask in (embedded.assemble, embedded.embedded_path, embedded.terms_path):
            with pytest.raises(MissingError, match=r"`uv sync`.*'refimpl\[gemma3-270m\]'"):
                ask()


def start_child(script: str) -> subprocess.Popen[bytes]:
    """A process of its own that finds the stand-in through PYTHONPATH."""
    preamble = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        # A job in the background starts with SIGINT ignored, and its children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from refimpl_weights.embedded import assemble, cache_folder\n"
        "home = cache_folder().parent\n"
        "def wait_for(pattern, number):\n"
        f"    limit = time.monotonic() + {DEADLINE_SECONDS}\n"
        "    while len(list(home.glob(pattern))) < number:\n"
        "        assert time.monotonic() < limit\n"
        "        time.sleep(0.01)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", preamble + script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


class TestProcesses:
    def test_two_that_start_together_both_get_the_file(self, package: Package, cache: Path) -> None:
        # Each waits in the middle of its copy until the other is in the middle of its own.
        script = (
            "def meet(done, total):\n"
            "    (home / f'inside.{os.getpid()}').touch()\n"
            "    wait_for('inside.*', 2)\n"
            "path = assemble(progress=meet)\n"
            "sys.stdout.buffer.write(path.read_bytes())\n"
        )
        children = [start_child(script) for _ in range(2)]
        outputs = [child.communicate(timeout=DEADLINE_SECONDS) for child in children]
        assert [child.returncode for child in children] == [0, 0], outputs
        assert [stdout for stdout, _ in outputs] == [package.content] * 2
        assert files_in(cache) == FINISHED
        assert embedded.assemble().read_bytes() == package.content

    @pytest.mark.parametrize(
        ("number", "num_leftovers"), [(signal.SIGKILL, 1), (signal.SIGINT, 0)], ids=["kill", "int"]
    )
    def test_one_that_is_stopped_in_the_middle(
        self, package: Package, cache: Path, number: signal.Signals, num_leftovers: int
    ) -> None:
        child = start_child(
            "def stop(done, total):\n"
            "    (home / 'inside').touch()\n"
            "    time.sleep(3600)\n"
            "assemble(progress=stop)\n"
        )
        limit = time.monotonic() + DEADLINE_SECONDS
        while not (cache.parent / "inside").exists():
            assert child.poll() is None, child.communicate()
            assert time.monotonic() < limit
            time.sleep(0.01)
        child.send_signal(number)
        try:
            child.communicate(timeout=DEADLINE_SECONDS)
        finally:
            child.kill()
        assert child.returncode == -number
        leftovers = partials_in(cache)
        assert files_in(cache) == {leftover.name for leftover in leftovers}
        assert len(leftovers) == num_leftovers

        # What is left may belong to a process that is still at work, so it stays for an hour.
        assert embedded.assemble().read_bytes() == package.content
        assert partials_in(cache) == leftovers
        for leftover in leftovers:
            os.utime(leftover, (time.time() - 3601, time.time() - 3601))
        embedded.assemble()
        assert files_in(cache) == FINISHED


class TestCacheFolder:
    def test_it_is_the_systems_unless_told_otherwise(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for unset in (None, ""):
            monkeypatch.delenv(embedded.CACHE_VARIABLE, raising=False)
            if unset is not None:
                monkeypatch.setenv(embedded.CACHE_VARIABLE, unset)
            assert embedded.cache_folder() == platformdirs.user_cache_path("refimpl")
        monkeypatch.setenv(embedded.CACHE_VARIABLE, "~/models")
        assert embedded.cache_folder() == Path.home() / "models"
        monkeypatch.setenv(embedded.CACHE_VARIABLE, "models")
        assert embedded.cache_folder() == Path.cwd() / "models"


class TestRealPackage:
    def test_the_real_model(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(embedded.CACHE_VARIABLE, str(tmp_path))
        assert embedded.is_installed()
        assert "Gemma Terms of Use" in embedded.terms_path().read_text(encoding="utf-8")
        path = embedded.assemble()
        assert path.name == "gemma-3-270m-q4_k_m.gguf"
        assert path.stat().st_size == 253_113_024
        with path.open("rb") as file:
            assert file.read(4) == b"GGUF"
        # `assemble` has hashed it; that it equals the published hash is the package's statement.
        marker = (tmp_path / f".{path.name}.verified").read_text()
        assert marker.startswith("sha256 a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c")
        forbid_hashing(monkeypatch)
        assert embedded.assemble() == path
        path.unlink()
