"""A watchdog as clusters have one: asks /health every 50 ms, in a process of its own, until its input ends.

    python perf/serving_health.py HOST PORT

Prints a JSON list: the seconds that each answer took. Ends with an error at the first that is not 200.
"""

from __future__ import annotations

import http.client
import json
import select
import sys
import time

host, port = sys.argv[1:]
connection = http.client.HTTPConnection(host, int(port), timeout=60)
took = []
while not select.select([sys.stdin], [], [], 0.05)[0]:
    start = time.perf_counter()
    connection.request("GET", "/health")
    response = connection.getresponse()
    response.read()
    took.append(time.perf_counter() - start)
    if response.status != 200:
        sys.exit(f"/health answered {response.status}")
print(json.dumps(took))
