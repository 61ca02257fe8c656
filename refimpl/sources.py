"""What this program is made of, so that what it keeps on disk can tell when it has changed.

What is kept is found by the text of our source files. That is only right while the code that runs
is the code of these files: a notebook may have put another function into the place of one of ours,
and a file may have been edited since it was imported.
"""

import hashlib
import operator
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType
from typing import Any

_PACKAGES = ("refimpl", "refimpl_kernels", "refimpl_weights")

# Folders that packages are installed into, of which there may be several.
_INSTALLED = frozenset(("site-packages", "dist-packages"))
# Seconds since the epoch. `refimpl` imports this module before any other of its own.
_IMPORTED = time.time()


# What modules and classes of ours held when they were last looked through, and found to be ours.
_seen: list[Any] = []


@cache
def digest() -> str:
    """A SHA-256 of all our sources."""
    sources = hashlib.sha256()
    for root, path in _files():
        sources.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return sources.hexdigest()


def are_what_runs() -> bool:
    """Whether all functions of ours, and what they call by name, still are those of the files."""
    try:
        if any(path.stat().st_mtime > _IMPORTED for _, path in _files()):
            return False
    except FileNotFoundError:
        return False
    held = [value for space in _namespaces() for value in space.values()]
    # To look through them takes much longer than to see that they are the same.
    if len(held) == len(_seen) and all(map(operator.is_, held, _seen)):
        return True
    if not all(_is_from_a_file(value) for value in held):
        return False
    _seen[:] = held
    return True


@cache
def _files() -> tuple[tuple[Path, Path], ...]:
    """All our files, each behind the folder of its package."""
    return tuple((root, path) for root in _roots() for path in sorted(root.rglob("*.py")))


@cache
def _roots() -> tuple[Path, ...]:
    roots = list[Path]()
    for package in _PACKAGES:
        spec = find_spec(package)
        # Installed with this module.
        assert spec is not None
        assert spec.origin is not None
        roots.append(Path(spec.origin).parent)
    return tuple(roots)


def _namespaces() -> Iterator[Mapping[str, Any]]:
    """What every module and class of ours has a name for."""
    for module_name, module in list(sys.modules.items()):
        if _is_ours(module_name):
            names = dict(vars(module))
            yield names
            for value in names.values():
                if issubclass(type(value), type) and _is_ours(value.__module__):
                    yield vars(value)


def _is_from_a_file(value: Any) -> bool:
    """Whether a function is one of our files or of a library; what is no function is."""
    # By type: to ask a proxy, such as Quart's of the request, may be an error.
    kind = type(value)
    if kind.__module__ == "unittest.mock":
        return False
    # What a class holds may be around the function.
    if kind is property:
        value = value.fget
    elif kind in (classmethod, staticmethod):
        value = value.__func__
    elif kind is cached_property:
        value = value.func
    while type(value) is FunctionType:
        name = value.__code__.co_filename
        # What the library's decorators make has no file, but belongs to the module it is for.
        maker = value.__module__
        is_made = name.startswith("<") and (_is_ours(maker) or maker.startswith("namedtuple_"))
        is_installed = not _INSTALLED.isdisjoint(Path(name).parts)
        if not (is_made or is_installed or name.startswith(_places())):
            return False
        value = getattr(value, "__wrapped__", None)
    return True


@cache
def _places() -> tuple[str, ...]:
    """Where Python's own files lie, and ours."""
    python = (sysconfig.get_path(name) for name in ("stdlib", "platstdlib"))
    return (*dict.fromkeys(python), *(str(root) for root in _roots()), "<frozen")


def _is_ours(module_name: str) -> bool:
    return module_name.partition(".")[0] in _PACKAGES
