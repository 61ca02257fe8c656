"""A walk over the first bytes of a GGUF file, which reads no further than it must.

Owns positions, bounds and the damage report. Does not know what the numbers and strings mean.
"""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from refimpl_weights.errors import FormatError, MissingError

# The longest header of a Gemma, with its half a million merges, has 20 MB. The bound keeps a
# hostile file from being pulled into memory, or walked for minutes, before it is found out.
MAX_HEADER_BYTES = 64 * 2**20

CURE = "the file is corrupt or was cut short, fetch it again"
LENGTH = struct.Struct("<Q")
_READ_STEP = 2**20


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """The file, with what the operating system has against it as a `MissingError`."""
    try:
        # Opening a pipe would wait for someone to write into it.
        if path.exists() and not path.is_file():
            raise MissingError(f"{path} is not a file; expected the path of one .gguf file")
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise MissingError(f"{path} cannot be read: {error.strerror or error}") from error


class Cursor:
    """A position in the file, with the bytes from the file's beginning as far as needed."""

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self.path = path
        self.file_bytes = os.fstat(file.fileno()).st_size
        self.position = 0
        self.buffer = bytearray()
        self._file = file

    def damage(self, message: str) -> FormatError:
        """An error to raise: what is wrong, in which file, and what to do."""
        return FormatError(f"{self.path}: {message}; {CURE}")

    def need(self, count: int, *, what: str) -> None:
        """Make sure that `buffer` holds the `count` bytes that come next.

        Raises:
            FormatError: the file, or the longest header that we read, ends before.
        """
        end = self.position + count
        limit = min(self.file_bytes, MAX_HEADER_BYTES)
        if end > limit:
            bound = "the file" if limit == self.file_bytes else "the longest header that we read"
            raise self.damage(
                f"{what} at byte {self.position} takes {count} bytes, but {bound} ends at {limit}"
            )
        if end > len(self.buffer):
            self.buffer += self._file.read(max(_READ_STEP, end - len(self.buffer)))
        if end > len(self.buffer):
            raise self.damage(f"it had {self.file_bytes} bytes and shrank while it was read")

    def skip(self, count: int, *, what: str) -> None:
        """Step over `count` bytes.

        Raises:
            FormatError: as `need`.
        """
        self.need(count, what=what)
        self.position += count

    def number(self, code: str, *, what: str) -> int | float:
        """Step over one number, given as `struct` spells it.

        Raises:
            FormatError: as `need`.
        """
        begin = self.position
        self.skip(struct.calcsize(f"<{code}"), what=what)
        return struct.unpack_from(f"<{code}", self.buffer, begin)[0]

    def integer(self, code: str, *, what: str) -> int:
        """`number`, for the codes of integers."""
        return int(self.number(code, what=what))

    def string(self, *, what: str) -> str:
        """Step over one string.

        Raises:
            FormatError: as `need`, or the bytes are not UTF-8.
        """
        length = self.integer("Q", what=f"the length of {what}")
        begin = self.position
        self.skip(length, what=what)
        data = bytes(self.buffer[begin : self.position])
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.damage(f"{what} is {data[:40]!r}, expected UTF-8") from error

    def skip_strings(self, count: int, *, what: str) -> None:
        """Step over `count` strings: the one loop here that a real file runs half a million times.

        Only a string's length tells where the next one begins, so there is no leaping over them.

        Raises:
            FormatError: as `need`.
        """
        self.need(LENGTH.size * count, what=what)
        for _ in range(count):
            if self.position + LENGTH.size > len(self.buffer):
                self.need(LENGTH.size, what=what)
            self.position += LENGTH.size + LENGTH.unpack_from(self.buffer, self.position)[0]
        self.need(0, what=what)
