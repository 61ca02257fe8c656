"""What this program is made of, so that a file that it made can tell when it has changed."""

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_PACKAGES = ("refimpl", "refimpl_kernels", "refimpl_weights")


@cache
def digest() -> str:
    """A SHA-256 of all our sources."""
    sources = hashlib.sha256()
    for package in _PACKAGES:
        spec = find_spec(package)
        # Installed with this module.
        assert spec is not None
        assert spec.origin is not None
        root = Path(spec.origin).parent
        for path in sorted(root.rglob("*.py")):
            sources.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return sources.hexdigest()
