"""What the pipeline refuses before any of its jobs begins."""

from __future__ import annotations

import pytest
import yaml

from cascade.config import load_config
from cascade.errors import ConfigError
from ray_jobs.pipeline import run_pipeline


def test_a_modifier_that_could_not_be_compressed_is_refused_before_anything_is_paid(tmp_path):
    with open("configs/quickstart.yaml") as file:
        config = yaml.safe_load(file)
    config |= {"storage": str(tmp_path / "out"), "training": config["training"] | {"lora": {"dora": True}}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=r"training\.lora\.dora: a DoRA modifier is more than B A"):
        run_pipeline(load_config(path), str(path))
    assert not (tmp_path / "out").exists()
