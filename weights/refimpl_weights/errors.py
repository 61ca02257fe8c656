"""What can go wrong between a name on the command line and an array in memory.

    WeightsError
    ├── FormatError      the file is not what its format says: foreign, truncated, corrupt
    ├── UnsupportedError the file is sound, but holds something that we do not read
    └── MissingError     a file, a package or a download that is needed is not there

Every message says what was got, what was expected and what to do.
"""


class WeightsError(Exception):
    """Base of every error this package raises on purpose."""


class FormatError(WeightsError):
    """The file is not what its format says: foreign, truncated or corrupt."""


class UnsupportedError(WeightsError):
    """The file is sound, but holds a tensor type, version or architecture we do not read."""


class MissingError(WeightsError):
    """A file, a package or a download that is needed is not there."""
