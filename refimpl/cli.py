"""The command line: serve, complete, score, bench, models.

Results go to standard output, progress and errors to standard error; `refimpl.__main__` says how a
run ends.
"""

import itertools
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import refimpl
from refimpl.errors import EngineError, InvalidRequestError
from refimpl.plan.models import EPILOG as MODELS_EPILOG
from refimpl.plan.models import models
from refimpl.progress import Progress
from refimpl.serve.command import EPILOG, serve
from refimpl.signals import ending_at_interrupt

if TYPE_CHECKING:
    from refimpl.engine.engine import Engine
    from refimpl.engine.request import SamplingParams
    from refimpl.model.gemma import Gemma

app = typer.Typer(
    name="refimpl",
    help="Google's Gemma language models in pure Python on JAX.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="A name that `refimpl models` lists, a Hub id, a .gguf file or a checkpoint folder. "
        "Default: the embedded Gemma 3 270M.",
        show_default=False,
    ),
]
NumericsOption = Annotated[
    str,
    typer.Option(help="Where the forward pass rounds: float32, hf_bfloat16, deepmind_bfloat16."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def _print_version(is_wanted: bool) -> bool:
    if is_wanted:
        print(f"refimpl {refimpl.__version__}")
        raise typer.Exit
    return is_wanted


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Google's Gemma language models in pure Python on JAX."""
    del version


app.command(epilog=EPILOG)(serve)


@app.command(
    epilog="Examples:\n\n"
    '`refimpl complete "The capital of France is"`\n\n'
    '`refimpl complete "Once upon a time" --temperature 0.8 --seed 7 --max-tokens 100`\n\n'
    '`refimpl complete "Q: 2+2? A:" --temperature 1 --top-k 40 --top-p 0.95 --stop "Q:"`\n\n'
    '`refimpl complete "2+2=" --model gemma3:4b --json`'
)
def complete(
    prompt: Annotated[str, typer.Argument(help="Text to go on from.", show_default=False)],
    model: ModelOption = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy; at most 2.")] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(help="Draw from the fewest tokens that are this probable together; 1: all."),
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option(help="Draw from this many of the likeliest tokens; 0: all.")
    ] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="End before this text; give it again for further ones.", show_default=False
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Makes a draw repeatable; by default each differs.", show_default=False),
    ] = None,
    numerics: NumericsOption = "float32",
    as_json: JsonOption = False,
) -> None:
    """Continue PROMPT and print the text as it is made."""
    from refimpl.engine.events import Delta, collect
    from refimpl.engine.request import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop=tuple(stop or ()),
        seed=seed,
        logprobs=0,
    )
    _refuse_empty(prompt, "the prompt")
    events = []
    with ExitStack() as stack:
        with ending_at_interrupt(), Progress() as progress:
            gemma = refimpl.load(model, numerics=numerics, progress=progress.update)
            ids = gemma.tokenizer.encode(prompt)
            engine = stack.enter_context(_engine_for(gemma, ids, params))
            request = engine.request(ids, params)
            stream = engine.stream(request)
            with progress.waiting("compiling and reading the prompt"):
                first = next(stream)

        _write("" if as_json else prompt)
        for event in itertools.chain([first], stream):
            events.append(event)
            if isinstance(event, Delta) and not as_json:
                _write(event.text)
    _write("" if as_json else "\n")

    [choice] = collect(request, events).choices
    if choice.finish_reason == "error":
        raise EngineError(
            f"the model's numbers were not finite any more after {len(choice.token_ids)} tokens: "
            "the checkpoint is damaged, or needs other numerics"
        )
    if as_json:
        _print_json({
            "model": str(gemma.path.name),
            "prompt": prompt,
            "prompt_ids": ids,
            "text": choice.text,
            "ids": choice.token_ids,
            "logprobs": [entry.logprob for entry in choice.logprobs or ()],
            "finish_reason": choice.finish_reason,
        })  # fmt: skip


@app.command(
    epilog="Examples:\n\n"
    '`refimpl score "The capital of France is Paris."`\n\n'
    "`refimpl score --file essay.txt --json`"
)
def score(
    text: Annotated[str | None, typer.Argument(help="Text to score.", show_default=False)] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="A UTF-8 file to score instead.")
    ] = None,
    model: ModelOption = None,
    numerics: NumericsOption = "float32",
    as_json: JsonOption = False,
) -> None:
    """Print the log-probability of each token of a text, given those before it."""
    from refimpl.engine.request import SamplingParams

    wanted = _read_text(text, file)
    with ending_at_interrupt(), Progress() as progress:
        gemma = refimpl.load(model, numerics=numerics, progress=progress.update)
        ids = gemma.tokenizer.encode(wanted)
        with (
            progress.waiting("compiling and scoring"),
            _engine_for(gemma, ids, SamplingParams(max_tokens=0)) as engine,
        ):
            scored = engine.score(ids)
    logprobs = [None if entry is None else entry.logprob for entry in scored]
    pieces = [gemma.tokenizer.piece(i) for i in ids]
    if as_json:
        _print_json({"tokens": pieces, "ids": ids, "logprobs": logprobs})
    else:
        _print_scores(pieces, ids, logprobs)


@app.command(
    epilog="Examples:\n\n"
    "`refimpl bench --quick`\n\n"
    "`refimpl bench --streams 1,8 --prefill 512 --json > here.json`\n\n"
    "`refimpl bench --server`\n\n"
    "`uv run --with xllamacpp refimpl bench --peer llama.cpp`"
)
def bench(
    model: ModelOption = None,
    peer: Annotated[
        str | None,
        typer.Option(
            help="Measure this beside us, in turns, and print ratios: llama.cpp, for a GGUF file.",
            show_default=False,
        ),
    ] = None,
    streams: Annotated[
        str | None,
        typer.Option(help="Numbers of streams that decode together. Default: 1,2,4,8,16."),
    ] = None,
    prefill: Annotated[
        str | None, typer.Option(help="Lengths of prompts. Default: 128,512,2048.")
    ] = None,
    repeat: Annotated[
        int | None, typer.Option(help="Turns at each measurement; medians count. Default: 5.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens that each stream decodes in a turn. Default: 32.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(help="Threads of the peer; JAX chooses ours. Default: one for each core."),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Other defaults, for some minutes: 1,8 streams; 512; 3; 16."),
    ] = False,
    cold: Annotated[
        bool,
        typer.Option("--cold", help="Compile everything anew, too, which takes a minute or two."),
    ] = False,
    server: Annotated[
        bool,
        typer.Option(
            "--server", help="Measure what serving costs: 8 streams by HTTP beside the engine's."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure how fast this machine runs a model, alone or against a peer.

    Prints medians of alternating runs: times to load, to compile and to the first token, tokens per
    second, memory. What Ctrl-C interrupts is printed as far as it got.
    """
    from refimpl.bench.command import make_plan, print_benchmark, print_server_benchmark

    if server and peer is not None:
        raise InvalidRequestError("--server and --peer are two benchmarks: give one of them")
    if server and streams is None:
        streams = "8"
    plan = make_plan(
        model,
        peer=peer,
        streams=streams,
        prefill=prefill,
        repeat=repeat,
        tokens=tokens,
        threads=threads,
        is_quick=quick,
        is_cold=cold,
    )
    if server:
        print_server_benchmark(plan, as_json=as_json)
    else:
        print_benchmark(plan, as_json=as_json)


app.command(epilog=MODELS_EPILOG)(models)


def _engine_for(gemma: "Gemma", ids: Sequence[int], params: "SamplingParams") -> "Engine":
    """An engine that is just large enough for one request, which it has checked.

    Raises:
        InvalidRequestError: the model cannot do it.
    """
    from refimpl.engine.engine import Engine, EngineOptions

    # A power of two, so that requests of about the same length share compiled programs.
    tokens = len(ids) + params.max_tokens
    context = min(max(1024, 1 << (tokens - 1).bit_length()), gemma.config.context_length)
    options = EngineOptions(slots=1, context=context, prefix_bytes=0, compile_at_start=False)
    engine = Engine(gemma, options)
    # Before the start, which takes the memory.
    engine.check(engine.request(ids, params))
    return engine


def _print_scores(pieces: list[str], ids: list[int], logprobs: list[float | None]) -> None:
    for piece, token_id, logprob in zip(pieces, ids, logprobs, strict=True):
        value = "      -" if logprob is None else f"{logprob:8.4f}"
        print(f"{value:>9}  {token_id:>6}  {piece!r}")
    known = [value for value in logprobs if value is not None]
    if known:
        total = sum(known)
        print(f"{total:9.4f}  in all, {total / len(known):.4f} per token")


def _read_text(text: str | None, file: Path | None) -> str:
    if (text is None) == (file is None):
        raise InvalidRequestError("give either TEXT or --file FILE; see `refimpl score --help`")
    if file is None:
        assert text is not None
        return _refuse_empty(text, "the text")
    try:
        return _refuse_empty(file.read_text(encoding="utf-8"), f"the file {file}")
    except OSError as error:
        raise InvalidRequestError(f"cannot read {file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"{file} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}"
        ) from error


def _refuse_empty(text: str, what: str) -> str:
    if not text:
        raise InvalidRequestError(f"{what} is empty: give at least one character")
    return text


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False))
