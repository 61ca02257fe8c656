"""`refimpl models`: the models that have names, and plans for them."""

import json
from typing import Annotated, Any

import typer

from refimpl.errors import InvalidRequestError

EPILOG = (
    "Examples:\n\n"
    "`refimpl models`\n\n"
    "`refimpl models --plan google/gemma-4-31B-it --devices 4 --memory 80GB`\n\n"
    "`refimpl models --plan gemma4:26b --memory 48GB --dtype q4_0 --slots 2 --context 32768`\n\n"
    "`refimpl models --plan ./checkpoint --memory 16GiB --numerics hf_bfloat16 --json`\n\n"
    "`refimpl models --markdown`"
)


def models(
    plan: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Say what devices would hold of this model, and how much context and how many "
            "slots fit: a name, a .gguf file or a checkpoint folder, of which only the "
            "configuration is read.",
            show_default=False,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Of each device: 80GB, 80GiB, 512MB. Needed by --plan."),
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(
            help="Devices that share the model, all alike. The engine runs on one today; "
            "the plan for more is of shapes alone. Default: 1."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of the weights as the file has them: bfloat16 (default), float16, "
            "float32, q8_0, q4_0, q4_k, ... A quantized weight is a byte here, with "
            "float32 scales, whatever the file packs it into."
        ),
    ] = None,
    numerics: Annotated[
        str | None,
        typer.Option(
            help="float32 (default), hf_bfloat16 or deepmind_bfloat16: the type of caches, too."
        ),
    ] = None,
    slots: Annotated[
        int | None, typer.Option(help="Choices that run together. Default: the engine's 8.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens of prompt and completion in each slot. Default: 4096, or the "
            "model's own if that is less."
        ),
    ] = None,
    margin: Annotated[
        str | None,
        typer.Option(
            help="Memory of each device to leave free, for its runtime, the code of "
            "programs and what the estimate of their work leaves out. Default: 5 %."
        ),
    ] = None,
    markdown: Annotated[
        bool,
        typer.Option("--markdown", help="Print the README's tables of architectures."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of text.")
    ] = False,
) -> None:
    """List the models that have names and whether they are here, or plan one for some memory."""
    planning = {
        "memory": memory, "devices": devices, "dtype": dtype, "numerics": numerics,
        "slots": slots, "context": context, "margin": margin,
    }  # fmt: skip
    given = {name: value for name, value in planning.items() if value is not None}
    if markdown and (plan is not None or given or as_json):
        raise InvalidRequestError("--markdown stands alone: give it without other options")
    if plan is not None:
        _print_plan(plan, given, as_json=as_json)
    elif given:
        raise InvalidRequestError(
            f"--{next(iter(given))} belongs to a plan: add --plan with a model's name"
        )
    else:
        _print_catalogue(as_json=as_json, as_markdown=markdown)


def _print_plan(name: str, given: dict[str, Any], *, as_json: bool) -> None:
    # Imported here, because JAX takes seconds.
    from refimpl.plan.command import make_report, print_plan

    if "memory" not in given:
        raise InvalidRequestError("--plan needs --memory, what each device has, as in 80GB")
    print_plan(make_report(name, **given), as_json=as_json)


def _print_catalogue(*, as_json: bool, as_markdown: bool) -> None:
    from refimpl import catalogue

    if as_json:
        print(json.dumps({"models": catalogue.rows()}, ensure_ascii=False))
    elif as_markdown:
        print(catalogue.markdown())
    else:
        catalogue.print_rows()
