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

from refimpl.server.operations import OPERATIONS
from tests.engines import CONTEXT, tiny_engine
from tests.served import served
from tests.servers import NAMES

# Every check but two. What fields mean together, and what this model's context holds, a schema
# cannot say (`positive_data_acceptance`); what `narrowed` leaves out is no fault to accept
# (`negative_data_rejection`).
OPTIONS = [
    "--phases=fuzzing", "--max-examples=15", "--generation-deterministic",
    "--continue-on-failure", "--checks=all",
    "--exclude-checks=positive_data_acceptance,negative_data_rejection",
    "--request-timeout=100", "--max-response-time=100", "--no-color", "--report=json,har",
]  # fmt: skip


def narrowed(document: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """The description with what a client of this one model knows besides.

    Otherwise nearly all requests are for models that do not exist, or for too many tokens.
    """
    schemas = document["components"]["schemas"]
    for name in ("CompletionRequest", "TokenizeRequest", "DetokenizeRequest"):
        schemas[name]["properties"]["model"] = {"type": "string", "enum": list(NAMES)}
    fields = schemas["CompletionRequest"]["properties"]
    fields["max_tokens"]["anyOf"][0]["maximum"] = 8
    for field in ("best_of", "n"):
        fields[field]["anyOf"][0]["maximum"] = 2
    _, _, ids, lists, _ = fields["prompt"]["anyOf"]
    for each in (ids, lists["items"]):
        each["items"]["maximum"] = vocab_size - 1
        each["maxItems"] = CONTEXT // 2
    return document


def test_the_server_is_as_it_describes_itself(tmp_path: Path) -> None:
    engine = tiny_engine()
    engine.options = replace(engine.options, compile_at_start=False)
    with engine, served(engine, infill_candidates=2, infill_cuts=2) as server:
        with urllib.request.urlopen(f"{server.url}/openapi.json", timeout=60) as reply:
            document = narrowed(json.load(reply), engine.gemma.vocab_size)
        described, seen, report = (tmp_path / f"{name}.json" for name in ("api", "seen", "report"))
        described.write_text(json.dumps(document))
        ended = subprocess.run(
            [sys.executable, "-m", "schemathesis.cli", "run", str(described), f"--url={server.url}",
             *OPTIONS, f"--report-json-path={report}", f"--report-har-path={seen}"],
            cwd=tmp_path, env={**os.environ, "NO_PROXY": "*"}, capture_output=True, text=True,
            timeout=240, check=False,
        )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-2000:]
    found = json.loads(report.read_text())
    assert (found["failures"], found["errors"], found["complete"]) == ([], [], True)
    assert found["operations"]["tested"] == len(OPERATIONS)
    check_replies(json.loads(seen.read_text()))


def check_replies(seen: dict[str, Any]) -> None:
    """No error of the server's, and enough of everything that the checks have looked at."""
    replies = Counter(
        (entry["request"]["url"].rpartition("/")[2], entry["response"]["status"])
        for entry in seen["log"]["entries"]
    )
    assert max(status for _, status in replies) < 500
    for name in ("completions", "tokenize", "detokenize"):
        assert replies[name, 200] >= 3
