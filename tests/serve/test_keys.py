"""Keys: who is let in, above all when the storage does not say so, or says so late."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from cascade.errors import DataError
from cascade.store import Store
from serve.errors import ApiError
from serve.keys import FILE, KeyRing, add_key, main, read_keys, revoke_key


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path))


def refused(ring: KeyRing, key: str | None = None) -> bool:
    try:
        ring.admit(key and f"Bearer {key}")
    except ApiError as error:
        return error.status == 401
    return False


def test_a_storage_that_never_had_a_key_is_open(store) -> None:
    assert read_keys(store) is None
    assert KeyRing(store).admit(None) == ""


def test_a_limit_that_lets_nobody_in_is_none(store) -> None:
    with pytest.raises(DataError, match="once a minute"):
        add_key(store, "me", requests_per_minute=0)
    assert read_keys(store) is None


@pytest.mark.parametrize("words", [["list"], ["add", "me"], ["revoke", "me"]])
def test_a_file_in_the_place_of_the_storage_is_told_in_a_line(words, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["serve.keys", str(tmp_path / "file"), *words])
    assert main() == 2
    assert f"error: {tmp_path / 'file'} cannot be used as a storage: " in capsys.readouterr().err


def test_the_scheme_may_be_written_in_any_case(store) -> None:
    key = add_key(store, "me")
    ring = KeyRing(store)
    for header in (f"Bearer {key}", f"bearer {key}", f"BEARER  {key}"):
        assert ring.admit(header) == "me"
    with pytest.raises(ApiError):
        ring.admit(f"Basic {key}")


def test_with_its_last_key_revoked_a_storage_is_closed(store) -> None:
    key = add_key(store, "me")
    ring = KeyRing(store)
    assert ring.admit(f"Bearer {key}") == "me"
    revoke_key(store, "me")
    ring.refresh()
    assert refused(ring)
    assert refused(ring, key)
    assert refused(KeyRing(store))  # after a restart too


def test_keys_that_are_gone_or_damaged_open_nothing(store, monkeypatch) -> None:
    key = add_key(store, "me")
    ring = KeyRing(store)
    looked, look = threading.Semaphore(0), ring.refresh

    def noted() -> None:
        try:
            look()
        finally:
            looked.release()

    monkeypatch.setattr(ring, "refresh", noted)
    ring.watch(every_s=0.01)
    for damage in (lambda: store.delete(FILE), lambda: store.write_bytes(FILE, b"[{")):
        damage()
        while looked.acquire(blocking=False):
            pass  # begun before the damage
        for _ in range(2):  # the first of them may have begun before too
            assert looked.acquire(timeout=120)
        assert refused(ring)
        assert ring.admit(f"Bearer {key}") == "me"
    ring.close()


def test_a_slow_storage_holds_nobody_up(store, monkeypatch) -> None:
    key = add_key(store, "me")
    ring = KeyRing(store)
    read, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def slowly(*_: object) -> None:
        read.set()
        go_on.wait(120)
        ended.set()

    monkeypatch.setattr("serve.keys.read_keys", slowly)
    ring.watch(every_s=0.01)
    assert read.wait(60)
    ring.close()
    assert ring.admit(f"Bearer {key}") == "me"
    assert not ended.is_set()
    go_on.set()


def test_a_new_key_is_let_in_while_the_server_runs(store) -> None:
    ring = KeyRing(store)
    ring.watch(every_s=0.01)
    key = add_key(store, "me")
    end = time.monotonic() + 60
    while not refused(ring) and time.monotonic() < end:
        time.sleep(0.01)
    ring.close()
    assert ring.admit(f"Bearer {key}") == "me"


def test_keys_made_at_the_same_time_are_all_kept(store) -> None:
    threads = [threading.Thread(target=add_key, args=(store, f"key{i}")) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {k.name for k in read_keys(store)} == {f"key{i}" for i in range(12)}


def test_in_an_object_store_a_change_by_somebody_else_is_noticed(store, monkeypatch) -> None:
    add_key(store, "me")
    monkeypatch.setattr(Store, "is_local", False)  # which knows no locks
    write = Store.write_bytes

    def and_lose_it(self: Store, path: str, data: bytes) -> None:
        write(self, path, b"[]")

    monkeypatch.setattr(Store, "write_bytes", and_lose_it)
    with pytest.raises(DataError, match="somebody else"):
        add_key(store, "you")
