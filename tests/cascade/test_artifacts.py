"""The run store: whole files or none, resuming after kill -9 at any point, stores that are not local."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time

import pytest

from cascade.artifacts import Run, open_run
from cascade.config import Student
from cascade.errors import DataError
from cascade.fingerprints import fingerprint
from cascade.store import Store
from cascade.tasks import Completion, Verdict


def verdicts(*numbers, outcome="pass"):
    return [Verdict(f"t{n:03}", "base", "", outcome) for n in numbers]


def ids(run, table="verdicts"):
    return [v.task_id for v in run.read(table, Verdict)]


@pytest.fixture
def run(tmp_path):
    return open_run(Store(str(tmp_path)), "code", "test_domain", seed=1)


# ---------------------------------------------------------------------------------------------- fingerprints


def test_a_fingerprint_depends_on_values_and_not_on_their_order():
    assert fingerprint(a=1, b={"x": 1, "y": 2}) == fingerprint(b={"y": 2, "x": 1}, a=1)
    assert len({fingerprint(a=1), fingerprint(a=2), fingerprint(b=1), fingerprint(a="1")}) == 4


def test_sections_count_by_their_content():
    assert fingerprint(s=Student()) == fingerprint(s=Student(max_tokens=256))
    assert fingerprint(s=Student()) != fingerprint(s=Student(max_tokens=128))


def test_a_run_is_addressed_by_job_and_fingerprint(tmp_path):
    store = Store(str(tmp_path))
    first, same, other = (open_run(store, "code", "test_domain", seed=s) for s in (1, 1, 2))
    assert first == same
    assert first.folder != other.folder
    assert first.fingerprint != open_run(store, "code", "test_tier1", seed=1).fingerprint
    assert first.folder.startswith("code/test_domain@")


# ------------------------------------------------------------------------------------------- parts and merging


def test_parts_are_read_together_and_merged_in_order(run):
    run.start({})
    run.write_part("verdicts", verdicts(5, 3))
    run.write_part("verdicts", verdicts(1))
    run.write_part("verdicts", [])
    assert sorted(ids(run)) == ["t001", "t003", "t005"]
    assert not run.done
    run.finish({"accuracy": 1.0})
    assert run.done
    assert run.metrics == {"accuracy": 1.0}
    assert ids(run) == ["t001", "t003", "t005"]
    assert run.store.list(run.folder) == ["manifest.json", "verdicts.parquet"]


def test_a_column_is_read_by_itself_and_of_each_key_the_newest_row(run):
    assert run.read_arrow("verdicts", ["outcome"]) is None
    run.write_part("verdicts", verdicts(1, 2, outcome="fail"))
    run.write_part("verdicts", verdicts(3))
    assert run.read_arrow("verdicts", ["outcome"]).to_pydict() == {"outcome": ["fail", "fail", "pass"]}
    run.write_part("verdicts", verdicts(2, 4))
    found = run.read_arrow("verdicts", ["outcome", "task_id"]).to_pydict()
    assert dict(zip(found["task_id"], found["outcome"], strict=True)) == {
        "t001": "fail",
        "t002": "pass",
        "t003": "pass",
        "t004": "pass",
    }
    run.finish({})
    assert sorted(run.read_arrow("verdicts", ["outcome"]).to_pydict()["outcome"]) == ["fail", "pass", "pass", "pass"]


def test_what_was_never_written_is_empty(run):
    assert run.read("verdicts", Verdict) == []
    assert run.read_arrow("verdicts") is None
    assert run.manifest == {}
    with pytest.raises(DataError, match="cascade test-domain CONFIG"):
        run.require()


def test_tables_whose_names_begin_alike_are_kept_apart(run):
    run.write_part("base", verdicts(1))
    run.write_part("base_verdicts", verdicts(2))
    run.finish({})
    assert ids(run, "base") == ["t001"]
    assert ids(run, "base_verdicts") == ["t002"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, and nothing more of the process runs."""


@pytest.mark.parametrize("survived", range(8))
def test_a_finish_that_is_killed_anywhere_neither_loses_nor_repeats_rows(run, monkeypatch, survived):
    """Kill before the n-th change on disk, run `finish` again, and have every row once."""
    run.start({})
    for n in range(3):
        run.write_part("verdicts", verdicts(n))
    run.write_part("others", verdicts(7))
    left = [survived]

    def dying(method):
        def step(self, *arguments):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return method(self, *arguments)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(Store, "delete", dying(Store.delete))
        patch.setattr(Store, "write_bytes", dying(Store.write_bytes))
        try:
            run.finish({"n": 3})
        except Killed:
            assert not run.done
        else:
            assert survived >= 7, "merging two tables of four parts takes seven changes"
    assert sorted(ids(run)) == ["t000", "t001", "t002"]
    run.finish({"n": 3})
    assert ids(run) == ["t000", "t001", "t002"]
    assert ids(run, "others") == ["t007"]
    assert len(run.store.list(run.folder)) == 3


def test_rows_added_after_a_merge_that_was_killed_are_kept(run, monkeypatch):
    run.start({})
    run.write_part("verdicts", verdicts(1, 2))
    with monkeypatch.context() as patch:
        patch.setattr(Store, "delete", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run.finish({})
    run.write_part("verdicts", verdicts(3))
    assert sorted(ids(run)) == ["t001", "t002", "t003"]
    run.finish({})
    assert ids(run) == ["t001", "t002", "t003"]


def test_a_part_that_comes_while_others_are_merged_stays(run, monkeypatch):
    """Another driver, or an actor that Ray took for dead, may write to the same run."""
    run.write_part("verdicts", verdicts(1))
    read = Run._read

    def slow(self, *args):
        found = read(self, *args)
        run.write_part("verdicts", verdicts(2))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_read", slow)
        run.merge()
    assert sorted(ids(run)) == ["t001", "t002"]


def test_a_part_that_another_process_merges_is_read_where_it_went(run, monkeypatch):
    run.write_part("verdicts", verdicts(1))
    get = Run._get

    def late(self, *args):
        monkeypatch.setattr(Run, "_get", get)
        run.merge()
        return get(self, *args)

    monkeypatch.setattr(Run, "_get", late)
    assert ids(run) == ["t001"]


def test_a_block_repeated_after_a_crash_counts_once_and_its_later_rows_stand(run):
    run.write_part("verdicts", verdicts(1, 2, outcome="fail"))
    run.write_part("verdicts", [*verdicts(2, 3), Verdict("t002", "base", "v1", "fail")])
    run.finish({})
    found = {(v.task_id, v.modifier): v.outcome for v in run.read("verdicts", Verdict)}
    assert found == {("t001", ""): "fail", ("t002", ""): "pass", ("t003", ""): "pass", ("t002", "v1"): "fail"}
    assert len(run.read("verdicts", Verdict)) == 4


def test_several_attempts_at_a_task_in_one_part_are_all_kept(run):
    attempts = [Completion("t", "teacher", "", text) for text in ("wrong", "right")]
    run.write_part("answers", attempts)
    run.write_part("answers", [Completion("u", "teacher", "", "right")])
    run.finish({})
    assert [c.text for c in run.read("answers", Completion)] == ["wrong", "right", "right"]


def test_a_whole_table_takes_the_place_of_its_parts(run):
    run.write_part("curve", verdicts(1))
    run.write_table("curve", Verdict, verdicts(2))
    assert ids(run, "curve") == ["t002"]
    run.finish({})
    assert ids(run, "curve") == ["t002"]


def _write_parts(store, domain, job, mark, first):
    run = Run(store, domain, job, mark)
    for n in range(first, first + 1000):
        run.write_part("verdicts", verdicts(n))


def test_parts_survive_kill_minus_nine_whole_or_not_at_all(run):
    context = multiprocessing.get_context("fork")
    arguments = (run.store, run.domain, run.job, run.fingerprint)
    writers = [context.Process(target=_write_parts, args=(*arguments, 10_000 * i)) for i in range(2)]
    for writer in writers:
        writer.start()
    while len(run.store.list(run.folder)) < 20:
        time.sleep(0.01)
    for writer in writers:
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
    found = ids(run)
    assert len(found) == len(set(found)) >= 19
    assert {len(run._get(part)) for part in run._parts("verdicts")} == {1}
    run.finish({})
    assert ids(run) == sorted(found)


# -------------------------------------------------------------------------------------------------- manifest


def test_the_manifest_says_what_ran_and_how_often(run):
    run.start(Student())
    created = run.manifest["created"]
    run.start(Student())
    manifest = run.manifest
    assert manifest["starts"] == 2
    assert manifest["created"] == created
    assert manifest["state"] == "begun"
    assert manifest["config"]["max_tokens"] == 256
    assert manifest["fingerprint"] == run.fingerprint
    run.finish({"n": 1}, teacher="answer-key-small")
    assert run.manifest["teacher"] == "answer-key-small"
    assert run.require() is run


# ----------------------------------------------------------------------------------------------------- store


def test_what_is_damaged_is_named_with_how_to_go_on(run):
    run.start({})
    run.write_part("verdicts", verdicts(1))
    run.finish({})
    for file, read in (("verdicts.parquet", ids), ("manifest.json", lambda found: found.done)):
        whole = run.store.read_bytes(f"{run.folder}/{file}")
        run.store.write_bytes(f"{run.folder}/{file}", whole[:-9])
        with pytest.raises(DataError, match=rf"{run.name}/{file} is damaged .*: delete .*{run.name}, and the step"):
            read(run)


def test_tables_carry_what_they_are_of(run):
    run.write_part("verdicts", verdicts(1))
    run.finish({})
    metadata = run.read_arrow("verdicts").schema.metadata
    assert metadata[b"record"] == b"Verdict"
    assert json.loads(metadata[b"key"]) == ["task_id", "model", "modifier"]
