"""Whether the code that runs is that of the files: what is kept on disk depends on it."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import refimpl_kernels.norm
from refimpl_weights.synthetic_gguf import write_gguf

from refimpl import sources
from refimpl.engine.worker import Worker
from refimpl.model import cache


def test_it_is_unless_something_was_replaced() -> None:
    assert sources.are_what_runs()


def doubled(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments, **named: function(*arguments, **named) * 2


@pytest.mark.parametrize(
    ("owner", "name"),
    [(refimpl_kernels.norm, "rms_norm"), (Worker, "step"), (cache.KVCache, "begin")],
)
def test_a_function_of_somebody_else_is_noticed(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, doubled(getattr(owner, name)))
        assert not sources.are_what_runs()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, MagicMock())
        assert not sources.are_what_runs()
    assert sources.are_what_runs()


class Proxy:
    """What cannot be asked for anything, as Quart's stand-in for a request outside of one."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)


def test_a_value_that_cannot_be_asked_is_no_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refimpl_kernels.norm, "proxy", Proxy(), raising=False)
    assert sources.are_what_runs()


@pytest.mark.parametrize("wrap", [property, classmethod, staticmethod, cached_property])
def test_what_a_class_wraps_is_looked_into(monkeypatch: pytest.MonkeyPatch, wrap: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Worker, "further", wrap(lambda *_: 0), raising=False)
        assert not sources.are_what_runs()
    assert sources.are_what_runs()


def test_a_file_that_was_edited_since_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    newest = max(path.stat().st_mtime for root in sources._roots() for path in root.rglob("*.py"))
    monkeypatch.setattr(sources, "_IMPORTED", newest)
    assert sources.are_what_runs()
    monkeypatch.setattr(sources, "_IMPORTED", newest - 1)
    assert not sources.are_what_runs()


PATCHED = """
import refimpl.model.layers as layers
norm = layers.RMSNorm.__call__
layers.RMSNorm.__call__ = lambda self, x: norm(self, x) * 1.5
"""
SCORE = """
import sys
import refimpl
from refimpl.engine.compile_cache import enable_compile_cache
from pathlib import Path
from refimpl.model.gemma import load_checkpoint
enable_compile_cache(Path(sys.argv[2]))
engine = refimpl.Engine(
    load_checkpoint(sys.argv[1]),
    refimpl.EngineOptions(slots=1, context=128, compile_at_start=False),
)
with engine:
    print(engine.score([2, 50, 60]))
"""


@pytest.mark.timeout(600)
def test_what_a_notebook_replaced_is_neither_kept_nor_forgotten(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    def answer(source: str, *, devices: int = 1) -> str:
        ended = subprocess.run(
            [sys.executable, "-c", source, str(tiny_checkpoint), str(tmp_path / "cache")],
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
            env=os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
        )
        return ended.stdout

    patched, clean = answer(PATCHED + SCORE), answer(SCORE)
    assert patched != clean
    # By a process that has another device, which programs for one do not concern; then read back.
    assert answer(SCORE, devices=2) == answer(SCORE, devices=2) == clean


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "x.gguf", architecture="gemma3", tensor_type="F32", layers=1)
