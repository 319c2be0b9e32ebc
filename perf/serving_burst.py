"""Requests that come all at once, from a process that does little more than send and read them.

    python perf/serving_burst.py HOST PORT < REQUESTS

Reads a JSON list of bodies for /v1/chat/completions; prints a JSON list of [status, seconds], in their order: from
before it connects until the answer is whole. 64 requests through one process of httpx cost it more than 50 ms beyond
that, which would count as the server's.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time


async def one(host: str, port: int, request: bytes) -> tuple[int, float]:
    """Status, and seconds until the server has closed the connection."""
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(request)
    answer = await reader.read()
    seconds = time.perf_counter() - start
    writer.close()
    return int(answer.split(b" ", 2)[1]) if answer else -1, seconds


def as_request(body: object) -> bytes:
    content = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1", "host: cascade", "content-type: application/json", "connection: close"
    return "\r\n".join([*head, f"content-length: {len(content)}", "", ""]).encode() + content


async def main() -> None:
    host, port = sys.argv[1], int(sys.argv[2])
    requests = [as_request(body) for body in json.load(sys.stdin)]
    print(json.dumps(await asyncio.gather(*(one(host, port, r) for r in requests))))


if __name__ == "__main__":
    asyncio.run(main())
