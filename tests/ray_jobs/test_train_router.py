"""What the router is trained on."""

from __future__ import annotations

from pathlib import Path

from stand_in import SYSTEM, build_stand_in, compressed_adapter

from cascade import modifiers
from cascade.models.files import base_sha256
from ray_jobs.train_router import assignments_as_served


def test_every_modifier_is_asked_under_its_own_system_message(tmp_path: Path) -> None:
    stand_in = build_stand_in(tmp_path)
    fits = base_sha256(stand_in.config.base)
    other = compressed_adapter(tmp_path / "base", seed=9)
    modifiers.publish(stand_in.store, "other", other, fp16_size=10_000, system="Be exact.")
    found = assignments_as_served(stand_in.store, fits, [])
    assert {a.name: a.style.system for a in found} == {
        "base": None,
        "letters": SYSTEM,
        "other": "Be exact.",
        "sums": None,
    }
    assert [a.name for a in assignments_as_served(stand_in.store, "0" * 64, [])] == ["base"]
