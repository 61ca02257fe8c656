"""Executables on disk: found again by another process's engine, and never when anything differs."""

import hashlib
import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refimpl import sources
from refimpl.engine import executables
from refimpl.engine.executables import (
    Executable,
    ExecutableStore,
    store_of_this_machine,
    uncached,
)
from refimpl.engine.program import Program
from tests.kernel_cases import assert_same_bits


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """JAX's folder of compiled programs, for this test alone."""
    before: Any = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


class Traced:
    """A program that counts how often it is traced."""

    def __init__(self, depends_on: str = "", *, store: ExecutableStore | None = None) -> None:
        self.count = 0
        store = store or store_of_this_machine(depends_on)
        self.program = Program("double", self._run, donated=True, options={}, store=store)

    def _run(self, parameters: Any, state: Any, x: Any) -> Any:
        self.count += 1
        return {"state": state["state"] + 1}, x * parameters

    def __call__(self, size: int = 4) -> np.ndarray:
        state = {"state": jnp.zeros(3)}
        state, doubled = self.program(jnp.float32(2), state, jnp.arange(size, dtype=jnp.float32))
        assert_same_bits(state["state"], np.ones(3, np.float32))
        return np.asarray(doubled)


def test_a_second_start_traces_nothing(folder: Path) -> None:
    first, second = Traced(), Traced()
    expected = first()
    assert (first.count, len(list(folder.rglob("*.executable")))) == (1, 1)
    assert_same_bits(second(), expected)
    assert_same_bits(second(), expected)
    assert second.count == 0


def test_every_shape_is_a_program_of_its_own(folder: Path) -> None:
    traced = Traced()
    for size in (4, 5, 4):
        assert_same_bits(traced(size), 2 * np.arange(size, dtype=np.float32))
    assert (traced.count, len(list(folder.rglob("*.executable")))) == (2, 2)


def test_what_depends_on_something_else_is_another_program(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Traced()()
    other = Traced("another configuration")
    other()
    assert other.count == 1
    monkeypatch.setattr(sources, "are_what_runs", lambda: True)
    monkeypatch.setattr(executables, "_surroundings", lambda: "other sources")
    changed = Traced()
    changed()
    assert changed.count == 1
    assert len(list(folder.rglob("*.executable"))) == 3


def test_nothing_is_kept_or_read_while_other_code_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sources, "are_what_runs", lambda: False)
        Traced()()
        assert list(folder.rglob("*.executable")) == []
    Traced()()
    with monkeypatch.context() as patch:
        patch.setattr(sources, "are_what_runs", lambda: False)
        again = Traced()
        again()
        assert again.count == 1


def test_a_folder_that_others_can_write_to_is_not_read(folder: Path) -> None:
    Traced()()
    (entry,) = folder.rglob("*.executable")
    entry.parent.chmod(0o770)
    again = Traced()
    again()
    assert again.count == 1


def test_an_entry_that_is_whole_and_no_program_is_told_of(folder: Path) -> None:
    expected = Traced()()
    (entry,) = folder.rglob("*.executable")
    payload = zlib.compress(b"no pickle")
    entry.write_bytes(hashlib.sha256(payload).digest() + payload)
    again = Traced()
    with pytest.warns(RuntimeWarning, match="compiled anew"):
        assert_same_bits(again(), expected)
    assert again.count == 1
    assert_same_bits(Traced()(), expected)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_an_entry_that_is_not_whole_is_made_anew(folder: Path, damage: str) -> None:
    expected = Traced()()
    (entry,) = folder.rglob("*.executable")
    whole = entry.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    entry.write_bytes({"cut": whole[: len(whole) // 2], "flip": flipped, "empty": b""}[damage])
    again = Traced()
    assert_same_bits(again(), expected)
    assert again.count == 1
    assert_same_bits(Traced()(), expected)


def test_a_folder_that_cannot_be_written_to_keeps_nothing_and_harms_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = ExecutableStore(tmp_path / "file" / "below")
    compiled = jax.jit(lambda x: x + 1).lower(jnp.zeros(2)).compile()
    store.put("a", "b", Executable(compiled, None))
    assert store.get("a", "b") is None


def test_without_a_folder_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    before: Any = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        assert store_of_this_machine("anything") is None
        traced = Traced()
        assert_same_bits(traced(), 2 * np.arange(4, dtype=np.float32))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_jax_keeps_its_own_cache_when_the_block_ends() -> None:
    def enabled() -> bool:
        return jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]

    def fails() -> None:
        with uncached():
            assert not enabled()
            raise ZeroDivisionError

    before = enabled()
    with pytest.raises(ZeroDivisionError):
        fails()
    assert enabled() == before


def test_a_disk_that_is_full_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    compiled = jax.jit(lambda x: x + 2).lower(jnp.zeros(2)).compile()
    ExecutableStore(tmp_path).put("a", "b", Executable(compiled, None))
    assert list(tmp_path.iterdir()) == []


def test_what_is_read_ahead_is_not_read_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Traced()()
    (entry,) = folder.rglob("*.executable")
    reads = list[Path]()
    read = executables._read

    def counted(path: Path) -> Executable | None:
        reads.append(path)
        return read(path)

    monkeypatch.setattr(sources, "are_what_runs", lambda: True)
    monkeypatch.setattr(executables, "_read", counted)
    store = store_of_this_machine("")
    assert store is not None
    store.read_ahead()
    again = Traced(store=store)
    assert_same_bits(again(), expected)
    assert (again.count, reads) == (0, [entry])


def test_what_was_damaged_and_is_read_ahead_is_made_anew(folder: Path) -> None:
    expected = Traced()()
    (entry,) = folder.rglob("*.executable")
    entry.write_bytes(b"damaged")
    store = store_of_this_machine("")
    assert store is not None
    store.read_ahead()
    again = Traced(store=store)
    assert_same_bits(again(), expected)
    assert again.count == 1


def test_to_read_ahead_where_nothing_is_kept_is_no_mistake(tmp_path: Path) -> None:
    ExecutableStore(tmp_path / "none").read_ahead()
    assert list(tmp_path.iterdir()) == []


def test_folders_that_nothing_was_read_from_for_long_are_removed(folder: Path) -> None:
    for name in ("old", "used", "young"):
        Traced(name)()
    old, used, young = (store_of_this_machine(name) for name in ("old", "used", "young"))
    assert old
    assert used
    assert young
    before = time.time() - 31 * 24 * 3600
    for store in (old, used):
        os.utime(store.folder, (before, before))
    used.read_ahead()
    Traced("new")()
    assert [store.folder.is_dir() for store in (old, used, young)] == [False, True, True]
