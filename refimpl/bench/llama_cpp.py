"""llama.cpp as a subject, in this process, over the PyPI package `xllamacpp`.

The package is no dependency: it is imported only when asked for. Of llama.cpp it offers the server
alone, whose requests can be made without HTTP. Settings are llama.cpp's own defaults, except that
nothing is cached from one prompt to the next and the sampler is greedy. No other setting that was
tried gained more than the runs differed by.
"""

import itertools
import time
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from refimpl.bench.subject import LLAMA_CPP, SHORT_PROMPT, Setup, prompt_ids
from refimpl.errors import InvalidRequestError

PACKAGE = "xllamacpp"


class LlamaCpp:
    """A `Subject`."""

    name = LLAMA_CPP
    package = PACKAGE

    def __init__(self, setup: Setup) -> None:
        """Check that it can be had and can read the file.

        Raises:
            InvalidRequestError: the package is not installed, or the model is no GGUF file.
        """
        check_available(setup)
        self._setup = setup
        self._server: Any = None
        self._numbers = itertools.count()

    @property
    def version(self) -> str:
        """Of the package, which is of one day's llama.cpp."""
        return version(PACKAGE)

    def load(self) -> float:
        """See `Subject`. llama.cpp warms up while it loads: an empty pass through the model.

        Raises:
            InvalidRequestError: llama.cpp cannot load the file.
        """
        begin = time.perf_counter()
        module = import_module(PACKAGE)
        try:
            self._server = module.Server(_parameters(module, self._setup))
        except RuntimeError as error:
            raise InvalidRequestError(
                f"llama.cpp cannot load {self._setup.path}: {error}", parameter="peer"
            ) from error
        return time.perf_counter() - begin

    def compile(self) -> None:
        """See `Subject`: it comes compiled."""
        return

    def prefill(self, num_tokens: int) -> float:
        """See `Subject`."""
        return self._until_first_token(prompt_ids(num_tokens, number=next(self._numbers)))

    def decode(self, streams: int, num_tokens: int) -> float:
        """See `Subject`."""
        prompts = [prompt_ids(2, number=next(self._numbers)) for _ in range(streams)]
        # One request of many prompts, because the server reads them all in one batch: from then on
        # the streams march in step, and what it times of the first is true of all.
        reply = self._complete(prompts, max_tokens=num_tokens + 1)
        return reply["timings"]["predicted_per_token_ms"] * num_tokens / 1e3

    def first_token(self) -> float:
        """See `Subject`."""
        return self._until_first_token(SHORT_PROMPT)

    def close(self) -> None:
        """See `Subject`."""
        self._server = None

    def _until_first_token(self, prompt: str | list[int]) -> float:
        begin = time.perf_counter()
        self._complete(prompt, max_tokens=1)
        return time.perf_counter() - begin

    def _complete(self, prompt: Any, *, max_tokens: int) -> dict[str, Any]:
        reply = self._server.handle_completions({
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
        })  # fmt: skip
        if "error" in reply:
            raise InvalidRequestError(f"llama.cpp refused to complete: {reply['error']['message']}")
        return reply


def check_available(setup: Setup) -> None:
    """Refuse what llama.cpp cannot do here, before anything is measured.

    Raises:
        InvalidRequestError: the package is not installed, or the model is no GGUF file.
    """
    if find_spec(PACKAGE) is None:
        raise InvalidRequestError(
            f"llama.cpp is measured over the Python package {PACKAGE}, which is not installed; "
            f"run `uv run --with {PACKAGE} refimpl bench --peer llama.cpp`",
            parameter="peer",
        )
    if setup.path.suffix != ".gguf":
        raise InvalidRequestError(
            f"llama.cpp reads GGUF files only, got {setup.path}; give --model a .gguf file",
            parameter="peer",
        )


def _parameters(module: Any, setup: Setup) -> Any:
    parameters = module.CommonParams()
    parameters.model.path = str(setup.path)
    parameters.n_parallel = setup.slots
    parameters.n_ctx = setup.slots * setup.context
    parameters.cpuparams.n_threads = setup.threads
    parameters.cpuparams_batch.n_threads = setup.threads
    # Every prompt is read from its first token on, and in as few batches as it takes.
    parameters.cache_prompt = False
    parameters.cache_ram_mib = 0
    parameters.n_ctx_checkpoints = 0
    # Errors only.
    parameters.verbosity = 0
    return parameters
