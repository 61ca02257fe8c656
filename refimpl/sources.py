"""What this program is made of, so that what it keeps on disk can tell when it has changed.

What is kept is found by the text of our source files. That is only right while the code that runs
is the code of these files: a notebook may have put another function into the place of one of ours,
and a file may have been edited since it was imported.
"""

import hashlib
import sys
import sysconfig
import time
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType
from typing import Any

_PACKAGES = ("refimpl", "refimpl_kernels", "refimpl_weights")

# Seconds since the epoch. `refimpl` imports this module before any other of its own.
_IMPORTED = time.time()


@cache
def digest() -> str:
    """A SHA-256 of all our sources."""
    sources = hashlib.sha256()
    for root in _roots():
        for path in sorted(root.rglob("*.py")):
            sources.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return sources.hexdigest()


def are_what_runs() -> bool:
    """Whether all functions of ours, and what they call by name, still are those of the files."""
    for root in _roots():
        if any(path.stat().st_mtime > _IMPORTED for path in root.rglob("*.py")):
            return False
    return all(_is_from_a_file(function) for function in _functions())


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


def _functions() -> Iterator[Any]:
    """Every function that a module or class of ours has a name for."""
    for module_name, module in list(sys.modules.items()):
        if not _is_ours(module_name):
            continue
        for value in list(vars(module).values()):
            if isinstance(value, type) and _is_ours(value.__module__):
                yield from map(_plain, vars(value).values())
            else:
                yield value


def _plain(member: Any) -> Any:
    """The function behind a member of a class."""
    if isinstance(member, property):
        return member.fget
    return getattr(member, "__func__", member)


def _is_from_a_file(value: Any) -> bool:
    """Whether a function is one of our files or of a library; what is no function is."""
    if type(value).__module__ == "unittest.mock":
        return False
    while isinstance(value, FunctionType):
        name = value.__code__.co_filename
        # What the library's decorators make has no file, but belongs to the module it is for.
        maker = value.__module__
        is_made = name.startswith("<") and (_is_ours(maker) or maker.startswith("namedtuple_"))
        if not is_made and not name.startswith(_places()):
            return False
        value = getattr(value, "__wrapped__", None)
    return True


@cache
def _places() -> tuple[str, ...]:
    """Where files lie that nobody edits while they run, and ours."""
    library = (sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    return (*dict.fromkeys(library), *(str(root) for root in _roots()), "<frozen")


def _is_ours(module_name: str) -> bool:
    return module_name.partition(".")[0] in _PACKAGES
