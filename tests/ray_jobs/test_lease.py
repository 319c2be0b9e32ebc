"""One driver per run where the storage has no file locks."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cascade.artifacts import Run, open_run
from cascade.errors import CascadeError
from cascade.store import Store
from ray_jobs._context import run_job, sole_driver
from ray_jobs._lease import BEAT_S, LEASE, SETTLE_S, TERM_S, Holder, Lease


@pytest.fixture
def run() -> Run:
    """A run in a storage in memory, which has no path."""
    run = open_run(Store(f"mock:///{uuid.uuid4().hex}"), "reasoning", "generate_tier1", seed=1)
    run.store.filesystem.create_dir(run.store.path(run.folder), recursive=True)
    assert not run.store.is_local
    return run


class Time:
    """A clock that only moves when somebody waits. `meanwhile` happens in each wait."""

    def __init__(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.now, self.meanwhile = 1000.0, meanwhile

    def pause(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()

    def lease(self, run: Run) -> Lease:
        return Lease(run, clock=lambda: self.now, pause=self.pause)

    @property
    def waited(self) -> float:
        return self.now - 1000


def standing(run: Run) -> dict[str, Any] | None:
    path = f"{run.folder}/{LEASE}"
    return run.store.read_json(path) if run.store.exists(path) else None


def put(run: Run, **said: Any) -> Holder:
    """The lease of a process of another machine."""
    holder = replace(Holder.here(), host="node-7", machine="another", pid=77, **said)
    run.store.write_json(f"{run.folder}/{LEASE}", asdict(holder))
    return holder


def test_a_lease_is_had_at_once_and_is_gone_at_the_end_however_that_comes(run: Run) -> None:
    times = Time()
    first, second = times.lease(run), times.lease(run)
    with first.held() as held:
        assert standing(run) == asdict(first.mine)
        assert held()
    assert standing(run) is None
    with pytest.raises(ValueError, match="teacher"), second.held():
        raise ValueError("teacher")
    assert standing(run) is None
    assert times.waited == pytest.approx(2 * SETTLE_S)


def test_who_renews_keeps_others_out_and_they_are_told_who_it_is(run: Run) -> None:
    first = Lease(run)
    first.mine = replace(first.mine, host="node-7", machine="another", pid=77, since=0)
    first.take()
    times = Time(meanwhile=first.renew)
    said = rf"doing {run.name}, process 77 of node-7, since 1970-01-01 00:00:00 UTC.*wait until it has ended, or end it"
    with pytest.raises(CascadeError, match=said), times.lease(run).held():
        pytest.fail("two at work")
    assert times.waited <= BEAT_S
    assert standing(run) == asdict(first.mine)
    first.renew()
    assert first.check()


@pytest.mark.parametrize(
    ("silent_s", "wait_s"),
    [(0, TERM_S + BEAT_S), (50, TERM_S + BEAT_S - 50), (3600, 2 * BEAT_S), (-3600, TERM_S + BEAT_S)],
    ids=["just killed", "killed 50 s ago", "killed an hour ago", "its clock is an hour ahead"],
)
def test_whoever_is_silent_for_the_term_is_followed_and_that_is_said(
    run: Run, caplog: pytest.LogCaptureFixture, silent_s: float, wait_s: float
) -> None:
    put(run, beat=time.time() - silent_s)
    times = Time()
    lease = times.lease(run)
    with lease.held():
        assert standing(run) == asdict(lease.mine)
        assert lease.check()  # the wait does not count as its own silence
    assert wait_s - 1 <= times.waited <= wait_s + BEAT_S
    assert "held by process 77 of node-7" in caplog.text
    assert f"no sign of process 77 of node-7 in {wait_s:.0f} s: going on" in caplog.text


@pytest.mark.parametrize("when", ["before", "while it is watched"])
def test_a_process_of_this_machine_that_was_killed_holds_nobody_up(
    run: Run, caplog: pytest.LogCaptureFixture, when: str
) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

    def kill() -> None:
        other.kill()
        other.wait()

    found = replace(Holder.here(), pid=other.pid)
    run.store.write_json(f"{run.folder}/{LEASE}", asdict(found))
    assert not found.is_gone
    if when == "before":
        kill()
    times = Time(meanwhile=kill)
    times.lease(run).take()
    assert times.waited == pytest.approx(SETTLE_S if when == "before" else SETTLE_S + BEAT_S / 5)
    assert f"process {other.pid} of {found.host}, which was killed" in caplog.text


def test_a_lease_that_is_released_while_another_waits_is_had_by_it(run: Run) -> None:
    put(run)
    times = Time(meanwhile=lambda: run.store.delete(f"{run.folder}/{LEASE}") if times.waited <= 1 else None)
    times.lease(run).take()
    assert times.waited < BEAT_S


def test_of_two_that_claim_at_once_the_one_whose_token_stands_goes_on(run: Run) -> None:
    second = Time().lease(run)
    second._standing = lambda: second.mine if standing(run) == asdict(second.mine) else None  # it looked before
    with pytest.raises(CascadeError, match="another process is doing"):
        Time(meanwhile=second.take).lease(run).take()
    assert standing(run) == asdict(second.mine)


def test_no_beat_for_a_while_is_borne_and_for_the_term_is_not(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    times = Time()
    lease = times.lease(run)
    lease.take()

    def unreachable(*_: object) -> None:
        raise OSError("unreachable")

    with monkeypatch.context() as broken:
        broken.setattr(Store, "write_json", unreachable)
        times.now += TERM_S - 1
        lease.renew()
        assert lease.check()
    lease.renew()
    times.now += TERM_S - 1
    assert lease.check()
    monkeypatch.setattr(Store, "read_json", unreachable)
    lease.renew()
    times.now += 2
    assert not lease.check()


@pytest.mark.parametrize("taken", [True, False], ids=["by another", "deleted"])
def test_a_lost_lease_breaks_off_the_work_and_leaves_what_the_other_has(
    run: Run, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    """Also where the work waits for something that never comes."""
    monkeypatch.setattr("ray_jobs._context.Lease", lambda run: Lease(run, beat_s=0.02))
    other: list[Holder] = []

    def work(job: Any) -> dict[str, Any]:
        run.store.delete(f"{run.folder}/{LEASE}")
        if taken:
            other.append(put(run))
        manifests.append(run.manifest)
        threading.Event().wait()
        return {"bought": 7}

    manifests: list[dict[str, Any]] = []
    runs: Any = SimpleNamespace(config={}, run=lambda name: run)
    said = "process 77 of node-7, .*this one is stopped" if taken else "deleted the lease .*this one is stopped"
    with pytest.raises(CascadeError, match=said):
        run_job("generate_tier1", work, runs)
    assert standing(run) == (asdict(other[0]) if taken else None)
    assert run.manifest == manifests[0], "written to by the one that had lost it"


def test_a_renewal_that_hangs_ends_the_work_after_the_term(run: Run) -> None:
    lease, never = Lease(run, beat_s=0.02, term_s=0.1), threading.Event()
    lease.renew = never.wait  # type: ignore[method-assign, assignment]
    with pytest.raises(CascadeError, match="could not renew its lease"), lease.held():
        threading.Event().wait()
    never.set()


def test_jobs_within_and_after_another_are_kept_apart_as_by_the_file_lock(run: Run, tmp_path: Path) -> None:
    for one in (run, open_run(Store(str(tmp_path)), "reasoning", "generate_tier1", seed=1)):
        other = open_run(one.store, "reasoning", "generate_tier1", seed=2)
        if not one.store.is_local:
            one.store.filesystem.create_dir(one.store.path(other.folder), recursive=True)
        for _ in range(2):
            with sole_driver(one) as alone, sole_driver(other):
                assert alone()
        assert (LEASE in one.store.list(one.folder)) is False


def test_the_same_run_within_itself_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_jobs._context.Lease", lambda run: Lease(run, beat_s=0.05))
    with sole_driver(run):
        with pytest.raises(CascadeError, match="another process is doing"), sole_driver(run):
            pytest.fail("twice at once")
        assert standing(run) is not None
