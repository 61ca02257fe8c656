"""The models that have names: Hugging Face ids and Ollama-style tags for the same entries.

A tag without a suffix means what Ollama serves under it, the instruction-tuned model, with one
exception: `gemma3:270m` is the base model, because that one is embedded and runs without a network.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from refimpl_weights import embedded, hub
from refimpl_weights.errors import MissingError, WeightsError

from refimpl.errors import CheckpointError, UnknownModelError
from refimpl.model.config import GemmaConfig
from refimpl.model.variants import VARIANTS

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Entry:
    """A published checkpoint.

    Attributes:
        id: on the Hugging Face Hub; the name that replies carry.
        tags: Ollama-style names of the same weights.
        variant: name of its architecture in `VARIANTS`.
        is_embedded: whether a Python package carries it.
    """

    id: str
    tags: tuple[str, ...]
    variant: str
    is_embedded: bool = False

    @property
    def config(self) -> GemmaConfig:
        """The architecture."""
        return VARIANTS[self.variant]

    @property
    def origin(self) -> str:
        """Where the weights would be loaded from."""
        return "embedded package" if self.is_embedded else "Hugging Face Hub"

    def is_local(self) -> bool:
        """Whether it can be loaded without a network."""
        return (self.is_embedded and embedded.is_installed()) or (
            hub.local_snapshot(self.id) is not None
        )


def _entries() -> tuple[Entry, ...]:
    google = "google/"
    listed = [
        Entry(f"{google}gemma-3-270m", ("gemma3:270m",), "gemma-3-270m", is_embedded=True),
        Entry(f"{google}gemma-3-270m-it", ("gemma3:270m-it",), "gemma-3-270m"),
    ]
    for size in ("1b", "4b", "12b", "27b"):
        listed += [
            Entry(f"{google}gemma-3-{size}-pt", (f"gemma3:{size}-pt",), f"gemma-3-{size}"),
            Entry(
                f"{google}gemma-3-{size}-it",
                (f"gemma3:{size}", f"gemma3:{size}-it"),
                f"gemma-3-{size}",
            ),
        ]
    for size in ("E2B", "E4B", "12B", "26B-A4B", "31B"):
        # Ollama's tag of the mixture of experts leaves out how many see a token.
        variant, short = f"gemma-4-{size.lower()}", size.lower().removesuffix("-a4b")
        listed += [
            Entry(f"{google}gemma-4-{size}", (f"gemma4:{size.lower()}-pt",), variant),
            Entry(
                f"{google}gemma-4-{size}-it",
                (f"gemma4:{short}", f"gemma4:{size.lower()}-it"),
                variant,
            ),
        ]
    for size in ("E2B", "E4B"):
        tag, variant = f"gemma3n:{size.lower()}", f"gemma-3n-{size.lower()}"
        listed += [
            Entry(f"{google}gemma-3n-{size}", (f"{tag}-pt",), variant),
            Entry(f"{google}gemma-3n-{size}-it", (tag, f"{tag}-it"), variant),
        ]
    for size in ("2b", "9b", "27b"):
        listed += [
            Entry(f"{google}gemma-2-{size}", (f"gemma2:{size}-text",), f"gemma-2-{size}"),
            Entry(
                f"{google}gemma-2-{size}-it",
                (f"gemma2:{size}", f"gemma2:{size}-instruct"),
                f"gemma-2-{size}",
            ),
        ]
    for size in ("2b", "7b"):
        listed += [
            Entry(f"{google}gemma-{size}", (f"gemma:{size}-text",), f"gemma-{size}"),
            Entry(f"{google}gemma-{size}-it", (f"gemma:{size}-v1",), f"gemma-{size}"),
            Entry(
                f"{google}gemma-1.1-{size}-it",
                (f"gemma:{size}", f"gemma:{size}-instruct"),
                f"gemma-{size}",
            ),
            Entry(f"{google}codegemma-{size}", (f"codegemma:{size}-code",), f"codegemma-{size}"),
        ]
    listed += [
        Entry(
            f"{google}codegemma-7b-it", ("codegemma:7b", "codegemma:7b-instruct"), "codegemma-7b"
        ),
        Entry(f"{google}vaultgemma-1b", ("vaultgemma:1b",), "vaultgemma-1b"),
    ]
    return tuple(listed)


REGISTRY = _entries()
DEFAULT = REGISTRY[0]


def find(name: str) -> Entry | None:
    """The entry of this id or tag, in any case, or None."""
    wanted = name.lower()
    return next((entry for entry in REGISTRY if wanted in (entry.id.lower(), *entry.tags)), None)


def locate(name: str | None = None, *, progress: Progress | None = None) -> Path:
    """The checkpoint that a name means, on this machine; downloads or assembles it if need be.

    Args:
        name: a file or folder, an id or tag of the registry, or another Hub id `owner/name`; None
            for the embedded default.
        progress: called with bytes done and in all while the embedded model is put together.
            Downloads show progress bars of their own.

    Raises:
        UnknownModelError: nothing answers to the name.
        CheckpointError: it is known, but cannot be had; the message says why and what to do.
    """
    name = DEFAULT.id if name is None else name
    if not name:
        raise UnknownModelError("the model's name is empty; see `refimpl models` for names")
    path = _existing(name)
    if path is not None:
        return path
    entry = find(name)
    try:
        if entry is not None and entry.is_embedded and embedded.is_installed():
            return embedded.assemble(progress=progress)
        if entry is not None:
            return hub.fetch(entry.id)
        if _is_hub_id(name):
            return hub.fetch(name)
    except MissingError as error:
        hint = _suggestion(name) if entry is None else ""
        raise CheckpointError(f"cannot load {name}{hint}: {error}") from error
    except WeightsError as error:
        raise CheckpointError(str(error)) from error
    raise UnknownModelError(_unknown(name))


def _existing(name: str) -> Path | None:
    """The file or folder of this name, `~` expanded, or None."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):
        # No user of that name, a name longer than a path can be, or a NUL in it.
        return None


def _is_hub_id(name: str) -> bool:
    """`owner/name` as the Hub allows it, and nothing that looks like a path."""
    parts = name.split("/")
    return (
        len(parts) == 2
        and all(part and part.replace("-", "").replace("_", "").replace(".", "").isalnum()
                for part in parts)
        and not name.startswith(".")
        and not name.endswith((".gguf", ".safetensors"))
    )  # fmt: skip


def _suggestion(name: str) -> str:
    known = {name.lower(): name for entry in REGISTRY for name in (entry.id, *entry.tags)}
    close = difflib.get_close_matches(name.lower(), known, n=3)
    return f" (did you mean {' or '.join(known[match] for match in close)}?)" if close else ""


def _unknown(name: str) -> str:
    return (
        f"no model, file or folder is called {name!r:.200}{_suggestion(name)}; give a name that "
        "`refimpl models` lists, a Hub id like google/gemma-3-4b-it, a .gguf file or a checkpoint "
        "folder"
    )
