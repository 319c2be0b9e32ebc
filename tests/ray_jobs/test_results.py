"""Reading what jobs stored, from stores whose files cannot be opened in place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cascade import store
from cascade.compression.adapter import AdapterWeights, BaseRef, LoraPair, save_peft_folder
from cascade.compression.format import save_modifier
from cascade.compression.methods import Recipe
from cascade.compression.packed import compress
from cascade.store import Store
from ray_jobs._results import read_adapter


def test_adapters_of_an_object_store_are_copied_into_the_cache_of_this_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = pafs.PyFileSystem(pafs.FSSpecHandler(MemoryFileSystem()))
    monkeypatch.setattr(store, "_resolve", lambda uri: (memory, f"{tmp_path}/bucket"))
    monkeypatch.setenv("CASCADE_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    pair = LoraPair(rng.normal(size=(4, 24)).astype(np.float32), rng.normal(size=(24, 4)).astype(np.float32))
    adapter = AdapterWeights({"model.layers.0.q_proj": pair}, 2.0, 4, BaseRef("tiny", "a" * 64), ("q_proj",), None)
    made = tmp_path / "made"
    save_peft_folder(adapter, made / "adapter")
    save_modifier(made / "modifier.safetensors", compress(adapter, Recipe()))
    bucket = Store("s3://bucket")
    bucket.upload_folder(made, "run")
    found = read_adapter(bucket, "run/adapter")
    assert isinstance(found, AdapterWeights)
    assert np.array_equal(found.layers["model.layers.0.q_proj"].a, pair.a)
    assert not isinstance(read_adapter(bucket, "run/modifier.safetensors"), AdapterWeights)
    assert len(list((tmp_path / "cache/results").iterdir())) == 2
