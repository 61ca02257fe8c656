"""`refimpl models --plan`: from options to a plan, and to standard output."""

import json
import sys
from pathlib import Path

from rich.console import Console

from refimpl.engine.engine import EngineOptions
from refimpl.errors import InvalidRequestError, UnknownModelError
from refimpl.model.checkpoint import open_checkpoint, read_json
from refimpl.model.config import GemmaConfig
from refimpl.model.hf_config import from_hugging_face
from refimpl.model.numerics import preset
from refimpl.model.registry import find
from refimpl.model.storage import Storage
from refimpl.plan.fit import MOST_SLOTS, Plan
from refimpl.plan.report import Report, bytes_table, contexts_table, to_json
from refimpl.plan.sizes import parse_size

# Of a device: what its runtime and the code of the programs take, intermediates that are not in the
# estimate, and gaps between arrays that no array fits into.
_MARGIN = 0.05
# Of a table that goes to a file.
_WIDTH = 140


def make_report(
    name: str,
    *,
    memory: str,
    devices: int = 1,
    dtype: str = "bfloat16",
    numerics: str = "float32",
    slots: int | None = None,
    context: int | None = None,
    margin: str | None = None,
) -> Report:
    """The plan that options ask for.

    Args:
        name: an id or tag of the registry, or a checkpoint on this machine.
        memory: of each device, as "80GB".
        slots, context: None for what an engine takes by default.
        margin: memory of each device to leave free; None for a share of it.

    Raises:
        InvalidRequestError: an option that makes no sense.
        UnknownModelError, CheckpointError, ConfigError: no such model.
    """
    config, options = config_of(name), EngineOptions()
    own = config.context_length
    _check("devices", devices, 1 << 20)
    _check("slots", options.slots if slots is None else slots, MOST_SLOTS)
    _check("context", 1 if context is None else context, own)
    available = parse_size(memory, option="memory")
    plan = Plan(
        config=config,
        devices=devices,
        memory=available,
        storage=Storage(dtype),
        numerics=preset(numerics),
        margin=int(available * _MARGIN)
        if margin is None
        else parse_size(margin, option="margin", least=0),
        prefix_bytes=options.prefix_bytes,
    )
    return Report(
        name=name,
        plan=plan,
        slots=options.slots if slots is None else slots,
        context=min(4096, own) if context is None else context,
    )


def print_plan(report: Report, *, as_json: bool) -> None:
    """Tables and what they come to, or one JSON object."""
    if as_json:
        print(json.dumps(to_json(report), ensure_ascii=False))
        return
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    console.print(report.title, markup=False)
    console.print()
    console.print(bytes_table(report))
    console.print()
    if report.contexts:
        console.print(contexts_table(report))
        console.print()
    for line in report.summary():
        console.print(line, markup=False)


def config_of(name: str) -> GemmaConfig:
    """The architecture of a model, of which no tensor is read or fetched.

    Args:
        name: a folder with config.json, a .gguf or safetensors file, or an id or tag.

    Raises:
        UnknownModelError: nothing on this machine and nothing in the registry has this name.
        CheckpointError, ConfigError: it is not a model that we carry.
    """
    path = _existing(name)
    if path is None:
        entry = find(name)
        if entry is None:
            raise UnknownModelError(
                f"no model, file or folder is called {name!r:.200}; --plan takes a name that "
                "`refimpl models` lists, a .gguf file or a folder with config.json"
            )
        return entry.config
    if path.suffix == ".gguf":
        return open_checkpoint(path).config
    folder = path if path.is_dir() else path.parent
    file = folder / "generation_config.json"
    generation = read_json(file) if file.is_file() else {}
    return from_hugging_face(read_json(folder / "config.json"), generation=generation)


def _existing(name: str) -> Path | None:
    """The file or folder of this name, `~` expanded, or None."""
    try:
        path = Path(name).expanduser()
        return path if name and path.exists() else None
    except (OSError, RuntimeError, ValueError):
        # No user of that name, a name longer than a path can be, or a NUL in it.
        return None


def _check(option: str, number: int, most: int) -> None:
    if not 1 <= number <= most:
        raise InvalidRequestError(
            f"--{option} must be a number from 1 to {most}, got {number}", parameter=option
        )
