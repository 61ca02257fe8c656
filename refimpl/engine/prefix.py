"""Which blocks of prompts are kept, so that prompts that begin alike are not computed again.

Owns the choice of what is kept and what goes. It does not know what a block's state is made of; a
payload is any object.

A block is a fixed number of tokens. Its state depends on all tokens before it, so its key does too:
the digest of its parent's digest and its own ids. Prompts that begin alike have the first keys in
common, and the blocks of all prompts form trees. A block is of use only with all its ancestors, so
no block goes before its descendants.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

_DIGEST_BYTES = 32


class BlockKey(NamedTuple):
    """Names a block by all tokens up to its end.

    Attributes:
        digest: BLAKE2b of the digest of the block before it and of `token_ids`. Before the first
            block stands the digest of the cache's salt.
        token_ids: its own ids, as little-endian int32.
    """

    digest: bytes
    token_ids: bytes


@dataclass(frozen=True, kw_only=True)
class PrefixStatistics:
    """What a cache holds, and what has happened in it since it was made.

    Attributes:
        blocks: kept now.
        stored_bytes: of their payloads.
        hits: blocks looked up and found.
        misses: blocks looked up and not found.
        evictions: blocks given up for others.
        refusals: blocks not taken, for lack of room or of a parent.
    """

    blocks: int
    stored_bytes: int
    hits: int
    misses: int
    evictions: int
    refusals: int


class _Entry[Payload]:
    """A block that is kept."""

    __slots__ = ("key", "nbytes", "parent", "payload")

    def __init__(
        self, key: BlockKey, payload: Payload, nbytes: int, parent: "_Entry[Payload] | None"
    ) -> None:
        self.key, self.payload, self.nbytes, self.parent = key, payload, nbytes, parent


class PrefixCache[Payload]:
    """Payloads of blocks within a budget of bytes; what was not used for longest goes first.

    To use a block is to use its ancestors, and them last. So what was not used for longest has no
    descendants, and the order of use alone keeps paths whole.

    A payload that was handed out may go from the cache at any time. Whoever holds it has a
    reference, which is enough for what is never changed or donated, such as device arrays that only
    serve as inputs; their memory is free when both have let go.

    Not to be used by two threads at once.
    """

    def __init__(self, *, budget_bytes: int, salt: str, block: int = 128) -> None:
        """Begin with nothing kept.

        Args:
            budget_bytes: most bytes of payloads at any time; 0 keeps nothing.
            salt: names everything besides the tokens that payloads depend on: weights, numerics.
            block: tokens in a block.
        """
        assert block > 0, block
        self._budget_bytes, self._block = budget_bytes, block
        self._root = blake2b(salt.encode(), digest_size=_DIGEST_BYTES).digest()
        # By digest; the first was not used for longest.
        self._entries = OrderedDict[bytes, _Entry[Payload]]()
        self._stored_bytes = self._hits = self._misses = self._evictions = self._refusals = 0

    def keys(self, prompt_ids: Sequence[int]) -> list[BlockKey]:
        """The key of each whole block of a prompt. The rest of its tokens are in none.

        A prompt whose last token is to be computed must not take that from the cache: of L tokens,
        look up the first (L - 1) // block keys.
        """
        data, size = np.asarray(prompt_ids, "<i4").tobytes(), 4 * self._block
        keys, digest = list[BlockKey](), self._root
        for start in range(0, len(data) - size + 1, size):
            token_ids = data[start : start + size]
            digest = blake2b(digest + token_ids, digest_size=_DIGEST_BYTES).digest()
            keys.append(BlockKey(digest, token_ids))
        return keys

    def num_kept(self, keys: Sequence[BlockKey]) -> int:
        """How many of the first blocks are kept. This does not count as use.

        Args:
            keys: of one prompt, from its beginning.
        """
        return len(self._path(keys))

    def lookup(self, keys: Sequence[BlockKey]) -> list[Payload]:
        """The payloads of the first blocks, up to one that is not kept.

        Args:
            keys: of one prompt, from its beginning.
        """
        path = self._path(keys)
        self._use(path)
        self._hits += len(path)
        self._misses += len(keys) - len(path)
        return [entry.payload for entry in path]

    def store(self, keys: Sequence[BlockKey], payload: Payload, *, nbytes: int) -> bool:
        """Keep a block, and give up others for it if need be.

        Of a block that is kept already the old payload stays. Like `lookup`, a call takes time
        proportional to the number of keys.

        Args:
            keys: of one prompt, from its beginning; the last is the block's.
            payload: its state.
            nbytes: of the payload.

        Returns:
            Whether the block is kept now. It is not, and nothing else changes, if it does not fit
            into the budget together with its ancestors, or if its parent is not kept.
        """
        assert keys, "there is no block before the first"
        assert nbytes >= 0, nbytes
        path, key = self._path(keys), keys[-1]
        if len(path) == len(keys):
            self._use(path)
            return True
        needed = nbytes + sum(entry.nbytes for entry in path)
        # A digest that another block has will not be seen in practice; that block stays.
        taken = key.digest in self._entries
        if len(path) < len(keys) - 1 or taken or needed > self._budget_bytes:
            self._refusals += 1
            return False
        new = _Entry(key, payload, nbytes, path[-1] if path else None)
        self._entries[key.digest] = new
        self._stored_bytes += nbytes
        self._use([*path, new])
        # Never one of its own path, which was used last and is within the budget.
        while self._stored_bytes > self._budget_bytes:
            _, oldest = self._entries.popitem(last=False)
            self._stored_bytes -= oldest.nbytes
            self._evictions += 1
        return True

    def discard(self, keys: Sequence[BlockKey]) -> None:
        """Give up a prompt's blocks, and all that stand on them.

        Args:
            keys: of the prompt, from its beginning.
        """
        gone = set(self._path(keys))
        # A block was used no sooner than those that stand on it, so it comes before them here.
        for entry in list(reversed(self._entries.values())) if gone else ():
            if entry in gone or entry.parent in gone:
                gone.add(entry)
                del self._entries[entry.key.digest]
                self._stored_bytes -= entry.nbytes

    def clear(self) -> None:
        """Give up all blocks. The counts of what has happened stay."""
        self._entries.clear()
        self._stored_bytes = 0

    @property
    def statistics(self) -> PrefixStatistics:
        """How it stands now."""
        return PrefixStatistics(
            blocks=len(self._entries),
            stored_bytes=self._stored_bytes,
            hits=self._hits,
            misses=self._misses,
            evictions=self._evictions,
            refusals=self._refusals,
        )

    def _path(self, keys: Sequence[BlockKey]) -> list[_Entry[Payload]]:
        """The first blocks that are kept.

        Their ids are compared, and their parents', so that not even a collision of digests gives
        the block of another prompt.
        """
        path, parent = list[_Entry[Payload]](), None
        for key in keys:
            entry = self._entries.get(key.digest)
            if entry is None or entry.key != key or entry.parent is not parent:
                break
            path.append(entry)
            parent = entry
        return path

    def _use(self, path: list[_Entry[Payload]]) -> None:
        """Make the blocks of a path the most recently used, the first of them the last."""
        for entry in reversed(path):
            self._entries.move_to_end(entry.key.digest)
