"""Every error that this project raises on purpose.

    RefimplError             base: catch this to catch all of them
    ├── ConfigError          a model configuration that contradicts itself or that we cannot carry
    ├── CheckpointError      a checkpoint that cannot become a model; lists every fault at once
    ├── UnknownModelError    a name that no registry entry, no folder and no file answers to
    ├── TokenizerError       text or ids that the vocabulary cannot take
    ├── TraceError           traces that cannot be saved, read or compared
    ├── EngineError          an engine that is not running, or that failed and must be started anew
    └── InvalidRequestError  what the caller asked for cannot be done; `parameter` says which part

Messages say what was got, what was expected and what to do. `assert` is only for our invariants.
"""


class RefimplError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(RefimplError):
    """A model configuration that contradicts itself or that we cannot carry."""


class CheckpointError(RefimplError):
    """A checkpoint that cannot become a model; the message lists every fault at once."""


class UnknownModelError(RefimplError):
    """A model name that nothing in the registry, no folder and no file answers to."""


class TokenizerError(RefimplError):
    """Text or ids that the vocabulary cannot take."""


class TraceError(RefimplError):
    """Traces that cannot be saved, read or compared."""


class EngineError(RefimplError):
    """An engine that is not running, or that failed and must be started anew."""


class InvalidRequestError(RefimplError):
    """What the caller asked for cannot be done.

    Attributes:
        parameter: name of the argument or field at fault, or None where no single one is.
    """

    def __init__(self, message: str, *, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter
