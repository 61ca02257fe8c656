"""Compiled programs on disk, whole: a later start neither traces nor lowers them again.

JAX's own cache keeps what the compiler makes, but is asked only once a program has been traced and
lowered, which takes longer than reading it, and memory. Here an entry is found by what a program
depends on: our sources, the model's configuration and numerics, the shapes of its arrays, and the
versions and flags of JAX. The programs of an engine lie in a folder of their own, so that all can
be read before they are asked for, below one of this machine's processor; see `compile_cache.py`.

An entry is a SHA-256 of the rest, and a compressed pickle: so the folder must be one that only its
user can write to, as the user's cache directory is. An entry that is not whole counts for nothing.
"""

import hashlib
import os
import pickle
import shutil
import tempfile
import time
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

# Of the hash in front of an entry.
_DIGEST_BYTES = 32
_SUFFIX = ".executable"
# Threads that read ahead. Most of the time is XLA's, which shares little with other threads.
_READERS = 2
# A month: what is not used for so long is another version's, or of a model that is gone.
_KEPT_SECONDS = 30 * 24 * 3600


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

    def read_ahead(self) -> None:
        """Begin to read all that is kept, in threads of its own: to get it then takes no time."""
        # What is long to read first, so that the threads end together.
        paths = sorted(self.folder.glob(f"*{_SUFFIX}"), key=lambda path: -path.stat().st_size)
        with suppress(OSError):
            os.utime(self.folder)
        pool = ThreadPoolExecutor(_READERS, thread_name_prefix="executables")
        self._ahead |= {path: pool.submit(_read, path) for path in paths}
        pool.shutdown(wait=False)

    def get(self, name: str, description: str) -> Executable | None:
        """The executable that was kept under this name and description, ready to be run."""
        path = self._path(name, description)
        ahead = self._ahead.pop(path, None)
        return _read(path) if ahead is None else ahead.result()

    def put(self, name: str, description: str, executable: Executable) -> None:
        """Keep an executable; does nothing where nothing can be written.

        It must have been compiled, not read: what was read cannot be written again (jaxlib 0.12).
        """
        serialized = cast(Any, serialize_executable).serialize(executable.run)
        # A fifth of the bytes, in less time than it takes to write all of them.
        payload = zlib.compress(pickle.dumps((serialized, executable.outputs)), level=1)
        path = self._path(name, description)
        try:
            if not self.folder.is_dir():
                self.folder.mkdir(parents=True)
                _remove_unused(self.folder.parent)
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
    serialized, outputs = pickle.loads(zlib.decompress(payload))
    run = cast(Any, serialize_executable).deserialize_and_load(*serialized)
    return Executable(run, outputs)


def _remove_unused(root: Path) -> None:
    """Remove the folders that no engine has read from for long."""
    oldest = time.time() - _KEPT_SECONDS
    for folder in root.iterdir():
        if folder.is_dir() and folder.stat().st_mtime < oldest:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def uncached() -> Iterator[None]:
    """A block in which JAX reads and writes no compiled programs of its own."""
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
    if root is None or jax.default_backend() != "cpu":
        return None
    digest = hashlib.sha256("\n".join((_surroundings(), depends_on)).encode()).hexdigest()
    return ExecutableStore(Path(root) / "executables" / digest[:32])


@cache
def _surroundings() -> str:
    """What all programs depend on."""
    device = jax.devices()[0]
    return "\n".join((
        sources.digest(), jax.__version__, version("jaxlib"), version("flax"),
        device.platform, device.device_kind, str(os.cpu_count()), os.environ.get("XLA_FLAGS", ""),
    ))  # fmt: skip
