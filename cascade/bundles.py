"""Opening the folder that `cascade.system.bundle` packs."""

from __future__ import annotations

import json
import re
from pathlib import Path

from cascade.config import Config, load_config
from cascade.errors import DataError
from cascade.fingerprints import sha256_of_file

BUNDLE_MANIFEST = "bundle.json"
BUNDLE_CONFIG = "serve.yaml"
_WRITTEN_BY_SERVING = re.compile(
    r"storage/(keys\.json(\.lock)?|feedback/(open|tasks)/[^/]+\.jsonl?|modifiers/[a-z0-9_-]+/CANARY)"
    r"(\.[0-9a-f]{32}\.tmp)?"
)
"""Files that keys, log and canaries leave in a bundle that is served: nothing that is computed with.

What ends in .tmp is of a process that was killed as it wrote."""


def open_bundle(folder: Path) -> Config:
    """The config of a bundle, every file checked against its hash.

    What serving itself writes (keys, the log, a canary's share) may be there besides.

    Raises:
        DataError: it is no bundle, or files are missing, changed or added.
        ConfigError: its config is damaged.
    """
    try:
        said = json.loads((folder / BUNDLE_MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is no bundle: {error}") from None
    found = {str(f.relative_to(folder)): f for f in folder.rglob("*") if not f.is_dir() and f.name != BUNDLE_MANIFEST}
    files = {name: f for name, f in found.items() if name in said or not _WRITTEN_BY_SERVING.fullmatch(name)}
    wrong = sorted(set(said) ^ set(files)) or [n for n, f in files.items() if sha256_of_file(f) != said[n]]
    if wrong:
        raise DataError(f"{folder} is not the bundle that was packed: {', '.join(wrong[:5])}")
    config = load_config(folder / BUNDLE_CONFIG)
    base = config.base.model_copy(update={"model": str((folder / "base").absolute())})
    return config.model_copy(update={"base": base, "storage": str((folder / "storage").absolute())})
