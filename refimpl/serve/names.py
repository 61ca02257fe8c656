"""The names that a served model answers to."""

from pathlib import Path

from refimpl.model.registry import DEFAULT, find


def names_of(model: str | None) -> tuple[str, ...]:
    """What requests may call a model, its own name first.

    A published model has its Hub id and its tags; a file or folder is called as it is.

    >>> names_of("gemma3:4b-pt")
    ('google/gemma-3-4b-pt', 'gemma3:4b-pt')
    >>> names_of("somewhere/weights.gguf")
    ('weights',)
    """
    entry = DEFAULT if model is None else find(model)
    if entry is not None:
        return (entry.id, *entry.tags)
    assert model is not None
    path = Path(model).expanduser()
    if path.exists() or path.suffix == ".gguf":
        path = path.resolve()
        return (path.stem if path.suffix == ".gguf" else path.name,)
    return (model,)
