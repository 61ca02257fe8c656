"""Tokens to text while they are generated: whole characters, and no part of a stop string.

Owns what is held back. Text leaves as soon as nothing that may follow can change it, and no sooner:

- bytes that begin a character wait for its end;
- text that may become a stop string waits until it is one or cannot be one any more;
- it cannot be one, either, when its next character has begun and begins otherwise than the stop
  string goes on;
- if stop strings stay in the text, they hold back nothing.

The stop string that ends first ends the text, so that it does not matter where tokens begin and
end: of "b" and "abc" it is "b" in "abc". Of those that end at the same character it is the one
that begins first: of "c" and "abc" it is "abc".
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from refimpl.model.detokenizer import IncrementalDecoder
from refimpl.model.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"


class Piece(NamedTuple):
    """What a token adds to a text.

    Attributes:
        text: what has become certain; often the token's own, sometimes nothing.
        stop: the stop string that ended the text, or None while it goes on.
    """

    text: str
    stop: str | None


class TextAssembler:
    """The text of one choice.

    All pieces' texts in a row are the tokens' text, as `Tokenizer.decode` gives it, cut at the
    first stop string. What `push` returns in n calls takes time proportional to n and the length of
    the text, whatever the stop strings are.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: "StopStrings",
        *,
        include_stop: bool = False,
        skip_special: bool = True,
    ) -> None:
        """Begin a text.

        Args:
            tokenizer: gives the bytes of an id.
            stops: what ends the text. Choices of a request can share it.
            include_stop: leave the stop string in the text.
            skip_special: leave out control pieces, so that they are part of no stop string either.
                A stop string is found nevertheless where one of them stands within it.
        """
        self._decoder = IncrementalDecoder(tokenizer, skip_special=skip_special)
        self._stops, self._include_stop = stops, include_stop
        self._node = self._candidate = stops.root
        self._held = deque[str]()
        self._ended = False

    def push(self, token_id: int) -> Piece:
        """The text that has become certain with this id; nothing once the text has ended.

        Raises:
            TokenizerError: there is no piece of this id. The text so far is not affected.
        """
        return Piece("", None) if self._ended else self._take(self._decoder.push(token_id))

    def flush(self) -> Piece:
        """End the text: all that was held back, unless that is or ends with a stop string.

        It may become one only now, as bytes that begin a character become U+FFFD.
        """
        if self._ended:
            return Piece("", None)
        piece = self._take(self._decoder.flush())
        self._ended = True
        return piece if piece.stop is not None else Piece(piece.text + self._release(), None)

    def _take(self, text: str) -> Piece:
        for character in text:
            self._held.append(character)
            self._node = self._candidate = self._stops.step(self._node, character)
            if self._node.stop is not None:
                return self._stop(self._node.stop)
        if self._include_stop:
            return Piece(self._release(), None)
        self._candidate = self._stops.candidate(self._candidate, self._decoder.pending)
        return Piece(self._release(keep=self._candidate.depth), None)

    def _stop(self, stop: str) -> Piece:
        self._ended = True
        return Piece(self._release(keep=0 if self._include_stop else len(stop)), stop)

    def _release(self, *, keep: int = 0) -> str:
        return "".join([self._held.popleft() for _ in range(len(self._held) - keep)])


class StopStrings:
    """Strings to look for in a text that comes character by character. Immutable.

    The automaton of Aho and Corasick, "Efficient string matching" (CACM 18(6), 1975). It is at the
    node of the longest beginning of a stop string that the text ends with. A character leads from
    there to a child, or to a child of the longest suffix that has one for it. A step to a child
    goes one deeper and every step to a suffix goes up, so that n characters take at most 2 n steps,
    whatever the strings are. Building takes time and memory proportional to the strings' lengths.
    """

    def __init__(self, stops: Iterable[str] = ()) -> None:
        """Build the automaton.

        Args:
            stops: none of them empty, none with a lone surrogate.
        """
        self.root = Node(0)
        for stop in stops:
            assert stop, "an empty string would end every text"
            node = self.root
            for character in stop:
                node = node.children.setdefault(character, Node(node.depth + 1))
            node.stop = stop
        nodes = list(self._link())
        for node in reversed(nodes):
            node.look_ahead()
        for node in nodes:
            node.look_back()

    def step(self, node: "Node", character: str) -> "Node":
        """The node after one more character."""
        while character not in node.children:
            if node is self.root:
                return node
            node = node.suffix
        return node.children[character]

    def candidate(self, node: "Node", pending: bytes) -> "Node":
        """What must be held back at a node: its longest suffix that may yet become a stop string.

        Steps to suffixes cost nothing in the long run here either: whatever the next character is,
        the candidate after it will be that much shorter.

        Args:
            node: after the text so far, or the candidate for less of the same pending bytes.
            pending: begin the next character. It will be one that begins so, or U+FFFD.
        """
        node = node.live_suffix
        while pending and pending not in node.begun and node is not node.replaceable_suffix:
            node = node.suffix
        return node

    def _link(self) -> Iterator["Node"]:
        """Find suffixes, and what ends at each node; yields all but the root, short ones first."""
        for child in self.root.children.values():
            child.suffix = self.root
        waiting = deque(self.root.children.values())
        while waiting:
            node = waiting.popleft()
            yield node
            # Its own stop string begins before any that ends with it.
            node.stop = node.stop or node.suffix.stop
            if node.stop is not None:
                # The text ends here; strings that go on are never found.
                node.children.clear()
            for character, child in node.children.items():
                child.suffix = self.step(node.suffix, character)
                waiting.append(child)


class Node:
    """A beginning of stop strings in `StopStrings`; the root is the empty one.

    Attributes:
        depth: its length in characters.
        children: beginnings that are one character longer.
        stop: the stop string that ends a text here, its own or a suffix's.
        suffix: the longest suffix that is a node, and not this one.
        live: whether a stop string that begins so can be found. Of "b" and "abc" only "b" can.
        begun: first bytes, but not all, of each character that leads to a live child.
        live_suffix: the longest suffix, or this, that is live.
        replaceable_suffix: the longest suffix, or this, that U+FFFD leads to a live child from.
    """

    __slots__ = ("begun", "children", "depth", "live", "live_suffix", "replaceable_suffix", "stop",
                 "suffix")  # fmt: skip

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.children: dict[str, Node] = {}
        self.stop: str | None = None
        self.live = False
        self.begun: set[bytes] = set()
        self.suffix = self.live_suffix = self.replaceable_suffix = self

    def look_ahead(self) -> None:
        """Find `live` and `begun`, once the children have theirs."""
        self.live = self.stop is not None and len(self.stop) == self.depth
        for character, child in self.children.items():
            if child.live:
                data = character.encode()
                self.live = True
                self.begun.update(data[:end] for end in range(1, len(data)))

    def look_back(self) -> None:
        """Find `live_suffix` and `replaceable_suffix`, once the suffix has its own."""
        if not self.live:
            self.live_suffix = self.suffix.live_suffix
        if _REPLACEMENT not in self.children or not self.children[_REPLACEMENT].live:
            self.replaceable_suffix = self.suffix.replaceable_suffix
