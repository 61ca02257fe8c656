"""The entry point of the `refimpl` script and of `python -m refimpl`: how a run ends.

A mistake of the caller ends with one line and exit status 2, Ctrl-C with 130.
"""

import sys
from typing import NoReturn


def main() -> None:
    """Run the command line."""
    try:
        # Imported inside, so that Ctrl-C while it loads ends as quietly as it does later.
        from refimpl.cli import app
        from refimpl.errors import RefimplError
    except KeyboardInterrupt:
        _end("interrupted", status=130)
    try:
        app()
    except RefimplError as error:
        _end(str(error), status=2)
    except KeyboardInterrupt:
        _end("interrupted", status=130)
    except BrokenPipeError:
        # The reader has gone, as `head` does. Python would complain once more at exit.
        sys.stderr.close()
        sys.exit(141)


def _end(message: str, *, status: int) -> NoReturn:
    print(f"refimpl: {message}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
