from __future__ import annotations

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.store import Store
from cascade.teachers import journal
from cascade.teachers.ledger import Ledger, LedgerEntry, Sent, compact, entries_of, parse_line


class ObjectStore(Store):
    """A store whose files cannot be appended to, as on S3 (over local files)."""

    @property
    def filesystem(self) -> pafs.FileSystem:
        return pafs.SubTreeFileSystem(self.uri, pafs.LocalFileSystem())

    def path(self, relative: str = "") -> str:
        return relative

    def write_bytes(self, relative: str, data: bytes) -> None:
        Path(self.uri, relative).parent.mkdir(parents=True, exist_ok=True)  # object stores have no folders
        super().write_bytes(relative, data)


@pytest.fixture(params=["files", "objects"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(str(tmp_path)) if request.param == "files" else ObjectStore(str(tmp_path))


def entry(key: str, usd: float = 0.5, **changes: object) -> LedgerEntry:
    values = {"domain": "code", "tier": 1, "task_id": f"t/{key}", "attempt": 0, "teacher": "m", "endpoint": "u"}
    return LedgerEntry(**{"key": key, "price_usd": usd, "text": f"text of {key}\n\u2028é", **values, **changes})


def test_a_row_comes_back_as_it_was(store: Store) -> None:
    ledger = Ledger(store)
    ledger.record(entry("a"))
    assert ledger.get("a") == entry("a")
    again = Ledger(store)
    assert again.get("a") == entry("a")
    assert again.get("b") is None
    assert "a" in again
    assert len(again) == 1


def test_money_is_added_up_by_tier_and_domain(store: Store) -> None:
    ledger = Ledger(store)
    for key, tier, domain in [("a", 1, "code"), ("b", 2, "code"), ("c", 1, "reasoning")]:
        ledger.record(entry(key, 1.0, tier=tier, domain=domain))
    for seen in (ledger, Ledger(store)):
        assert (seen.spent(), seen.spent(1), seen.spent(1, "code")) == (3.0, 2.0, 1.0)
    assert Ledger(store, "reasoning").spent() == 1.0


def test_an_error_is_recorded_but_answers_nothing(store: Store) -> None:
    ledger = Ledger(store)
    ledger.record(entry("a", 0.0, outcome="error", detail="500"))
    assert Ledger(store).get("a") is None
    ledger.record(entry("a", outcome="cut"))
    found = Ledger(store).get("a")
    assert found is not None
    assert found.outcome == "cut"
    assert [e.outcome for e in ledger.entries()] == ["error", "cut"]


def test_rows_of_other_writers_appear_after_refresh(store: Store) -> None:
    one, two = Ledger(store), Ledger(store)
    one.record(entry("a"))
    two.record(entry("b"))
    assert two.get("a") is None
    for ledger in (one, two):
        ledger.refresh()
        ledger.refresh()
        assert ledger.spent() == 1.0
        assert ledger.get("a") == entry("a")
        assert ledger.get("b") == entry("b")


def test_table_holds_every_row(store: Store) -> None:
    ledger = Ledger(store)
    rows = [entry("a"), entry("b", outcome="empty", text="")]
    for row in rows:
        ledger.record(row)
    assert entries_of(ledger.to_table()) == rows


async def test_rows_written_from_coroutines_are_all_there(store: Store) -> None:
    ledger = Ledger(store)
    await asyncio.gather(*(ledger.arecord(entry(str(i))) for i in range(40)))
    assert {e.key for e in Ledger(store).entries()} == {str(i) for i in range(40)}
    assert all(ledger.get(str(i)) == entry(str(i)) for i in range(40))


def test_threads_share_a_ledger(store: Store) -> None:
    ledger = Ledger(store)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: ledger.record(entry(str(i))), range(60)))
    assert Ledger(store).spent() == 30.0
    assert all(ledger.get(str(i)) == entry(str(i)) for i in range(60))


def test_it_can_be_sent_to_another_process(store: Store) -> None:
    ledger = Ledger(store, "code")
    ledger.record(entry("a"))
    assert pickle.loads(pickle.dumps(ledger)).get("a") == entry("a")


def test_a_forked_child_writes_to_a_file_of_its_own(tmp_path: Path) -> None:
    ledger = Ledger(Store(str(tmp_path)))
    ledger.record(entry("a"))
    child = os.fork()
    if child == 0:
        ledger.record(entry("b"))
        os._exit(0)
    os.waitpid(child, 0)
    ledger.record(entry("c"))
    assert len(list(tmp_path.rglob("*.jsonl"))) == 2
    assert {e.key for e in Ledger(Store(str(tmp_path))).entries()} == {"a", "b", "c"}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_torn_line_costs_that_line_alone(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    root = tmp_path_factory.mktemp("torn")
    store = Store(str(root))
    ledger = Ledger(store)
    ledger.record(entry("a"))
    ledger.record(entry("b"))
    ledger.close()
    (file,) = root.rglob("*.jsonl")
    whole = file.read_bytes()
    first = whole.index(b"\n") + 1
    cut = data.draw(st.integers(first, len(whole)))
    file.write_bytes(whole[:cut])
    resumed = Ledger(store)
    assert resumed.get("a") == entry("a")
    assert ("b" in resumed) == (cut >= len(whole) - 1)
    resumed.record(entry("c"))
    assert Ledger(store).get("c") == entry("c")
    assert resumed.get("c") == entry("c")


def test_a_line_that_is_completed_later_is_read_then(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    writer = Ledger(store)
    writer.record(entry("a"))
    (file,) = tmp_path.rglob("*.jsonl")
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    reader = Ledger(store)
    assert "a" not in reader
    file.write_bytes(whole)
    reader.refresh()
    assert reader.get("a") == entry("a")
    assert reader.spent() == 0.5


def test_garbage_in_the_middle_is_passed_over(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    Ledger(store).record(entry("a"))
    (file,) = tmp_path.rglob("*.jsonl")
    file.write_bytes(b"\0\0\0{\n" + file.read_bytes() + b'["no row"]\n')
    assert Ledger(store).get("a") == entry("a")


def test_a_failed_write_does_not_spoil_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(Store(str(tmp_path)))
    ledger.record(entry("a"))
    (writer,) = ledger._journals.values()

    class FullDisk:
        def write(self, line: memoryview) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_file", FullDisk())
    with pytest.raises(OSError, match="No space"):
        ledger.record(entry("b"))
    ledger.record(entry("c"))
    assert {e.key for e in Ledger(Store(str(tmp_path))).entries()} == {"a", "c"}


def sent(key: str, usd: float = 2.0, batch: str = "") -> Sent:
    return Sent(key, "code", 1, usd, batch)


def test_what_was_sent_and_never_came_back_may_have_been_paid(store: Store) -> None:
    ledger = Ledger(store)
    for key in ("a", "b"):
        ledger.record(sent(key))
    assert ledger.unsettled == 2
    ledger.record(entry("a", 0.5))
    ledger.record(entry("c", 0.25, unsure_usd=0.5, outcome="error"))
    for seen in (ledger, Ledger(store)):
        assert (seen.spent(), seen.spent_at_most(), seen.unsettled) == (0.75, 0.75 + 0.5 + 2.0, 1)
        assert seen.spent_at_most(2) == 0
    Ledger(store).record(entry("b"))  # another writer's request of that key is another request
    assert Ledger(store).unsettled == 1


def test_a_batch_may_be_fetched_by_another_writer_than_sent_it(store: Store) -> None:
    for order in (("sender", "fetcher"), ("fetcher", "sender")):
        names = {"sender": sent("a", batch="b1"), "fetcher": entry("a", batch="b1")}
        for name in order:
            Ledger(store).record(names[name])
    assert Ledger(store).unsettled == 0


def test_objects_are_put_together_and_nothing_is_lost_or_counted_twice(tmp_path: Path) -> None:
    store = ObjectStore(str(tmp_path))
    early, writer = Ledger(store), Ledger(store)
    rows = [entry(str(i), outcome="error" if i % 5 == 4 else "answered") for i in range(30)]
    for row in rows[:10]:
        writer.record(row)
    early.refresh()
    for row in rows[10:20]:
        writer.record(row)
    assert compact(store, "code", at_least=64) == 0
    assert compact(store, "code", at_least=5) == 20
    for row in rows[20:]:
        writer.record(row)
    assert compact(store, "code", at_least=5) == 11
    assert len(list(tmp_path.rglob("*.json"))) == 1
    early.refresh()
    for seen in (early, writer, Ledger(store)):
        assert seen.spent() == pytest.approx(15)
        assert [seen.get(r.key) for r in rows] == [r if r.responded else None for r in rows]
    assert sorted(e.key for e in writer.entries()) == sorted(r.key for r in rows)


def test_two_who_compact_at_once_count_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectStore(str(tmp_path))
    writer = Ledger(store)
    for i in range(6):
        writer.record(entry(str(i)))
    with monkeypatch.context() as first:  # one is killed before it deletes, another begins anew
        first.setattr(ObjectStore, "delete", lambda self, name: None)
        compact(store, "code", at_least=2)
    assert Ledger(store).spent() == 3.0
    compact(store, "code", at_least=2)
    assert Ledger(store).spent() == 3.0
    assert len(list(Ledger(store).entries())) == 6


def test_rows_that_are_compacted_while_they_are_read_are_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ObjectStore(str(tmp_path))
    writer = Ledger(store)
    for i in range(6):
        writer.record(entry(str(i)))
    reading = Ledger(store).entries()
    first = next(reading)
    assert compact(store, "code", at_least=2) == 6
    assert sorted([first.key, *(e.key for e in reading)]) == [str(i) for i in range(6)]


def test_what_is_compacted_between_listing_and_reading_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ObjectStore(str(tmp_path))
    writer, listed = Ledger(store), journal.list_names
    for i in range(6):
        writer.record(entry(str(i)))

    def compacted_meanwhile(*where: Any) -> list[str]:
        names = listed(*where)
        monkeypatch.setattr(journal, "list_names", listed)
        assert compact(store, "code", at_least=2) == 6
        return names

    monkeypatch.setattr(journal, "list_names", compacted_meanwhile)
    found = Ledger(store)
    assert (len(found), found.spent()) == (6, 3.0)


def test_who_asks_does_not_wait_for_a_refresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectStore(str(tmp_path))
    writer, asking = Ledger(store), Ledger(store)
    asking.record(entry("mine"))
    writer.record(entry("theirs"))
    reads, asked = threading.Event(), threading.Event()
    read = journal.read_if_there

    def slow(*what: Any) -> bytes | None:
        reads.set()
        assert asked.wait(60)
        return read(*what)

    monkeypatch.setattr(journal, "read_if_there", slow)
    refreshing = threading.Thread(target=asking.refresh)
    refreshing.start()
    assert reads.wait(60)
    assert asking.get("mine") is not None
    asking.record(entry("another"))
    asked.set()
    refreshing.join()
    assert (len(asking), asking.spent()) == (3, 1.5)


def test_fields_of_a_later_version_are_passed_over() -> None:
    line = b'{"key":"a","domain":"d","tier":1,"task_id":"t","attempt":0,"teacher":"m","endpoint":"u","judge":"x"}'
    row = parse_line(line)
    assert row is not None
    assert row.key == "a"
    assert parse_line(line[:-1]) is None


_WRITER = """
import sys
from cascade.store import Store
from cascade.teachers.ledger import Ledger, LedgerEntry
ledger = Ledger(Store(sys.argv[1]))
for i in range(100_000):
    ledger.record(LedgerEntry(str(i), "code", 1, "t", 0, "m", "u", text="x" * 5000, price_usd=1.0))
    print(i, flush=True)
"""


@pytest.mark.parametrize("after", [1, 23])
def test_what_was_recorded_before_kill_9_is_there(tmp_path: Path, after: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= after:
            process.send_signal(signal.SIGKILL)
            break
    told = [after, *(int(line) for line in process.stdout)]
    process.wait()
    watchdog.cancel()
    ledger = Ledger(Store(str(tmp_path)))
    assert all(str(i) in ledger for i in range(max(told) + 1))
    assert ledger.spent() <= max(told) + 2
