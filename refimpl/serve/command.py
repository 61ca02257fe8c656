"""`refimpl serve`: settings to a running server, and what it prints on the way.

What a person may want to copy goes to standard output, everything else to standard error.
"""

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from refimpl.errors import InvalidRequestError
from refimpl.serve.options import with_a_flag_for_each_setting
from refimpl.server.settings import ServerSettings
from refimpl.server.sources import KEYS_VARIABLE, PREFIX, Resolved, resolve
from refimpl.signals import ending_at_signals

EPILOG = (
    "Every flag can be set in the environment, too (`--max-queue` as `REFIMPL_MAX_QUEUE`), and "
    "in the file of `--config` (`max_queue = 100`). `REFIMPL_API_KEYS` holds API keys with commas "
    "between; `REFIMPL_API_KEYS_FILE` is the flag `--api-keys`.\n\n"
    "Examples:\n\n"
    "`refimpl serve`\n\n"
    "`refimpl serve --model gemma3:4b --slots 16 --port 8080`\n\n"
    "`refimpl serve --new-key alice >> keys.toml`\n\n"
    "`refimpl serve --host 0.0.0.0 --api-keys keys.toml`\n\n"
    "`refimpl serve --config refimpl.toml --show-config`"
)


@with_a_flag_for_each_setting
def serve(
    *,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with settings.", show_default=False)
    ] = None,
    show_config: Annotated[
        bool,
        typer.Option("--show-config", help="Print all settings and where they come from; exit."),
    ] = False,
    new_key: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Make an API key, print its entry for the file of keys; exit."
        ),
    ] = None,
    **flags: object,
) -> None:
    """Serve OpenAI's legacy completions API.

    It answers from the start; /ready is 200 once the model is loaded and compiled. Ctrl-C or
    SIGTERM lets what runs come to its end, a second one does not.
    """
    if new_key is not None:
        _print_new_key(new_key)
        return
    # Out of the environment, so that no child and no crash report has them.
    plain_keys = os.environ.pop(KEYS_VARIABLE, "")
    given = {name: value for name, value in flags.items() if value is not None}
    resolved = resolve(given, environment=os.environ, config=config)
    for name in resolved.strangers:
        print(f"refimpl: {name} begins with {PREFIX} and is no setting", file=sys.stderr)
    if show_config:
        print(_shown(resolved, plain_keys))
    else:
        with ending_at_signals():
            _serve(resolved.settings, plain_keys)


def _serve(settings: ServerSettings, plain_keys: str) -> None:
    # Imported here, because they take a second that other commands need not wait.
    from refimpl.progress import Progress
    from refimpl.serve.names import names_of
    from refimpl.server import access_log
    from refimpl.server.app import create_app
    from refimpl.server.keys import read_keys
    from refimpl.server.lifecycle import Service
    from refimpl.server.listener import Listener
    from refimpl.server.loading import Loaded
    from refimpl.server.loading import Progress as Report
    from refimpl.server.run import run

    def load(report: Report) -> Loaded:
        # JAX, which takes seconds, while the server answers already.
        from refimpl.engine.memory import share_arenas
        from refimpl.serve.load import load

        # The process is the server's alone, and the device's threads have not begun.
        share_arenas()
        return load(settings, report)

    keyring = read_keys(settings.api_keys, plain=plain_keys)
    listener = Listener(settings, keyring)
    access_log.configure(settings.log_format)
    with ExitStack() as stack:
        progress = stack.enter_context(Progress())
        service = Service(
            settings,
            names=names_of(settings.model),
            load=load,
            keyring=keyring,
            progress=progress.update,
        )
        print(f"refimpl: {listener.url} answers; loading {service.names[0]}", file=sys.stderr)

        def on_ready() -> None:
            stack.close()
            print(_welcome(listener.url, service.names, has_keys=bool(keyring)), flush=True)

        run(create_app(service), service, listener, on_ready=on_ready)
    # Without Python's own end, which waits for a thread that is deep in the compiler, stops others
    # within the device's library, and takes the handlers away that one more Ctrl-C would meet.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _welcome(url: str, names: tuple[str, ...], *, has_keys: bool) -> str:
    """What to do with a server that is ready."""
    header = ' \\\n  -H "Authorization: Bearer $REFIMPL_KEY"' if has_keys else ""
    key = 'os.environ["REFIMPL_KEY"]' if has_keys else '"none"'
    return f"""\
{names[0]} is ready at {url}
also called {", ".join(names[1:]) or "nothing else"}; API at {url}/docs, figures at {url}/metrics

curl {url}/v1/completions{header} \\
  -H "Content-Type: application/json" \\
  -d '{{"model": "{names[0]}", "prompt": "The capital of France is", "max_tokens": 16}}'

{"import os" + chr(10) if has_keys else ""}from openai import OpenAI

client = OpenAI(base_url="{url}/v1", api_key={key})
reply = client.completions.create(model="{names[0]}", prompt="The capital of France is")
print(reply.choices[0].text)

Ctrl-C stops it.
"""


def _shown(resolved: Resolved, plain_keys: str) -> str:
    count = sum(bool(part.strip()) for part in plain_keys.split(","))
    # Never the keys themselves.
    keys = f"# {count} API keys  # {KEYS_VARIABLE}\n" if count else ""
    return keys + resolved.to_toml()


def _print_new_key(name: str) -> None:
    from refimpl.server.keys import digest_of, new_key

    if not name.isidentifier():
        raise InvalidRequestError(
            f"--new-key takes a name of letters, digits and underscores, got {name!r:.100}",
            parameter="new_key",
        )
    key = new_key()
    print(f"refimpl: the key of {name}, shown this once: {key}", file=sys.stderr)
    print(f'[[keys]]\nname = "{name}"\nsha256 = "{digest_of(key)}"')
