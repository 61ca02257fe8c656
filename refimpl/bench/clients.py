"""Clients of a server, in a process of their own so that they do not run on the server's time.

    python -m refimpl.bench.clients PORT STREAMS TOKENS

sends so many requests at once and prints, as JSON, when the tokens of each stream came.
"""

import asyncio
import json
import sys
import time
from typing import Any

_MODEL = "bench"


def main() -> None:
    """Run as the module's docstring says."""
    port, streams, tokens = map(int, sys.argv[1:])
    print(json.dumps(asyncio.run(_all(port, streams, tokens))))


async def _all(port: int, streams: int, tokens: int) -> list[list[tuple[float, int]]]:
    return await asyncio.gather(*(_one(port, tokens, number) for number in range(streams)))


async def _one(port: int, tokens: int, number: int) -> list[tuple[float, int]]:
    """When tokens of one stream came, and how many at once."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(_request(tokens, number))
    status = await reader.readline()
    if b" 200 " not in status:
        raise SystemExit(f"the server replied {status!r}: {await reader.read(2000)!r}")
    arrivals = list[tuple[float, int]]()
    async for line in reader:
        if line.startswith(b"data: [DONE]"):
            break
        if line.startswith(b"data: "):
            count = len(_token_ids(json.loads(line[6:])))
            if count:
                arrivals.append((time.perf_counter(), count))
    writer.close()
    return arrivals


def _request(tokens: int, number: int) -> bytes:
    body = json.dumps({
        "model": _MODEL, "prompt": [5 + number, 6], "max_tokens": tokens, "temperature": 0,
        "ignore_eos": True, "return_token_ids": True, "stream": True,
    }).encode()  # fmt: skip
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _token_ids(chunk: dict[str, Any]) -> list[int]:
    if "error" in chunk:
        raise SystemExit(f"the server ended a stream: {chunk['error']['message']}")
    return [i for choice in chunk["choices"] for i in choice.get("token_ids") or ()]


if __name__ == "__main__":
    main()
