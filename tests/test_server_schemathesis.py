"""Schemathesis reads `/openapi.json` as a stranger would, and holds the server to it over a socket.

For each operation it makes requests that the description allows, and requests that break it in one
place, and looks at status, headers and body of every reply.
"""

import json
import os
import subprocess
import sys
import urllib.request
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refimpl.server.operations import OPERATIONS
from tests.engines import CONTEXT, tiny_engine
from tests.served import served
from tests.servers import NAMES

# Every check but `positive_data_acceptance`:
# what fields mean together, and what this model's context holds, a schema cannot say.
OPTIONS = [
    "--generation-deterministic", "--continue-on-failure", "--checks=all",
    "--exclude-checks=positive_data_acceptance", "--request-timeout=100",
    "--max-response-time=100", "--no-color", "--report=json,har",
]  # fmt: skip
# What the server is told, and a client of this one model is told besides its description.
MOST_CANDIDATES, MOST_TOKENS = 2, 16


def narrowed(document: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """The description with what this one server refuses besides.

    Otherwise nearly all requests are for models that do not exist, or for too many tokens.
    """
    schemas = document["components"]["schemas"]
    model = {"type": "string", "enum": list(NAMES)}
    schemas["CompletionRequest"]["properties"]["model"] = model
    for name in ("TokenizeRequest", "DetokenizeRequest"):
        schemas[name]["properties"]["model"] = {"anyOf": [model, {"type": "null"}]}
    fields = schemas["CompletionRequest"]["properties"]
    fields["max_tokens"]["anyOf"][0]["maximum"] = MOST_TOKENS
    for field in ("best_of", "n"):
        fields[field]["anyOf"][0]["maximum"] = MOST_CANDIDATES
    _, _, ids, lists, _ = fields["prompt"]["anyOf"]
    for each in (ids, lists["items"]):
        each["items"]["maximum"] = vocab_size - 1
        each["maxItems"] = CONTEXT
    return document


@pytest.mark.parametrize(
    ("phases", "examples", "least", "refused"),
    [
        ("fuzzing", 15, {"completions": 3, "tokenize": 1, "detokenize": 1}, 1),
        pytest.param(
            "coverage,fuzzing",
            20,
            {"completions": 20, "tokenize": 5, "detokenize": 5},
            100,
            marks=pytest.mark.long,
        ),
    ],
)
def test_the_server_is_as_it_describes_itself(
    tmp_path: Path, phases: str, examples: int, least: dict[str, int], refused: int
) -> None:
    engine = tiny_engine()
    engine.options = replace(engine.options, compile_at_start=False)
    limits = {"max_candidates": MOST_CANDIDATES, "max_tokens_total": MOST_TOKENS}
    with engine, served(engine, infill_candidates=2, infill_cuts=2, **limits) as server:
        with urllib.request.urlopen(f"{server.url}/openapi.json", timeout=60) as reply:
            document = narrowed(json.load(reply), engine.gemma.vocab_size)
        described, seen, report = (tmp_path / f"{name}.json" for name in ("api", "seen", "report"))
        described.write_text(json.dumps(document))
        ended = subprocess.run(
            [sys.executable, "-m", "schemathesis.cli", "run", str(described), f"--url={server.url}",
             f"--phases={phases}", f"--max-examples={examples}", *OPTIONS,
             f"--report-json-path={report}", f"--report-har-path={seen}"],
            cwd=tmp_path, env={**os.environ, "NO_PROXY": "*"}, capture_output=True, text=True,
            timeout=240, check=False,
        )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-2000:]
    found = json.loads(report.read_text())
    assert (found["failures"], found["errors"], found["complete"]) == ([], [], True)
    assert found["operations"]["tested"] == len(OPERATIONS)
    check_replies(json.loads(seen.read_text()), least, refused)


def check_replies(seen: dict[str, Any], least: dict[str, int], refused: int) -> None:
    """No error of the server's, and enough of everything that the checks have looked at."""
    replies = Counter(
        (entry["request"]["url"].rpartition("/")[2], entry["response"]["status"])
        for entry in seen["log"]["entries"]
    )
    assert max(status for _, status in replies) < 500
    for name, count in least.items():
        assert replies[name, 200] >= count
    assert replies["completions", 400] >= refused
