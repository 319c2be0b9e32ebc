"""Schemathesis, in an environment of its own, against a served OpenAPI document."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from own_environment import python_with

PACKAGES = ("schemathesis==4.32.5",)


def attack(url: str, examples: int, seconds: int) -> dict[str, Any]:
    """Ask each operation valid and broken requests made from its schema; any answer with a 5xx fails.

    Returns:
        Schemathesis's report: `test_cases` and `operations` hold counts, `failures` what failed.
    """
    command = [str(python_with("schemathesis", PACKAGES).parent / "schemathesis"), "run", f"{url}/openapi.json"]
    command += ["--checks", "not_a_server_error", "--phases", "examples,coverage,fuzzing", "--mode", "all"]
    command += ["--max-examples", str(examples), "--max-time", str(seconds), "--seed", "1", "--continue-on-failure"]
    command += ["--request-timeout", "120", "--no-color"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        done = subprocess.run([*command, "--report-json-path", str(report)], cwd=folder, capture_output=True, text=True)
        if not report.exists():
            raise RuntimeError(f"schemathesis made no report:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found
