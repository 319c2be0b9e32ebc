"""Virtual environments of their own for what is compared with: pinned packages, made once, kept in the cache."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cascade.benchmarks.sources import cache_dir


def python_with(name: str, packages: Sequence[str], bare: Sequence[str] = ()) -> Path:
    """The interpreter of an environment that has exactly these packages.

    Args:
        name: for the folder.
        packages: pinned requirements, with what they depend on.
        bare: pinned requirements installed without their dependencies.
    """
    digest = hashlib.sha256("\n".join([*packages, "", *bare]).encode()).hexdigest()[:8]
    folder = cache_dir() / "environments" / f"{name}-{digest}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if packages:
            subprocess.run([*install, *packages], check=True)
        if bare:
            subprocess.run([*install, "--no-deps", *bare], check=True)
        (folder / "complete").touch()
    return python
