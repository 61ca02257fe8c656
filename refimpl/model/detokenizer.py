"""Ids back to text, one at a time.

Owns the bytes of a character that have arrived before the last of them. A piece is a string of
bytes and not always of whole characters: "é" may come as the byte pieces `<0xC3>` and `<0xA9>`. Who
shows text while it is generated has to wait for the second.
"""

import codecs

from refimpl.model.tokenizer import Tokenizer


class IncrementalDecoder:
    """Turns a stream of ids into a stream of text.

    The pieces' bytes are decoded as one stream of UTF-8. At most three bytes are held back, those
    that begin a character (or a surrogate, of which Python's decoder awaits the end as well). Bytes
    that cannot be part of any character become U+FFFD, one for each maximal subpart of a
    well-formed sequence (Unicode, section 3.9), as in `Tokenizer.decode`: what all calls of `push`
    and the `flush` after them return is, in a row, what `decode` makes of all ids at once. A call
    takes time proportional to its own piece.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        """Begin a text.

        Args:
            tokenizer: gives the bytes of an id.
            skip_special: leave out control pieces instead of spelling them.
        """
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def pending(self) -> bytes:
        """The bytes held back: the beginning of a character, or nothing."""
        return self._decoder.getstate()[0]

    def push(self, token_id: int) -> str:
        """The text that has become certain with this id; often one piece, sometimes nothing.

        Raises:
            TokenizerError: there is no piece of this id. The text so far is not affected.
        """
        data = self._tokenizer.piece_bytes(token_id)
        return "" if token_id in self._skipped else self._decoder.decode(data)

    def flush(self) -> str:
        """End the text: U+FFFD if it breaks off within a character, else nothing.

        After it a new text may begin.
        """
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
