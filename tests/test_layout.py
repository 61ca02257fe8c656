"""The house rules that a machine can check: who imports whom, and what lies in the repository."""

import ast
import doctest
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "refimpl": ROOT / "refimpl",
    "refimpl_kernels": ROOT / "kernels" / "refimpl_kernels",
    "refimpl_weights": ROOT / "weights" / "refimpl_weights",
}


class Room(NamedTuple):
    """What the modules of one part may import, besides Python's own library.

    Attributes:
        ours: modules of this project, each with all below it.
        theirs: packages of others.
    """

    ours: frozenset[str]
    theirs: frozenset[str]


def room(ours: str, theirs: str) -> Room:
    return Room(frozenset(ours.split()), frozenset(theirs.split()))


COMMAND_LINE = room(
    ours="refimpl refimpl_kernels refimpl_weights",
    theirs="flax huggingface_hub jax jaxtyping numpy platformdirs pydantic quart rich typer",
)
# Host code that plans and spells; whatever it imports must not bring JAX.
HOST_CODE = room(
    ours="""refimpl.errors refimpl.engine.events refimpl.engine.inbox refimpl.engine.packing
    refimpl.engine.prefix refimpl.engine.request refimpl.engine.scheduler refimpl.engine.session
    refimpl.engine.text refimpl.model.detokenizer refimpl.model.tokenizer""",
    theirs="numpy",
)
# A module belongs to the room with the longest name that begins its own.
ROOMS = {
    "refimpl_kernels": room(ours="refimpl_kernels", theirs="jax jaxtyping numpy"),
    "refimpl_weights": room(
        ours="refimpl_weights",
        theirs="gguf huggingface_hub jaxtyping ml_dtypes numpy platformdirs safetensors",
    ),
    "refimpl": room(
        ours="""refimpl.errors refimpl.loading refimpl.engine refimpl.model refimpl.sources
        refimpl_weights""",
        theirs="platformdirs",
    ),
    "refimpl.errors": room(ours="", theirs=""),
    "refimpl.sources": room(ours="", theirs=""),
    "refimpl.model": room(
        ours="refimpl.errors refimpl.model refimpl.sources refimpl_kernels refimpl_weights",
        theirs="flax jax jaxtyping numpy tokenizers",
    ),
    "refimpl.engine": room(
        ours="refimpl.errors refimpl.engine refimpl.model refimpl.sources refimpl_kernels",
        theirs="jax jaxtyping numpy",
    ),
    # A with block shows on a terminal how far the start is.
    "refimpl.engine.engine": room(
        ours="refimpl.errors refimpl.engine refimpl.model refimpl.progress", theirs=""
    ),
    **dict.fromkeys(
        (
            f"refimpl.engine.{name}"
            for name in (
                "events",
                "inbox",
                "packing",
                "prefix",
                "request",
                "scheduler",
                "session",
                "text",
            )
        ),
        HOST_CODE,
    ),
    "refimpl.server": room(
        ours="refimpl.errors refimpl.engine refimpl.server",
        theirs="hypercorn prometheus_client pydantic quart werkzeug",
    ),
    # It measures what others make, so it imports them; only the command line imports it.
    "refimpl.bench": room(
        ours="""refimpl.bench refimpl.engine refimpl.errors refimpl.loading refimpl.model
        refimpl.progress refimpl.server refimpl_kernels refimpl_weights""",
        theirs="numpy rich",
    ),
    # Only the command line imports it: shapes of the model and of the engine's state.
    "refimpl.plan": room(
        ours="refimpl.catalogue refimpl.engine refimpl.errors refimpl.model refimpl.plan "
        "refimpl_kernels",
        theirs="jax rich typer",
    ),
    "refimpl.catalogue": room(ours="refimpl.model", theirs="rich"),
    "refimpl.cli": COMMAND_LINE,
    "refimpl.serve": COMMAND_LINE,
    "refimpl.progress": COMMAND_LINE,
    "refimpl.__main__": COMMAND_LINE,
}


def is_below(module: str, roots: frozenset[str] | set[str]) -> bool:
    """Whether a module is one of the roots, or lies in one."""
    return any(module == root or module.startswith(f"{root}.") for root in roots)


def modules() -> dict[str, Path]:
    """Every module of our packages, and its file."""
    return {
        ".".join([package, *path.relative_to(folder).with_suffix("").parts]).removesuffix(
            ".__init__"
        ): path
        for package, folder in PACKAGES.items()
        for path in sorted(folder.rglob("*.py"))
    }


MODULES = modules()


def imported(source: str) -> Iterator[str]:
    """Every module that a source imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            inside = [f"{base}.{alias.name}" for alias in node.names]
            submodules = [name for name in inside if name in MODULES]
            # `from package import name` imports the package too, but asks for what is in it.
            yield from submodules
            if len(submodules) < len(inside):
                yield base


def violations(module: str, source: str) -> list[str]:
    """Imports of a module that its room does not allow."""
    longest = max((name for name in ROOMS if is_below(module, {name})), key=len)
    allowed = ROOMS[longest]
    return [
        name
        for name in imported(source)
        if name.split(".")[0] not in sys.stdlib_module_names
        and not is_below(name, allowed.ours)
        and name.split(".")[0] not in allowed.theirs - {"refimpl"}
    ]


@pytest.mark.parametrize("module", MODULES)
def test_imports(module):
    assert violations(module, MODULES[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("refimpl_kernels.norm", "import jax.numpy as jnp\nimport math", []),
        ("refimpl_kernels.norm", "import flax", ["flax"]),
        ("refimpl_kernels.norm", "from refimpl.model.join import x", ["refimpl.model.join"]),
        ("refimpl_kernels.norm", "import refimpl_weights", ["refimpl_weights"]),
        ("refimpl_weights.gguf", "import jax", ["jax"]),
        ("refimpl_weights.gguf", "from refimpl_kernels import linear", ["refimpl_kernels.linear"]),
        ("refimpl_weights.hub", "def f():\n    import rich.progress", ["rich.progress"]),
        ("refimpl.model.trace", "from safetensors.numpy import save_file", ["safetensors.numpy"]),
        ("refimpl.model.trace", "from refimpl.engine import programs", ["refimpl.engine.programs"]),
        ("refimpl.model.trace", "from refimpl import cli", ["refimpl.cli"]),
        ("refimpl.model.trace", "import refimpl.cli", ["refimpl.cli"]),
        ("refimpl.model.trace", "import refimpl", ["refimpl"]),
        ("refimpl.model.trace", "from . import names", ["."]),
        ("refimpl.model.trace", "from .names import Path", [".names"]),
        ("refimpl.model.trace", "import refimpl.modelling", ["refimpl.modelling"]),
        ("refimpl.engine.scheduler", "import jax", ["jax"]),
        ("refimpl.engine.scheduler", "from jax import numpy", ["jax"]),
        ("refimpl.engine.scheduler", "import refimpl.engine.programs", ["refimpl.engine.programs"]),
        ("refimpl.engine.request", "import jaxtyping", ["jaxtyping"]),
        ("refimpl.engine.text", "from refimpl.model.detokenizer import x", []),
        ("refimpl.engine.engine", "import quart", ["quart"]),
        ("refimpl.engine.engine", "import refimpl.server.app", ["refimpl.server.app"]),
        ("refimpl.server.app", "import quart, jax", ["jax"]),
        ("refimpl.server.app", "from refimpl.model import config", ["refimpl.model.config"]),
        ("refimpl.server.app", "from refimpl.cli import main", ["refimpl.cli"]),
        ("refimpl.cli", "import typer, rich, refimpl.server.app", []),
        ("refimpl.cli", "from refimpl.bench.command import make_plan", []),
        ("refimpl.bench.ours", "import refimpl.engine.engine", []),
        ("refimpl.bench.ours", "import refimpl.cli", ["refimpl.cli"]),
        ("refimpl.bench.llama_cpp", "import xllamacpp", ["xllamacpp"]),
        ("refimpl.engine.engine", "from refimpl.bench import run", ["refimpl.bench.run"]),
        ("refimpl.loading", "import refimpl.bench.run", ["refimpl.bench.run"]),
        ("refimpl.cli.serve", "import typer", []),
        ("refimpl.loading", "import typer", ["typer"]),
        ("refimpl.errors", "import numpy", ["numpy"]),
    ],
)  # fmt: skip
def test_the_rule_catches_what_breaks_it(module, source, expected):
    assert violations(module, source) == expected


def test_every_room_of_a_package_is_inhabited_by_a_rule():
    assert {name.split(".")[0] for name in ROOMS} == set(PACKAGES)
    assert len(MODULES) > 40, "the rules were held against whole packages"


ORACLE = sorted((ROOT / "tests" / "oracle").glob("*.py"))


@pytest.mark.parametrize("path", ORACLE, ids=lambda path: path.stem)
def test_the_oracle_shares_nothing_with_what_it_judges(path):
    roots = {name.split(".")[0] for name in imported(path.read_text(encoding="utf-8"))}
    assert roots - sys.stdlib_module_names <= {"numpy", "tests"}
    inside = [name for name in imported(path.read_text("utf-8")) if name.startswith("tests")]
    assert all(name.startswith("tests.oracle") for name in inside)


def test_everything_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [re.split(r"[<>=\[; ]", line)[0] for line in project["dependencies"]]
    declared = {name.replace("-", "_") for name in named}
    for module, path in MODULES.items():
        roots = {name.split(".")[0] for name in imported(path.read_text(encoding="utf-8"))}
        assert roots - sys.stdlib_module_names - set(PACKAGES) <= declared, module


# Examples in docstrings.


@pytest.mark.parametrize(
    "module", [name for name, path in MODULES.items() if ">>> " in path.read_text(encoding="utf-8")]
)
def test_examples_hold(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0
    assert result.failed == 0


# What lies where.


def tracked() -> list[Path]:
    """Every file that git tracks and that is there."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    )
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


@pytest.mark.parametrize(
    "path", ["kernels/__init__.py", "weights/__init__.py", "tests/kernels", "tests/weights"]
)
def test_no_package_of_another_is_shadowed(path):
    # transformers looks for a package called `kernels`, and must not find one of ours.
    assert not (ROOT / path).exists()


@pytest.mark.parametrize("folder", PACKAGES.values(), ids=list(PACKAGES))
def test_every_package_is_typed(folder):
    assert (folder / "py.typed").is_file()


def test_nothing_large_is_tracked():
    large = {path: path.stat().st_size for path in tracked() if path.stat().st_size > 5_000_000}
    assert large == {}


def test_the_lock_file_stays_out():
    ignored = subprocess.run(["git", "check-ignore", "-q", "uv.lock"], cwd=ROOT, check=False)
    assert ignored.returncode == 0
    assert ROOT / "uv.lock" not in tracked()


# In pieces, so that this file is not the one that breaks the rule.
REGISTRIES = [
    ".".join(parts).encode()
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("registry", "npmjs"),
        ("npmjs", "org"),
        ("yarnpkg", "com"),
        ("crates", "io"),
        ("proxy", "golang"),
        ("anaconda", "org"),
        ("rubygems", "org"),
    )
]


def registries_in(content: bytes) -> list[bytes]:
    return [host for host in REGISTRIES if host in content.lower()]


def test_no_download_address_of_a_package_index_is_tracked():
    found = {path: registries_in(path.read_bytes()) for path in tracked()}
    assert {path: hosts for path, hosts in found.items() if hosts} == {}


def test_a_download_address_would_be_found():
    assert registries_in(b"https://Files." + REGISTRIES[1] + b"/packages/x.whl") == [REGISTRIES[1]]
    assert registries_in(b"https://huggingface.co/google/gemma-3-270m") == []
