"""Virtual environments of their own for what is compared with: pinned packages, made once, kept in the cache."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cascade.benchmarks.sources import cache_dir


def python_with(name: str, packages: Sequence[str], bare: Sequence[str] = ()) -> Path:
    """The interpreter of an environment that has exactly these packages; this one where it has the first of them.

    Whoever has put what is compared with beside Cascade wants no second copy; and so it runs without a registry.

    Args:
        name: for the folder, and of the module that is looked for, with _ for -.
        packages: pinned requirements, with what they depend on.
        bare: pinned requirements installed without their dependencies.
    """
    if importlib.util.find_spec(name.replace("-", "_")):
        return Path(sys.executable)
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
