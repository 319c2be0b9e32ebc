"""What tells whether two things are the same: fingerprints of what decides a result, hashes of files."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any


def fingerprint(**parts: Any) -> str:
    """Twelve hex digits over everything that decides a result. Values are JSON or have `model_dump(mode="json")`."""

    def plain(value: Any) -> Any:
        return value.model_dump(mode="json") if hasattr(value, "model_dump") else str(value)

    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=plain)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def sha256_of_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) of a local file, read in blocks."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
