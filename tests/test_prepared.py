"""Weights kept for the next start: the same bits, and never those of another state of the file."""

import os
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from refimpl_weights.safetensors_writer import write_safetensors
from refimpl_weights.synthetic import write_checkpoint
from refimpl_weights.synthetic_gguf import FILE_TYPES, write_gguf

from refimpl import sources
from refimpl.model import prepared
from refimpl.model.gemma import Gemma, load_checkpoint
from tests.kernel_cases import assert_same_bits


def written(folder: Path, tensor_type: str = "Q4_K", name: str = "x.gguf") -> Path:
    return write_gguf(folder / name, architecture="gemma3", tensor_type=tensor_type, layers=1)


def read(folder: Path, checkpoint: Path) -> prepared.Tree | None:
    """What was kept of this state of the checkpoint."""
    identity = prepared.identity_of(checkpoint)
    assert identity is not None
    return prepared.read_prepared(folder, identity)


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("weights-*"))


def assert_same_weights(one: Gemma, other: Gemma) -> None:
    leaves, tree = jax.tree.flatten(one.parameters)
    others, other_tree = jax.tree.flatten(other.parameters)
    assert tree == other_tree
    for a, b in zip(leaves, others, strict=True):
        assert a.dtype == b.dtype
        assert_same_bits(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("tensor_type", list(FILE_TYPES))
def test_a_second_start_has_the_same_weights(tmp_path: Path, tensor_type: str) -> None:
    path, cache = written(tmp_path, tensor_type), tmp_path / "cache"
    plain = load_checkpoint(path)
    assert_same_weights(load_checkpoint(path, cache_dir=cache), plain)
    assert len(kept(cache)) == 1
    assert read(cache, path) is not None
    assert_same_weights(load_checkpoint(path, cache_dir=cache), plain)


def test_progress_ends_whole_either_way(tmp_path: Path) -> None:
    path, cache = written(tmp_path), tmp_path / "cache"
    for _ in range(2):
        calls = list[tuple[int, int]]()
        load_checkpoint(path, cache_dir=cache, progress=lambda *call, to=calls: to.append(call))
        done, total = calls[-1]
        assert done == total > 0


def test_a_file_that_changed_is_read_anew(tmp_path: Path) -> None:
    path, cache = written(tmp_path), tmp_path / "cache"
    load_checkpoint(path, cache_dir=cache)
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    # Another file of the same size and the same time.
    path.unlink()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert read(cache, path) is None
    written(tmp_path, "Q8_0")
    assert_same_weights(load_checkpoint(path, cache_dir=cache), load_checkpoint(path))
    assert len(kept(cache)) == 1
    identity = prepared.identity_of(path)
    assert identity is not None
    assert prepared.read_prepared(cache, identity) is not None
    assert prepared.read_prepared(cache, {**identity, "sources": "others"}) is None


def test_a_file_that_is_damaged_is_made_anew(tmp_path: Path) -> None:
    path, cache = written(tmp_path), tmp_path / "cache"
    expected = load_checkpoint(path, cache_dir=cache)
    (file,) = kept(cache)
    whole = file.read_bytes()
    middle = len(whole) // 2
    for damaged in (whole[:-1], whole[:middle] + bytes(9) + whole[middle + 9 :], b""):
        assert damaged != whole
        file.write_bytes(damaged)
        assert read(cache, path) is None
    assert_same_weights(load_checkpoint(path, cache_dir=cache), expected)
    assert read(cache, path) is not None


def test_a_file_that_is_replaced_while_it_is_read_is_not_kept(tmp_path: Path) -> None:
    path, cache = written(tmp_path), tmp_path / "cache"

    def replace(done: int, total: int) -> None:
        if done == total:
            written(tmp_path, name="new.gguf").replace(path)

    load_checkpoint(path, cache_dir=cache, progress=replace)
    assert kept(cache) == []


def test_nothing_is_kept_or_read_while_other_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = written(tmp_path), tmp_path / "cache"
    monkeypatch.setattr(sources, "are_what_runs", lambda: False)
    load_checkpoint(path, cache_dir=cache)
    assert kept(cache) == []


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    path, cache = written(tmp_path), tmp_path / "cache"
    cache.mkdir()
    theirs = [cache / "weights-mine.safetensors", cache / f"weights-{'0' * 32}.safetensors"]
    for file in theirs:
        write_safetensors(file, {"a": np.zeros(3, np.float32)})
    (cache / "weights-notes.safetensors").write_text("mine")
    load_checkpoint(path, cache_dir=cache)
    assert len(kept(cache)) == 4


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    path, cache = written(tmp_path), tmp_path / "cache"
    for name, age in (("old", 7200), ("new", 60)):
        folder = cache / f".refimpl-weights-{name}"
        folder.mkdir(parents=True)
        (folder / "x.safetensors").write_bytes(b"half")
        then = time.time() - age
        os.utime(folder, (then, then))
    load_checkpoint(path, cache_dir=cache)
    assert [folder.name for folder in cache.glob(".refimpl*")] == [".refimpl-weights-new"]


def test_files_of_checkpoints_that_are_gone_are_removed(tmp_path: Path) -> None:
    gone, stays, cache = written(tmp_path), written(tmp_path, name="y.gguf"), tmp_path / "cache"
    load_checkpoint(gone, cache_dir=cache)
    load_checkpoint(stays, cache_dir=cache)
    assert len(kept(cache)) == 2
    gone.unlink()
    os.utime(stays)
    load_checkpoint(stays, cache_dir=cache)
    assert len(kept(cache)) == 1
    assert read(cache, stays) is not None


def test_what_is_large_or_finds_no_room_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = written(tmp_path), tmp_path / "cache"
    with monkeypatch.context() as changed:
        changed.setattr(prepared, "MOST_BYTES", 1000)
        load_checkpoint(path, cache_dir=cache)
        assert kept(cache) == []
    usage = prepared.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(prepared.shutil, "disk_usage", lambda _: usage)
    load_checkpoint(path, cache_dir=cache)
    assert kept(cache) == []


def test_a_folder_that_cannot_be_written_to_is_told_of(tmp_path: Path) -> None:
    path = written(tmp_path)
    gemma = load_checkpoint(path)
    (tmp_path / "file").touch()
    identity = prepared.identity_of(path)
    assert identity is not None
    with pytest.warns(RuntimeWarning, match="cannot be kept"):
        prepared.keep_prepared(tmp_path / "file" / "below", identity, gemma.parameters)


def test_a_folder_of_hugging_face_is_not_copied(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", "gemma3")
    load_checkpoint(tmp_path / "model", cache_dir=tmp_path / "cache")
    assert kept(tmp_path / "cache") == []
