"""The bill of a system, and the folder that it is packed into."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from stand_in import StandIn, build_stand_in, compressed_adapter
from typer.testing import CliRunner

from cascade import modifiers
from cascade.bundles import open_bundle
from cascade.config import Serving
from cascade.errors import ConfigError, DataError, FormatError
from cascade.models.base import load_base
from cascade.models.files import base_sha256
from cascade.routing.model import RouterModel, current_report, load_current
from cascade.store import Store
from cascade.system import bill, bundle
from ray_jobs.cli import app


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    return build_stand_in(tmp_path_factory.mktemp("system"))


def test_the_bill_is_that_of_the_files(stand_in: StandIn, tmp_path: Path) -> None:
    found = bill(stand_in.config, tmp_path)
    assert [(i.kind, i.name) for i in found.items] == [
        ("base", stand_in.config.base.model),
        ("modifier", "letters"),
        ("modifier", "sums"),
        ("router", "router"),
    ]
    base, letters, sums, router = found.items
    weights = Path(stand_in.config.base.model) / "model.safetensors"
    assert base.disk_bytes == weights.stat().st_size
    assert base.disk_bytes - 20_000 < base.resident_bytes < base.disk_bytes  # the header is not resident
    current = modifiers.current(stand_in.store, "letters")
    assert (letters.disk_bytes, letters.sha256) == (current.disk_bytes, current.sha256)
    assert letters.resident_bytes == 2 * current.resident_bytes  # float32, as the config says
    assert found.disk_bytes == sum(i.disk_bytes for i in found.items)
    assert found.resident_bytes == base.resident_bytes + sums.resident_bytes + router.resident_bytes


def test_the_bill_of_a_base_in_8_bits_is_what_is_loaded(stand_in: StandIn, tmp_path: Path) -> None:
    base = stand_in.config.base.model_copy(update={"dtype": "bfloat16"})
    sizes = {}
    for weights in ("full", "int8"):
        config = stand_in.config.model_copy(update={"base": base, "serving": Serving(weights=weights)})
        found = bill(config, tmp_path).items[0]
        loaded = load_base(base, torch.device("cpu"), weights)
        sizes[weights] = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
        assert found.resident_bytes == sizes[weights]
        assert found.sha256 == loaded.sha256
    assert sizes["int8"] < 0.55 * sizes["full"]


@pytest.mark.parametrize(("allowed", "held"), [(1, 1), (2, 2), (5, 2)])
def test_the_bill_counts_the_modifiers_that_are_in_memory_together(
    stand_in: StandIn, tmp_path: Path, allowed: int, held: int
) -> None:
    config = stand_in.config.model_copy(update={"serving": Serving(max_loaded_modifiers=allowed)})
    base, letters, sums, router = (i.resident_bytes for i in bill(config, tmp_path).items)
    assert bill(config, tmp_path).resident_bytes == base + held * max(letters, sums) + router


def test_without_modifiers_there_is_no_bill(stand_in: StandIn, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run the pipeline first"):
        bill(stand_in.config.model_copy(update={"storage": str(tmp_path)}), tmp_path)


def test_a_damaged_router_is_not_packed(stand_in: StandIn, tmp_path: Path) -> None:
    shutil.copytree(stand_in.store.path(), tmp_path / "store")
    config = stand_in.config.model_copy(update={"storage": str(tmp_path / "store")})
    (weights,) = (tmp_path / "store" / "router").glob("*/router.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(FormatError, match="damaged"):
        bundle(config, tmp_path / "packed", tmp_path)
    shutil.rmtree(weights.parent)
    with pytest.raises(FormatError, match="cannot be read"):
        bundle(config, tmp_path / "packed", tmp_path)
    assert not (tmp_path / "packed").exists()


def test_a_bundle_is_the_whole_system(stand_in: StandIn, tmp_path: Path) -> None:
    folder = bundle(stand_in.config, tmp_path / "packed", tmp_path)
    moved = folder.rename(tmp_path / "moved")
    config = open_bundle(moved)
    assert base_sha256(config.base) == base_sha256(stand_in.config.base)
    for domain in ("letters", "sums"):
        packed, content = modifiers.load_current(Store(config.storage), domain)
        assert packed == modifiers.current(stand_in.store, domain)
        assert content.parameters > 0
    assert load_current(Store(config.storage), tmp_path)[0] == load_current(stand_in.store, tmp_path)[0]
    manifest = json.loads((moved / "bundle.json").read_text())
    assert manifest["disk_bytes"] == bill(stand_in.config, tmp_path).disk_bytes
    with pytest.raises(DataError, match="not empty"):
        bundle(stand_in.config, moved, tmp_path)
    (moved / "base" / "config.json").write_text("{}")
    with pytest.raises(DataError, match=r"not the bundle that was packed: base/config\.json"):
        open_bundle(moved)
    with pytest.raises(DataError, match="no bundle"):
        open_bundle(tmp_path)


def test_a_bundle_is_served_again_with_what_serving_wrote(stand_in: StandIn, tmp_path: Path) -> None:
    folder = bundle(stand_in.config, tmp_path / "packed", tmp_path)
    store = Store(open_bundle(folder).storage)
    for name in ("keys.json", "keys.json.lock", "feedback/open/me~r1.json", "feedback/tasks/train-r2.jsonl"):
        store.write_bytes(f"{name}.{'1f' * 16}.tmp", b"[")  # of a process that was killed
        store.write_bytes(name, b"[]")
    modifiers.set_canary(store, "letters", modifiers.current(store, "letters").version, 0.5)
    open_bundle(folder)
    added = ("modifiers/letters/evil/modifier.safetensors", "modifiers/evil/CURRENT", "router/evil.pkl", "keys.json.py")
    for name in (*added, "feedback/open/x/y.json", "modifiers/letters/x/CANARY"):
        store.write_bytes(name, b"x")
        with pytest.raises(DataError, match=f"not the bundle that was packed: storage/{name}"):
            open_bundle(folder)
        Path(store.path(name)).unlink()
    link = Path(store.path("modifiers/letters/elsewhere"))
    link.symlink_to("/nowhere")
    with pytest.raises(DataError, match="not the bundle that was packed"):
        open_bundle(folder)
    link.unlink()
    store.write_bytes("modifiers/letters/CURRENT", b"other\n")
    with pytest.raises(DataError, match="CURRENT"):
        open_bundle(folder)


def test_the_threshold_is_shown_and_set(tmp_path: Path) -> None:
    mine = build_stand_in(tmp_path)
    shown = CliRunner().invoke(app, ["tune-router", str(mine.config_path)])
    assert shown.exit_code == 0, shown.output
    assert "oracle" in shown.output
    curve = current_report(mine.store)["curve"]
    assert [p["threshold"] for p in curve][:3] == [0.0, 0.05, 0.1]
    shares = [p["modifier_share"] for p in curve]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.8 > 0.1 > shares[-1]
    before = load_current(mine.store, tmp_path)
    done = CliRunner().invoke(app, ["tune-router", str(mine.config_path), "--threshold", "0.9"])
    assert done.exit_code == 0, done.output
    version, model = load_current(mine.store, tmp_path)
    assert version != before[0]
    assert isinstance(model, RouterModel)
    assert (before[1].threshold, model.threshold) == (0.8, 0.9)
    assert CliRunner().invoke(app, ["tune-router", str(mine.config_path), "--threshold", "2"]).exit_code != 0


def test_a_version_is_tried_on_a_share_of_the_requests_and_promoted(tmp_path: Path) -> None:
    mine = build_stand_in(tmp_path)
    old = modifiers.current(mine.store, "letters").version
    new = modifiers.publish(
        mine.store, "letters", compressed_adapter(tmp_path / "base", 5), fp16_size=10_000, make_current=False
    ).version

    def shares(*arguments: str) -> dict[str, str]:
        done = CliRunner().invoke(app, ["canary", str(mine.config_path), *arguments])
        assert done.exit_code == 0, done.output
        rows = [line.split() for line in done.output.replace("│", " ").splitlines() if "%" in line]
        return {row[0]: row[-1] for row in rows}

    assert shares() == {old: "100%", new: "0%"}
    assert shares(new, "--weight", "0.1") == {old: "90%", new: "10%"}
    assert modifiers.canary(mine.store, "letters") == modifiers.Canary(version=new, share=0.1)
    assert modifiers.canary(mine.store, "sums") is None
    assert shares(new, "--weight", "0") == {old: "100%", new: "0%"}
    assert modifiers.canary(mine.store, "letters") is None
    shares(new, "--weight", "1")
    assert shares(new, "--promote") == {old: "0%", new: "100%"}
    assert modifiers.current(mine.store, "letters").version == new
    assert modifiers.canary(mine.store, "letters") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nobody", "--weight", "0.1"], "no modifier letters/nobody"),
        (["nobody", "--promote"], "no modifier letters/nobody"),
        (["../sums", "--weight", "0.1"], "no name for a version"),
        (["nobody"], "--weight or --promote"),
        (["--weight", "0.1"], "--weight or --promote"),
        (["nobody", "--weight", "0.1", "--promote"], "--weight or --promote"),
    ],
)
def test_canaries_that_cannot_be_are_refused(stand_in: StandIn, arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["canary", str(stand_in.config_path), *arguments])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert modifiers.canary(stand_in.store, "letters") is None


def test_a_share_beyond_all_requests_is_refused(tmp_path: Path) -> None:
    mine = build_stand_in(tmp_path)
    version = modifiers.current(mine.store, "letters").version
    for weight in ("1.5", "-0.1", "nan"):
        done = CliRunner().invoke(app, ["canary", str(mine.config_path), version, "--weight", weight])
        assert done.exit_code == 2
        assert "between 0 and 1" in done.output
    assert modifiers.canary(mine.store, "letters") is None


def test_the_bill_is_printed(stand_in: StandIn) -> None:
    shown = CliRunner().invoke(app, ["system", str(stand_in.config_path)])
    assert shown.exit_code == 0, shown.output
    assert "letters" in shown.output
    assert "resident" in shown.output
