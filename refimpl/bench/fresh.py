"""A subject in a fresh process: what starting it costs, and the memory it needs.

`run_fresh` starts this module as a program. The program prints one line of JSON when it has its
first token, so that the parent's own clock tells how long that took since the process was asked
for, and one more when it ends.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from refimpl.bench.subject import Setup, Subject, open_subject
from refimpl.errors import RefimplError


@dataclass(frozen=True, kw_only=True)
class Exercise:
    """Work for a subject after its first token, so that its peak of memory is that of serving.

    Attributes:
        prefill: tokens of a prompt.
        streams: that decode together.
        tokens: that each of them decodes.
    """

    prefill: int
    streams: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class FreshStart:
    """What one fresh process has shown.

    Attributes:
        first_token_seconds: from starting the process to the first token of a short prompt.
        load_seconds: see `subject`.
        compile_seconds: see `subject`; None for a subject that compiles nothing.
        peak_bytes: the most memory that was resident at a time; file pages that the process has
            mapped and touched count.
    """

    first_token_seconds: float
    load_seconds: float
    compile_seconds: float | None
    peak_bytes: int


def run_fresh(
    name: str, setup: Setup, *, exercise: Exercise | None = None, cache_dir: Path | None = None
) -> FreshStart:
    """Start a process, and let it load a model and complete a short prompt.

    Args:
        name: of the subject.
        setup: of the subject.
        exercise: what it does then; None ends it after its first token.
        cache_dir: a folder for compiled programs instead of the user's; an empty one makes the
            subject compile everything.

    Raises:
        RefimplError: the process has failed; the message ends with its own last words.
    """
    task = json.dumps({
        "name": name,
        "setup": asdict(setup) | {"path": str(setup.path)},
        "exercise": None if exercise is None else asdict(exercise),
    })  # fmt: skip
    changes = {} if cache_dir is None else {"REFIMPL_CACHE_DIR": str(cache_dir)}
    return watch([sys.executable, "-m", __name__, task], environment=os.environ | changes)


def watch(command: list[str], *, environment: dict[str, str] | None = None) -> FreshStart:
    """Run a program that reports as `serve_once` does.

    Raises:
        RefimplError: as `run_fresh`.
    """
    # A file, because a pipe that nobody reads from until the end would stop a talkative program.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaint:
        begin = time.perf_counter()
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=complaint, text=True, env=environment
        ) as process:
            try:
                assert process.stdout is not None
                first = process.stdout.readline()
                first_token_seconds = time.perf_counter() - begin
                rest, _ = process.communicate()
            finally:
                # Ended already, unless this was interrupted.
                process.kill()
                process.wait()
        if process.returncode != 0:
            complaint.seek(0)
            words = complaint.read().strip().splitlines() or ["it said nothing"]
            raise RefimplError(
                f"a fresh process for measuring ended with status {process.returncode}: {words[-1]}"
            )
    started, ended = json.loads(first), json.loads(rest)
    return FreshStart(
        first_token_seconds=first_token_seconds,
        load_seconds=started["load_seconds"],
        compile_seconds=started["compile_seconds"],
        peak_bytes=ended["peak_bytes"],
    )


def serve_once(subject: Subject, exercise: Exercise | None) -> None:
    """What the fresh process does; it tells of it on standard output."""
    load_seconds = subject.load()
    compile_seconds = subject.compile()
    subject.first_token()
    _print_line({"load_seconds": load_seconds, "compile_seconds": compile_seconds})
    if exercise is not None:
        subject.prefill(exercise.prefill)
        subject.decode(exercise.streams, exercise.tokens)
    _print_line({"peak_bytes": peak_resident_bytes()})
    subject.close()


def peak_resident_bytes() -> int:
    """The most memory that this process has had resident at a time."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Unlike ru_maxrss, VmHWM begins anew with the program; what forked it does not count.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(task: str) -> None:
    """The program: `task` is what `run_fresh` gives it."""
    asked = json.loads(task)
    setup = Setup(**asked["setup"] | {"path": Path(asked["setup"]["path"])})
    exercise = None if asked["exercise"] is None else Exercise(**asked["exercise"])
    serve_once(open_subject(asked["name"], setup), exercise)


def _print_line(value: dict[str, float | int | None]) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except KeyboardInterrupt:
        # Ctrl-C reaches the parent, too, which ends the run and says so.
        sys.exit(130)
    except RefimplError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
