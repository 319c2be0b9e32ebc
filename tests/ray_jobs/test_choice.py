"""Which finalist of a compression search is taken, and that a recovery which fails takes nothing from it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from cascade.artifacts import Run
from cascade.config import Compression, Execution, Lora
from cascade.errors import CascadeError, DataError
from cascade.store import Store
from cascade.tasks import Message, Task, Verdict
from ray_jobs import _evaluate, _finish, _winner, compress_modifier
from ray_jobs._progress import Progress
from ray_jobs._trial import kept_files
from ray_jobs.compress_modifier import _choose, _compare, _finalists, _name

FINALISTS = [SimpleNamespace(disk_bytes=size, drift=1 / size, file=f"front/{size}.bin") for size in (10, 20, 30)]


def verdicts(failed, n):
    return [Verdict(f"t{i}", "m", "", "fail" if i in failed else "pass") for i in range(n)]


def chosen(failed, n, **settings):
    job = SimpleNamespace(config=SimpleNamespace(compression=Compression(**settings)))
    names = [_name(finalist) for finalist in FINALISTS]
    found = {"trained": verdicts((), n)} | {name: verdicts(f, n) for name, f in zip(names, failed, strict=True)}
    return _choose(job, FINALISTS, found)


def test_the_smallest_that_surely_keeps_the_accuracy_is_taken():
    assert chosen([range(40), range(2), ()], 1000)[0] == 1


def test_few_tasks_tolerate_less_than_many():
    few, why = chosen([range(3), range(2), ()], 120)
    assert few == 2
    assert "one standard error" in why
    assert chosen([range(30), range(14), ()], 1200)[0] == 1


def test_where_none_is_sure_the_nearest_of_the_most_accurate_is_taken():
    best, why = chosen([range(9), range(5), range(5)], 60)
    assert best == 2
    assert "none lost surely" in why


@pytest.mark.parametrize(("failed", "taken"), [([range(2), range(1), range(4)], 2), ([range(2), (), range(9)], 1)])
def test_the_best_is_the_nearest_unless_another_is_surely_more_accurate(failed, taken):
    best, why = chosen(failed, 120, choose="best")
    assert best == taken
    assert why.startswith("the nearest to the uncompressed")


def test_finalists_of_the_best_are_those_nearest_to_the_uncompressed():
    """Not those of least loss: a compressed adapter can have less than the uncompressed one, and other answers."""
    near, far = ((0.4, 0.3, 0.2, 0.1), (9, 9, 9, 9))
    made = [
        SimpleNamespace(disk_bytes=size, loss=size / 100, drift=d, fits=True, share=1.0, file=f"{size}")
        for drifts, start in ((near, 10), (far, 15))
        for size, d in enumerate(drifts, start)
    ]
    job = SimpleNamespace(config=SimpleNamespace(compression=Compression(finalists=3, choose="best")))
    assert [t.drift for t in _finalists(job, made, None, None)] == [0.3, 0.2, 0.1]
    assert kept_files(made, job.config.compression) >= {t.file for t in made[:4]}
    assert kept_files(made, Compression()) == {made[0].file}
    for trial in made:
        trial.drift = math.inf  # by a search that did not measure it
    assert [t.disk_bytes for t in _finalists(job, made, None, None)] == [10]


def test_verdicts_of_another_search_are_not_taken_for_a_finalists(tmp_path, monkeypatch):
    """An interrupted job left some; going on, it has a finalist more, and smaller ones come first."""
    run = Run(Store(str(tmp_path)), "sums", "compress_modifier", "0f0f")
    task = Task("t0", "quiz", "sums", "validation", (Message("user", "q"),), {})
    monkeypatch.setattr(compress_modifier, "training_style", lambda runs: None)
    job = SimpleNamespace(
        run=run,
        runs=SimpleNamespace(validation_tasks=[task]),
        config=SimpleNamespace(execution=Execution()),
        progress=Progress(),
    )
    asked = []

    def judge(job, assignments, blocks, size, pool):
        adapters = {a.name: a.adapter for a in assignments}
        for name in (block.column("assignment")[0].as_py() for block in blocks):
            asked.append(adapters[name])
            given = [Verdict("t0", "m", name, "pass" if "good" in adapters[name] else "fail")]
            run.write_part(f"{name}_verdicts", given)
            yield name, given

    monkeypatch.setattr(_evaluate, "_run_blocks", judge)
    bad, good = (SimpleNamespace(file=f"front/{name}.safetensors") for name in ("bad", "good"))
    _compare(job, [good], "trained/adapter")
    found = _compare(job, [bad, good], "trained/adapter")
    assert [found[_name(t)][0].passed for t in (bad, good)] == [False, True]
    assert asked == ["trained/adapter", f"{run.folder}/{good.file}", f"{run.folder}/{bad.file}"]


def test_finalists_are_spread_over_the_front():
    front = [
        SimpleNamespace(disk_bytes=s, resident_bytes=s, loss=9.0 - s, fits=True, share=1.0, file="f")
        for s in range(1, 9)
    ]
    job = SimpleNamespace(config=SimpleNamespace(compression=Compression(finalists=4, keep_gain=0.5)))
    ground = SimpleNamespace(gain=lambda loss: 1 - loss / 10)
    found = [t.disk_bytes for t in _finalists(job, list(reversed(front)), ground, None)]
    assert found[-1] == 8
    assert len(found) == 4
    assert found == sorted(found)
    assert found[0] == min(s.disk_bytes for s in front if ground.gain(s.loss) >= 0.5)


@pytest.mark.parametrize("count", [1, 2])
def test_few_finalists(count):
    front = [
        SimpleNamespace(disk_bytes=s, resident_bytes=s, loss=1 / s, fits=True, share=1.0, file="f") for s in (1, 2, 3)
    ]
    job = SimpleNamespace(config=SimpleNamespace(compression=Compression(finalists=count, keep_gain=0.1)))
    found = _finalists(job, front, SimpleNamespace(gain=lambda loss: 1 - loss / 10), None)
    assert [t.disk_bytes for t in found] == {1: [3], 2: [1, 3]}[count]


@pytest.mark.parametrize(("fits", "said"), [(True, "loss of no trial is a number"), (False, "no trial stayed within")])
def test_without_finalists_it_is_said_why(monkeypatch, fits, said):
    monkeypatch.setattr(compress_modifier, "limits", lambda *_: SimpleNamespace(disk=1, resident=1))
    trial = SimpleNamespace(disk_bytes=2, resident_bytes=2, loss=math.nan, fits=fits, share=1.0, file="f")
    job = SimpleNamespace(config=SimpleNamespace(compression=Compression()))
    with pytest.raises(CascadeError, match=said):
        _finalists(job, [trial], None, None)


def test_a_recovery_that_diverges_leaves_what_was_chosen(monkeypatch):
    def diverges(*_):
        raise DataError("not finite in 3 steps in a row")

    monkeypatch.setattr(_finish, "recover", diverges)
    monkeypatch.setattr(_finish, "_plan", lambda *_: [None] * 5)
    config = SimpleNamespace(compression=Compression(recovery_steps=5), training=SimpleNamespace(lora=Lora()))
    bench = SimpleNamespace(slot=SimpleNamespace(clear=lambda: None), loaded=SimpleNamespace(model=None))
    chosen = SimpleNamespace()
    left, recovery = _finish._recover(SimpleNamespace(config=config, adapter=None), bench, chosen)
    assert left is chosen
    assert not recovery.taken
    assert math.isnan(recovery.loss)
    assert (
        _winner.in_words(recovery, SimpleNamespace(drift=0.5))
        == "recovery training diverged within 5 steps; the file stayed as it was"
    )
