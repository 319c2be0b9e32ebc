"""What is followed in the store: bad versions, mended ones, and a store that is away."""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from stand_in import DOMAINS, SUMS_QUESTION, StandIn, compressed_adapter

from cascade import modifiers
from cascade.errors import FormatError
from cascade.modifiers import Modifier
from cascade.store import Store
from cascade.tasks import Message
from serve import live
from serve.live import LiveModifiers, LiveRouter


@pytest.fixture
def mine(stand_in: StandIn, tmp_path: Path) -> StandIn:
    """A stand-in with a store of its own, to be spoilt."""
    shutil.copytree(stand_in.store.path(), tmp_path / "store")
    return replace(stand_in, store=Store(str(tmp_path / "store")))


def publish(mine: StandIn, seed: int, *, damaged: bool = False, system: str | None = None) -> Modifier:
    content = compressed_adapter(Path(mine.config.base.model), seed)
    made = modifiers.publish(mine.store, "letters", content, fp16_size=10_000, system=system)
    if damaged:
        file = Path(mine.store.path(made.path))
        file.with_suffix(".whole").write_bytes(file.read_bytes())
        file.write_bytes(b"x" + file.read_bytes()[1:])
    return made


def checked(mine: StandIn) -> LiveModifiers:
    return LiveModifiers(mine.store, partial(modifiers.check_file, mine.store))


def test_what_only_looks_refuses_what_the_engine_refuses(mine: StandIn) -> None:
    """So that the gateway's lists and headers do not name a version that nobody is answered by."""
    found = checked(mine)
    before = found.versions()["letters"]
    publish(mine, 77, damaged=True)
    found.refresh()
    assert found.versions()["letters"] == before


def test_modifiers_of_another_base_are_refused_by_what_only_looks(mine: StandIn) -> None:
    [fits] = {made.base_sha256 for made in modifiers.list_modifiers(mine.store)}
    for sha256, domains in ((fits, set(DOMAINS)), ("c" * 64, set())):
        found = LiveModifiers(mine.store, partial(modifiers.check_file, mine.store, base_sha256=sha256))
        assert set(found.versions()) == domains


def test_a_new_replica_takes_the_newest_older_version_where_the_current_is_bad(mine) -> None:
    older = publish(mine, 77)
    bad = publish(mine, 78, damaged=True)
    assert checked(mine).versions()["letters"] == older.version
    Path(mine.store.path("modifiers/letters/CURRENT")).write_text("../x\n")
    assert checked(mine).versions()["letters"] == older.version
    Path(mine.store.path(f"modifiers/letters/{bad.version}/manifest.json")).write_text("{")
    assert checked(mine).versions()["letters"] == older.version


def test_what_goes_wrong_with_one_version_keeps_no_other_from_going_live(mine) -> None:
    def opens(modifier: Modifier) -> None:
        if modifier.version == bad.version:
            raise OSError("no space left on device")

    before = modifiers.current(mine.store, "letters")
    bad = publish(mine, 77)
    content = compressed_adapter(Path(mine.config.base.model), 78)
    good = modifiers.publish(mine.store, "sums", content, fp16_size=10_000)
    assert LiveModifiers(mine.store, opens).versions() == {"letters": before.version, "sums": good.version}


def test_a_mended_file_is_taken_without_a_restart(mine, monkeypatch) -> None:
    found = checked(mine)
    bad = publish(mine, 77, damaged=True)
    found.refresh()
    file = Path(mine.store.path(bad.path))
    file.write_bytes(file.with_suffix(".whole").read_bytes())
    found.refresh()
    assert found.versions()["letters"] != bad.version  # not tried again at once
    monkeypatch.setattr(live.time, "monotonic", lambda: time.perf_counter() + 10 * live._RETRY_S)
    found.refresh()
    assert found.versions()["letters"] == bad.version


def test_a_version_that_is_named_is_found_whichever_variant_it_is(mine) -> None:
    old = modifiers.current(mine.store, "letters")
    new = publish(mine, 77)
    modifiers.set_current(mine.store, "letters", old.version)
    modifiers.set_canary(mine.store, "letters", new.version, 0.5)
    found = LiveModifiers(mine.store)
    for version in (old.version, new.version):
        assert found.get("letters", "current", version).modifier.version == version
        assert found.get("letters", "canary", version).modifier.version == version
    assert found.get("letters", "canary", "gone").modifier.version == new.version
    assert found.get("letters", "current", "gone").modifier.version == old.version
    assert found.get("nobody", "current", old.version) is None


def test_a_conversation_is_introduced_as_its_version_learned_it(mine) -> None:
    publish(mine, 77, system="Answer in verse.")
    found = LiveModifiers(mine.store).get("letters")
    asked = [Message("user", "hi")]
    assert found.introduce(asked) == [Message("system", "Answer in verse."), *asked]
    own = [Message("system", "Mine."), *asked]
    assert found.introduce(own) == own


@pytest.mark.parametrize(
    "trouble", [OSError("the store is away"), FormatError("damaged"), UnicodeDecodeError("utf-8", b"\x80", 0, 1, "no")]
)
def test_a_router_stays_in_use_while_the_store_is_away(mine, tmp_path, monkeypatch, trouble: Exception) -> None:
    router = LiveRouter(mine.store, tmp_path)
    asked = [Message("user", SUMS_QUESTION)]
    before = router.route(asked, {"sums": "1"}, None)
    assert before.choice == "sums"

    def fail(*_: object) -> None:
        raise trouble

    for name in ("current_version", "load_current"):
        with monkeypatch.context() as patched:
            patched.setattr(live.routers, name, fail)
            router.refresh()
        assert router.route(asked, {"sums": "1"}, None) == before


def test_a_store_that_hangs_holds_no_route_up(mine, tmp_path, monkeypatch) -> None:
    router = LiveRouter(mine.store, tmp_path)
    asked, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        asked.set()
        go_on.wait(120)
        ended.set()

    monkeypatch.setattr(live.routers, "current_version", hang)
    router.watch(every_s=0.01)
    assert asked.wait(60)
    router.close()
    router.route([Message("user", SUMS_QUESTION)], {"sums": "1"}, None)
    assert not ended.is_set()
    go_on.set()


def test_a_new_router_is_taken_and_a_bad_one_is_not(mine, tmp_path) -> None:
    router = LiveRouter(mine.store, tmp_path)
    before = router._model
    mine.store.write_bytes("router/CURRENT", b"\x80../nothing\n")
    router.refresh()
    assert router._model is before
    version = live.routers.publish(mine.store, before, {})
    router.refresh()
    assert router._version == version
