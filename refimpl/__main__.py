"""The entry point of the `refimpl` script and of `python -m refimpl`: how a run ends.

A mistake of the caller ends with one line and exit status 2, Ctrl-C with 130; a reader that goes
away early, as `head` does, ends it without a word.
"""

import os
import sys
from io import TextIOWrapper


def main() -> None:
    """Run the command line and exit."""
    try:
        # Imported inside, so that Ctrl-C while it loads ends as quietly as it does later.
        sys.exit(_run())
    except KeyboardInterrupt:
        sys.exit(_complain("interrupted", status=130))
    except BrokenPipeError:
        # Python flushes standard output once more at exit and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _run() -> int:
    import typer

    from refimpl.cli import app
    from refimpl.errors import RefimplError

    # A terminal that lacks a character of the text shows its escape instead of ending the run.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = app(standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except RefimplError as error:
        return _complain(str(error), status=2)
    except typer.Abort:
        return _complain("interrupted", status=130)
    except typer.TyperException as error:
        # A usage error; asking for nothing at all shows the help, which is its message.
        message = getattr(error, "format_message", lambda: str(error))()
        if message:
            _complain(f"{message.rstrip('.')}; see `refimpl --help`", status=2)
        return 2


def _complain(message: str, *, status: int) -> int:
    print(f"refimpl: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
