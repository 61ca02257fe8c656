"""The merges of a SentencePiece vocabulary: derived from its scores, and kept on disk.

SentencePiece stores a BPE model as pieces with scores. Its encoder starts from single characters
and, again and again, looks at all pairs of neighbours, takes the pair whose union is the piece with
the highest score, and puts that piece in their place. `tokenizers` wants the same knowledge as a
ranked list of pairs, the merges. A pair is a merge if both halves and their union are pieces, so
the list follows from the vocabulary alone: 514,906 merges from the 262,144 pieces of Gemma 3.

Their order is the order of `generate_merges` in Hugging Face's SentencePiece converter, which wrote
Gemma's `tokenizer.json`:

1. The union with the higher score first; that is SentencePiece's rule.
2. Equal scores: the longer left half first, then the longer right half. The splits of one piece
   always tie, and so do all user-defined pieces, the runs of newlines, tabs and spaces. Longest
   first means that 40 spaces become a run of 31 and one of 9, as if the longest were looked up.
3. Equal in that too: in the order of ids.

Gemma 4 stores its merges; nothing here is needed for it. They are these: the same 514,906 in the
same order.
"""

import hashlib
import secrets
import warnings
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt32

# Part of every cache key: a change of the rules above or of the file's layout needs a new name.
_FORMAT = b"refimpl merges, version 1"
_DIGEST_BYTES = hashlib.sha256().digest_size


def derive_merges(
    mergeable: Mapping[str, int], scores: Sequence[float]
) -> UInt32[np.ndarray, "merges 2"]:
    """Every merge of a vocabulary, best first.

    Args:
        mergeable: id of every piece that may take part in a merge, in the order of ids.
        scores: of the pieces, by id; the higher, the earlier they are made.

    Returns:
        Ids of the left and the right half. The union's id is left out: its spelling says it.
    """
    # Flat arrays of machine integers: half a million tuples would cost 50 MB and, in the garbage
    # collector's visits to them, twice the time.
    left, right, union = array("I"), array("I"), array("I")
    find = mergeable.get
    for piece, piece_id in mergeable.items():
        for cut in range(1, len(piece)):
            left_id = find(piece[:cut])
            if left_id is not None:
                right_id = find(piece[cut:])
                if right_id is not None:
                    left.append(left_id)
                    right.append(right_id)
                    union.append(piece_id)

    lengths = np.zeros(len(scores), np.int32)
    lengths[list(mergeable.values())] = [len(piece) for piece in mergeable]
    pairs = np.array([left, right], np.uint32).T
    length = lengths[pairs]
    # lexsort's last key is its first criterion; equal rows keep their order.
    order = np.lexsort(
        (-length[:, 1], -length[:, 0], -np.asarray(scores)[np.array(union, np.intp)])
    )
    return np.ascontiguousarray(pairs[order])


def cached_merges(
    mergeable: Mapping[str, int], scores: Sequence[float], *, cache_dir: Path | None
) -> UInt32[np.ndarray, "merges 2"]:
    """`derive_merges`, done once for each vocabulary.

    A cache file is used only if its checksum holds. One that is damaged, or was written for another
    vocabulary, counts as missing and is replaced. The file appears under its name in one step, so
    processes that start together do the work twice and both find a whole file.

    Args:
        mergeable: as in `derive_merges`.
        scores: as in `derive_merges`.
        cache_dir: folder of the cache, made if it is not there. None: derive, keep nothing.

    Warns:
        RuntimeWarning: the folder cannot be written. The merges are right all the same, but every
            start derives them anew.
    """
    if cache_dir is None:
        return derive_merges(mergeable, scores)
    key = _key(mergeable, scores)
    path = cache_dir / f"merges-{key.hex()[:32]}.bin"
    merges = _read(path, key)
    if merges is None:
        merges = derive_merges(mergeable, scores)
        try:
            _write(path, key, merges)
        except OSError as error:
            warnings.warn(
                f"the vocabulary's merges cannot be kept in {path}: {error.strerror or error}; "
                "every start derives them anew, about a second; make the folder writable, or "
                "choose another one",
                RuntimeWarning,
                stacklevel=2,
            )
    return merges


def _key(mergeable: Mapping[str, int], scores: Sequence[float]) -> bytes:
    """A hash of everything that the merges depend on."""
    ids = np.fromiter(mergeable.values(), "<u4", len(mergeable))
    lengths = np.fromiter(map(len, mergeable), "<u4", len(mergeable))
    digest = hashlib.sha256(_FORMAT)
    # The counts and lengths keep apart vocabularies whose concatenations are the same.
    digest.update(np.array([len(mergeable), len(scores)], "<u8").tobytes())
    digest.update(ids.tobytes())
    digest.update(lengths.tobytes())
    digest.update("".join(mergeable).encode())
    digest.update(np.asarray(scores, "<f8").tobytes())
    return digest.digest()


def _read(path: Path, key: bytes) -> UInt32[np.ndarray, "merges 2"] | None:
    """The merges in the file, or None unless it is whole and of this vocabulary."""
    try:
        content = path.read_bytes()
    except OSError:
        return None  # Missing, or `_write` is about to meet the same obstacle and to report it.
    checksum, payload = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if checksum != _checksum(key, payload):
        return None
    return np.frombuffer(payload, "<u4").astype(np.uint32, copy=False).reshape(-1, 2)


def _write(path: Path, key: bytes, merges: UInt32[np.ndarray, "merges 2"]) -> None:
    payload = merges.astype("<u4", copy=False).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        partial.write_bytes(_checksum(key, payload) + payload)
        partial.replace(path)
    finally:
        # After the renaming there is nothing left to remove.
        partial.unlink(missing_ok=True)


def _checksum(key: bytes, payload: bytes) -> bytes:
    return hashlib.sha256(key + payload).digest()
