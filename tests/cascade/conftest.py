"""A tiny random base, loaded as any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stand_in import save_tiny_base

from cascade.config import Base
from cascade.models.base import LoadedBase, load_base


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tiny-base")
    save_tiny_base(folder)
    return folder


@pytest.fixture(scope="session")
def loaded(tiny_folder: Path) -> LoadedBase:
    return load_base(Base(model=str(tiny_folder), dtype="float32"), torch.device("cpu"))
