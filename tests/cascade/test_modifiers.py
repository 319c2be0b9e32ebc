"""The registry: versions that stay as they are, a current one, and names that lead nowhere else."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cascade import modifiers
from cascade.compression.adapter import AdapterWeights, BaseRef, LoraPair, fp16_bytes
from cascade.compression.methods import Prune, Recipe
from cascade.compression.packed import compress, expand
from cascade.errors import DataError, FormatError
from cascade.scoring.statistics import Score
from cascade.store import Store

SCORES = {"compressed": Score(n=200, passed=80, unparsed=2, accuracy=0.4, low=0.33, high=0.47)}


def adapter(seed: int = 0) -> AdapterWeights:
    rng = np.random.default_rng(seed)
    layers = {
        f"model.layers.{i}.self_attn.q_proj": LoraPair(
            rng.normal(size=(4, 24)).astype(np.float32), rng.normal(size=(24, 4)).astype(np.float32)
        )
        for i in range(2)
    }
    return AdapterWeights(layers, 2.0, 4, BaseRef("tiny", "a" * 64), ("q_proj",), None)


def content(seed: int = 0):
    return compress(adapter(seed), Recipe(prune=Prune(density_a=0.3, density_b=0.3), values="int4"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "out"))


def publish(store: Store, seed: int = 0, **more) -> modifiers.Modifier:
    options = {"domain": "reasoning", "scores": SCORES, "teachers": ("answer-key-small",)} | more
    return modifiers.publish(store, compressed=content(seed), fp16_size=adapter(seed), **options)


def test_publish_then_load(store: Store):
    made = publish(store)
    assert made.name == f"reasoning/{made.sha256[:12]}"
    assert (made.base, made.base_sha256, made.rank) == ("tiny", "a" * 64, 4)
    assert made.disk_bytes == os.path.getsize(store.path(made.path))
    assert made.fp16_bytes == fp16_bytes(adapter())
    assert made.resident_bytes == 2 * adapter().parameters
    assert made.ratio == made.disk_bytes / made.fp16_bytes
    assert made.teachers == ("answer-key-small",)
    assert modifiers.current(store, "reasoning") == made
    found, loaded = modifiers.load_current(store, "reasoning", base_sha256="a" * 64)
    assert found == made
    assert found.scores == SCORES
    one, other = expand(loaded), expand(content())
    assert all(np.array_equal(p.b, one.layers[n].b) for n, p in other.layers.items())


def test_publishing_again_changes_nothing(store: Store):
    first = publish(store)
    second = publish(store, 1)
    assert second.version != first.version
    assert modifiers.current(store, "reasoning") == second
    assert publish(store) == first  # its time of creation included
    assert modifiers.current(store, "reasoning") == first
    assert [m.version for m in modifiers.list_modifiers(store)] == [first.version, second.version]


def test_the_system_message_it_was_trained_under_stays_with_it(store: Store):
    made = publish(store, system="Answer briefly.")
    assert modifiers.current(store, "reasoning").system == "Answer briefly."
    with pytest.raises(DataError, match="other content"):
        publish(store, system="Answer at length.")
    assert modifiers.current(store, "reasoning") == made
    assert publish(store, 1).system is None


def test_a_candidate_can_be_published_without_being_used(store: Store):
    first = publish(store)
    second = publish(store, 1, make_current=False)
    assert modifiers.current(store, "reasoning") == first
    assert modifiers.set_current(store, "reasoning", second.version) == second
    assert modifiers.current(store, "reasoning") == second


def test_versions_never_change(store: Store):
    publish(store, version="v1")
    with pytest.raises(DataError, match="other content"):
        publish(store, 1, version="v1")
    assert modifiers.load_current(store, "reasoning")[0].version == "v1"


def test_domains_are_kept_apart(store: Store):
    publish(store)
    publish(store, 1, domain="code")
    assert modifiers.list_domains(store) == ["code", "reasoning"]
    assert [m.domain for m in modifiers.list_modifiers(store)] == ["code", "reasoning"]
    assert [m.domain for m in modifiers.list_modifiers(store, "code")] == ["code"]


def test_an_empty_store(store: Store):
    assert modifiers.list_modifiers(store) == []
    assert modifiers.current(store, "code") is None
    with pytest.raises(DataError, match="no modifier"):
        modifiers.load_current(store, "code")
    with pytest.raises(DataError, match="no modifier"):
        modifiers.set_current(store, "code", "v1")


@pytest.mark.parametrize("name", ["..", "../x", "/etc", "a/b", "", "a\\b", "A", ".", "a\0", "x" * 65, "a\n", "-a"])
def test_names_that_lead_elsewhere_are_refused(store: Store, name: str):
    calls = [
        lambda: publish(store, domain=name),
        lambda: publish(store, version=f"{name}/"),
        lambda: modifiers.current(store, name),
        lambda: modifiers.load_current(store, name),
        lambda: modifiers.list_modifiers(store, name),
        lambda: modifiers.get(store, name, "v1"),
        lambda: modifiers.get(store, "code", f"{name}\n"),
        lambda: modifiers.set_current(store, "code", f"../{name}"),
    ]
    for call in calls:
        with pytest.raises(DataError):
            call()
    assert not store.exists("")


@pytest.mark.parametrize("text", ["../../secret", "", "a/b", "/etc/passwd", "v1\nv2"])
def test_a_current_that_names_no_version_is_refused(store: Store, text: str):
    publish(store)
    store.write_bytes("modifiers/reasoning/CURRENT", text.encode())
    with pytest.raises(FormatError):
        modifiers.current(store, "reasoning")


def test_a_current_that_is_gone_or_huge(store: Store):
    made = publish(store)
    store.write_bytes("modifiers/reasoning/CURRENT", b"gone\n")
    with pytest.raises(DataError, match="no modifier reasoning/gone"):
        modifiers.current(store, "reasoning")
    store.write_bytes("modifiers/reasoning/CURRENT", b"x" * 10_000)
    with pytest.raises(FormatError, match="bytes"):
        modifiers.current(store, "reasoning")
    assert modifiers.get(store, "reasoning", made.version) == made


@pytest.mark.parametrize("what", ["folder", "file", "current"])
def test_links_out_of_the_store_are_refused(store: Store, tmp_path: Path, what: str):
    made = publish(store, version="v1")
    elsewhere = tmp_path / "elsewhere"
    target = {
        "folder": Path(store.path("modifiers/reasoning/v1")),
        "file": Path(store.path(made.path)),
        "current": Path(store.path("modifiers/reasoning/CURRENT")),
    }[what]
    target.rename(elsewhere)
    target.symlink_to(elsewhere)
    with pytest.raises(FormatError, match="out of the store"):
        modifiers.load_current(store, "reasoning")


def test_a_store_behind_a_link_is_fine(store: Store, tmp_path: Path):
    made = publish(store)
    (tmp_path / "link").symlink_to(store.uri)
    assert modifiers.load_current(Store(str(tmp_path / "link")), "reasoning")[0] == made


def test_a_swapped_damaged_or_missing_file_is_refused(store: Store):
    made, other = publish(store, version="v1"), publish(store, 1, version="v2")
    good = store.read_bytes(made.path)
    for data in (store.read_bytes(other.path), good[:-1], good + b"\0", good[:-3] + b"\0" + good[-2:]):
        store.write_bytes(made.path, data)
        with pytest.raises(FormatError):
            modifiers.load(store, made)
    store.delete(made.path)
    with pytest.raises(DataError, match="missing"):
        modifiers.load(store, made)


def test_a_wrong_base_is_refused(store: Store):
    made = publish(store)
    with pytest.raises(FormatError, match="base"):
        modifiers.load(store, made, base_sha256="c" * 64)


@pytest.mark.parametrize(
    "change",
    [{"disk_bytes": "12"}, {"sha256": "x"}, {"path": "../x"}, {"domain": "../x"}, {"version": "v2"}, {"rank": 0}],
)
def test_a_damaged_manifest_is_refused(store: Store, change: dict):
    made = publish(store, version="v1")
    path = "modifiers/reasoning/v1/manifest.json"
    store.write_json(path, store.read_json(path) | change)
    with pytest.raises(FormatError):
        modifiers.get(store, "reasoning", made.version)
    store.write_bytes(path, b"{")
    with pytest.raises(FormatError):
        modifiers.list_modifiers(store)


def test_an_unfinished_version_is_not_listed(store: Store):
    made = publish(store)
    store.write_bytes("modifiers/reasoning/half/modifier.safetensors", b"x")
    store.write_bytes("modifiers/.hidden/v1/manifest.json", b"x")
    assert modifiers.list_modifiers(store) == [made]


def test_the_manifest_is_plain_json(store: Store):
    made = publish(store)
    value = json.loads(store.read_bytes(f"modifiers/reasoning/{made.version}/manifest.json"))
    assert value["scores"]["compressed"] == {
        "n": 200,
        "passed": 80,
        "unparsed": 2,
        "accuracy": 0.4,
        "low": 0.33,
        "high": 0.47,
        "errors": 0,
    }
    assert value["recipe"]["values"] == "int4"
    assert value["teachers"] == ["answer-key-small"]


def test_readers_see_the_old_or_the_new_one_while_it_is_swapped(store: Store):
    versions = {publish(store, 0).version, publish(store, 1).version}
    done = threading.Event()

    def swap() -> None:
        for i in range(60):
            modifiers.set_current(store, "reasoning", sorted(versions)[i % 2])
        done.set()

    thread = threading.Thread(target=swap)
    thread.start()
    seen = set()
    while not done.is_set():
        found, loaded = modifiers.load_current(store, "reasoning")
        seen.add(found.version)
        assert loaded.expanded_sha256 in {content(0).expanded_sha256, content(1).expanded_sha256}
    thread.join()
    assert seen <= versions


def test_unknown_base_is_recorded_as_unknown(store: Store):
    unknown = replace(content(), base=BaseRef("somewhere", ""))
    made = modifiers.publish(store, "code", unknown, fp16_size=1000)
    assert (made.base_sha256, made.fp16_bytes) == ("", 1000)
