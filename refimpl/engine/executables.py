"""Compiled programs on disk, whole: a later start neither traces nor lowers them again.

JAX's own cache keeps what the compiler makes, but is asked only once a program has been traced and
lowered, which takes longer than reading it, and memory. Here an entry is found by what a program
depends on: our sources, the model's configuration and numerics, the shapes of its arrays, and the
versions and flags of JAX. The programs of an engine lie in a folder of their own, so that all can
be read before they are asked for, below one of this machine's processor; see `compile_cache.py`.

An entry is a SHA-256 of the rest, and a compressed pickle: so a folder counts only if nobody but
its user can write to it. An entry that is not whole counts for nothing. Nothing is read or kept
while code runs that is not that of our files; see `refimpl.sources`.
"""

import hashlib
import os
import pickle
import shutil
import stat
import tempfile
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import jax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from refimpl import sources
from refimpl.engine.compile_cache import processor

# Of the hash in front of an entry.
_DIGEST_BYTES = 32
_SUFFIX = ".executable"
# Threads that read ahead. Most of the time is XLA's, which shares little with other threads.
_READERS = 2
# A month: what is not used for so long is of a model or of options that are no more.
_KEPT_SECONDS = 30 * 24 * 3600

_SETTING = threading.Lock()


@dataclass(frozen=True)
class Executable:
    """A program for arrays of one form.

    Attributes:
        run: takes the leaves of its arguments, and gives those of its result.
        outputs: the tree of the result.
    """

    run: Callable[..., list[Any]]
    outputs: Any


class ExecutableStore:
    """Executables in a folder, by a description of what they depend on. Threads may share it.

    Attributes:
        folder: made when something is put into it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ahead = dict[Path, Future[Executable | None]]()
        self._readers: ThreadPoolExecutor | None = None

    def read_ahead(self, *names: str) -> None:
        """Begin to read what is kept, in threads of its own: to get it then takes no time.

        Args:
            names: how the names begin of what is to be read; none for all.
        """
        if self._readers is not None or not _is_safe(self.folder):
            return
        with suppress(OSError):
            # First: what is used is not taken for old by another process.
            os.utime(self.folder)
        sizes = dict[Path, int]()
        for path in self.folder.glob(f"*{_SUFFIX}"):
            with suppress(OSError):
                sizes[path] = path.stat().st_size
        # What is long to read first, so that the threads end together.
        paths = sorted(sizes, key=lambda path: -sizes[path])
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="executables")
        for path in paths:
            if not names or path.name.startswith(names):
                self._ahead[path] = self._readers.submit(_read, path)

    def end_reading(self) -> None:
        """Forget what was read and not asked for, and read no more ahead."""
        if self._readers is not None:
            self._readers.shutdown(wait=False, cancel_futures=True)
        self._ahead.clear()

    def get(self, name: str, description: str) -> Executable | None:
        """The executable that was kept under this name and description, ready to be run."""
        if not sources.are_what_runs() or not _is_safe(self.folder):
            return None
        path = self._path(name, description)
        ahead = self._ahead.pop(path, None)
        return _read(path) if ahead is None else ahead.result()

    def put(self, name: str, description: str, executable: Executable) -> None:
        """Keep an executable; does nothing where nothing can be written.

        Nor where a function of ours was replaced, or its file edited, since it was imported. It
        must have been compiled, not read: what was read cannot be written again (jaxlib 0.12).
        """
        if not sources.are_what_runs():
            return
        serialized = cast(Any, serialize_executable).serialize(executable.run)
        # A fifth of the bytes, in less time than it takes to write all of them.
        payload = zlib.compress(pickle.dumps((serialized, executable.outputs)), level=1)
        path = self._path(name, description)
        try:
            if not self.folder.is_dir():
                self.folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self.folder.mkdir(mode=0o700, exist_ok=True)
                _remove_unused(self.folder.parent)
            if not _is_safe(self.folder):
                return
            # Under another name first: a reader never sees half of it.
            with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
                partial = Path(file.name)
                try:
                    file.write(hashlib.sha256(payload).digest() + payload)
                    file.flush()
                    partial.replace(path)
                finally:
                    # Gone already, unless the disk was full.
                    partial.unlink(missing_ok=True)
        except OSError:
            return

    def _path(self, name: str, description: str) -> Path:
        digest = hashlib.sha256("\n".join((name, description)).encode()).hexdigest()
        return self.folder / f"{name.replace(' ', '-')}-{digest[:32]}{_SUFFIX}"


def _read(path: Path) -> Executable | None:
    try:
        entry = path.read_bytes()
    except OSError:
        return None
    digest, payload = entry[:_DIGEST_BYTES], entry[_DIGEST_BYTES:]
    if hashlib.sha256(payload).digest() != digest:
        return None
    try:
        serialized, outputs = pickle.loads(zlib.decompress(payload))
        run = cast(Any, serialize_executable).deserialize_and_load(
            *serialized, execution_devices=jax.devices()[:1]
        )
    except Exception as error:  # Of zlib, of pickle, of whatever it makes, or of XLA.
        warnings.warn(
            f"{path} is whole but cannot be read: {type(error).__name__}: {error}; what it held is "
            "compiled anew. Delete the file if this comes again",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return Executable(run, outputs)


def _is_safe(folder: Path) -> bool:
    """Whether nobody else can write to a folder: a pickle may do anything to who reads it."""
    try:
        status = folder.stat()
    except OSError:
        return False
    is_own = not hasattr(os, "getuid") or status.st_uid == os.getuid()
    return is_own and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _remove_unused(root: Path) -> None:
    """Remove the folders that no engine has read from for long."""
    oldest = time.time() - _KEPT_SECONDS
    for folder in root.iterdir():
        if folder.is_dir() and folder.stat().st_mtime < oldest:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def uncached() -> Iterator[None]:
    """A block in which JAX reads and writes no compiled programs of its own."""
    # The setting is one for all threads, so one thread at a time changes it.
    with _SETTING:
        was = cast(Any, jax.config).jax_enable_compilation_cache
        jax.config.update("jax_enable_compilation_cache", False)
        # It looks at the setting only once.
        compilation_cache.reset_cache()
        try:
            yield
        finally:
            jax.config.update("jax_enable_compilation_cache", was)
            compilation_cache.reset_cache()


def store_of_this_machine(depends_on: str) -> ExecutableStore | None:
    """Beside JAX's own cache, where one is in use; None otherwise, and for other than a CPU.

    Args:
        depends_on: what all programs in it have in common, and no others.
    """
    root = cast(Any, jax.config).jax_compilation_cache_dir
    if root is None or "://" in root or jax.default_backend() != "cpu":
        return None
    digest = hashlib.sha256("\n".join((_surroundings(), depends_on)).encode()).hexdigest()
    return ExecutableStore(Path(root) / "executables" / digest[:32])


@cache
def _surroundings() -> str:
    """What all programs depend on."""
    devices = jax.devices()
    # How a program is cut for threads is part of it.
    affinity = getattr(os, "sched_getaffinity", None)
    threads = os.cpu_count() if affinity is None else len(affinity(0))
    return "\n".join((
        sources.digest(), jax.__version__, version("jaxlib"), version("flax"), processor(),
        devices[0].platform, devices[0].device_kind, str(len(devices)), str(threads),
        os.environ.get("XLA_FLAGS", ""),
    ))  # fmt: skip
