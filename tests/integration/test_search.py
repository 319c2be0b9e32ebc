"""The pruning search alone, on a tiny base: killed at work, and then a trial's process, it leaves what it promises."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import optuna
import psutil
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from stand_in import save_tiny_base
from sums import own_sums
from transformers import AutoModelForCausalLM

from cascade import benchmarks
from cascade.compression.account import LayerShare, StageCost
from cascade.compression.adapter import AdapterWeights, BaseRef, LoraPair, fp16_bytes, save_peft_folder
from cascade.compression.format import read_modifier
from cascade.config import load_config
from cascade.tasks import Example, Message
from cascade.training.seeded_init import initial_lora_a
from ray_jobs._bench import SHARES
from ray_jobs._results import ADAPTER
from ray_jobs._runs import Runs
from ray_jobs._study import STUDY
from ray_jobs._trial import FRONT, STAGES, TRIALS, Trial, pareto_front
from ray_jobs._winner import ACCOUNT, LAYERS
from ray_jobs.compress_modifier import FILE

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
COUNT = 40
"""Trials: a twentieth of a second each, and their process is to be found while they last."""
RANK = 48


IN_FLIGHT = 2


def write_config(folder: Path) -> Path:
    save_tiny_base(folder / "base")
    prices = {"input_usd_per_million": 1.0, "output_usd_per_million": 2.0, "answer_key": {"max_difficulty": 3}}
    config = {
        "domain": "sums",
        "storage": str(folder / "out"),
        "base": {"model": str(folder / "base"), "dtype": "float32"},
        "tasks": own_sums(folder, levels=2, train=30, validation=30, test=30),
        "student": {"max_tokens": 4},
        "tiers": [{"name": f"answer-key-{n}", "endpoints": [{"base_url": "answer-key"}], **prices} for n in (1, 2, 3)],
        "budget_usd": 1.0,
        "training": {"lora": {"rank": RANK, "max_length": 256}},
        "compression": {"trials": COUNT, "calibration_rows": 4, "recovery_steps": 3},
        "execution": {"tune_concurrency": IN_FLIGHT},
    }
    path = folder / "sums.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def train_by_hand(runs: Runs) -> AdapterWeights:
    """The run that training would leave, with a random adapter."""
    model = AutoModelForCausalLM.from_pretrained(runs.config.base.model)
    rng, layers = np.random.default_rng(0), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            a = initial_lora_a(17, name, RANK, module.in_features)
            b = rng.normal(scale=0.05, size=(module.out_features, RANK)) * 0.9 ** np.arange(RANK)
            layers[name] = LoraPair(a, b.astype(np.float32))
    base = BaseRef(runs.config.base.model, runs.base_sha256)
    adapter = AdapterWeights(layers, 2.0, RANK, base, tuple(layers), 17)
    run = runs.train_modifier
    run.start(runs.config)
    save_peft_folder(adapter, runs.store.path(f"{run.folder}/{ADAPTER}"), dtype="float16")
    examples = [
        Example(
            t.id,
            t.benchmark,
            t.domain,
            t.category,
            t.difficulty,
            (*t.messages, Message("assistant", benchmarks.get(t.benchmark).reference_answer(t))),
            "answer-key-1",
            1,
        )
        for t in runs.train_tasks
    ]
    run.write_table("examples", Example, examples)
    run.finish({"examples": len(examples), "steps": 0})
    return adapter


def test_killed_at_work_it_repeats_at_most_the_trials_in_flight(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    runs = Runs(load_config(path))
    adapter = train_by_hand(runs)
    folder = Path(runs.store.path(runs.compress_modifier.folder))
    command = [sys.executable, "-m", "ray_jobs.cli", "compress-modifier", str(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    killed = start(command, environment, folder)
    stop_when_measured(killed, folder, 2, signal.SIGKILL)
    survived = {file.name for file in folder.glob(f"{TRIALS}.*.parquet")}
    assert len(survived) < COUNT
    interrupted = start(command, environment, folder)
    kill_a_trials_process(interrupted, folder, len(survived) + 1)
    assert stop_when_measured(interrupted, folder, len(survived) + 2, signal.SIGINT) == 130, log_of(folder).read_text()
    assert not runs.compress_modifier.done
    finished = start(command, environment, folder)
    assert finished.wait(600) == 0, log_of(folder).read_text()[-3000:]

    run = runs.compress_modifier
    trials = run.read(TRIALS, Trial)
    assert len(trials) == len({t.params for t in trials}) == COUNT
    measured = set(json.loads(pq.read_schema(folder / f"{TRIALS}.parquet").metadata[b"cascade.parts"]))
    assert survived <= measured, "a trial that was measured before the kill is lost"
    assert len(measured) <= COUNT + 1, "only the trial whose process died may have been noted and asked for again"
    in_flight = 2 * IN_FLIGHT + 1  # when the driver was interrupted and killed, and when a trial's process was
    assert looks_repeated(folder) <= len(SHARES) * in_flight, "more than the trials in flight were begun twice"
    check_front(folder, trials, adapter)
    check_choice(runs, adapter)
    check_account(runs, adapter, trials)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / STUDY)))
    study = optuna.load_study(study_name=None, storage=storage)
    assert len(study.trials) == COUNT
    assert {t.user_attrs["recipe"] for t in study.trials} == {t.recipe for t in trials}


def start(command: list[str], environment: dict[str, str], folder: Path) -> subprocess.Popen[bytes]:
    with log_of(folder).open("ab") as log:
        heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also where these tests ignore it
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, preexec_fn=heard)


def log_of(folder: Path) -> Path:
    return folder.parent / "search.log"


def wait_until_measured(driver: subprocess.Popen[bytes], folder: Path, count: int) -> None:
    deadline = time.monotonic() + 400
    while len(list(folder.glob(f"{TRIALS}.*.parquet"))) < count:
        assert driver.poll() is None, log_of(folder).read_text()[-3000:]
        assert time.monotonic() < deadline, "the search did not get that far"
        time.sleep(0.02)


def stop_when_measured(driver: subprocess.Popen[bytes], folder: Path, count: int, how: signal.Signals) -> int:
    """Send the job a signal once so many trials are measured; returns its exit code when no trial is left at work."""
    try:
        wait_until_measured(driver, folder, count)
        trials = trial_processes(driver)
        os.kill(driver.pid, how)
        code = driver.wait(120)
    finally:
        driver.kill()
    _, alive = psutil.wait_procs(trials, timeout=120)  # seconds after their driver; they may end what they measure
    assert not alive, "trials go on without their driver"
    return code


def kill_a_trials_process(driver: subprocess.Popen[bytes], folder: Path, count: int) -> None:
    """SIGKILL a process that runs trials once so many are measured."""
    wait_until_measured(driver, folder, count)
    while not (trials := trial_processes(driver)):
        assert driver.poll() is None, log_of(folder).read_text()[-3000:]
        time.sleep(0.02)  # Tune may have ended one and not begun the next
    assert len(trials) <= IN_FLIGHT
    trials[0].kill()


def trial_processes(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return [p for p in psutil.Process(driver.pid).children(recursive=True) if is_trial(p)]


def is_trial(process: psutil.Process) -> bool:
    try:
        return "TrialRunner" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def looks_repeated(folder: Path) -> int:
    """Looks at a part of the held-out rows that were taken of the same trial again."""
    taken = pq.read_table(folder / f"{STAGES}.parquet")
    return len(json.loads(taken.schema.metadata[b"cascade.parts"])) - taken.num_rows


def check_front(folder: Path, trials: list[Trial], adapter: AdapterWeights) -> None:
    """The files of the front, and no others, are there; each is what its trial says."""
    front = pareto_front(trials)
    assert {f"{FRONT}/{file.name}" for file in (folder / FRONT).iterdir()} == {t.file for t in front}
    for trial in front:
        _, compressed = read_modifier(folder / trial.file, base_sha256=adapter.base.sha256)
        assert (folder / trial.file).stat().st_size == trial.disk_bytes
        assert compressed.recipe.model_dump_json() == trial.recipe
    assert [t.loss for t in front] == sorted((t.loss for t in front), reverse=True)


def check_choice(runs: Runs, adapter: AdapterWeights) -> None:
    """What was chosen is on the front and keeps both limits, and it is said why."""
    run = runs.compress_modifier
    metrics, limit = run.metrics, 48 / 260 * fp16_bytes(adapter)
    assert metrics["disk_bytes"] <= limit
    assert metrics["resident_bytes"] <= limit
    assert metrics["disk_bytes"] == len(runs.store.read_bytes(f"{run.folder}/{FILE}"))
    assert metrics["recipe"] in metrics["finalists"].values()
    chosen, whole = (metrics["validation"][name] for name in (metrics["chosen"], "trained"))
    assert chosen["n"] == whole["n"] == len(runs.validation_tasks)
    assert f"{chosen['passed']} of {chosen['n']} passed, uncompressed {whole['passed']}" in metrics["reason"]
    assert "3 steps of recovery training" in metrics["reason"]


def check_account(runs: Runs, adapter: AdapterWeights, trials: list[Trial]) -> None:
    """Stages lead from the adapter as trained to the very file that is delivered; every layer is accounted for."""
    run = runs.compress_modifier
    stages, recovery = run.read(ACCOUNT, StageCost), run.metrics["recovery"]
    winner = next(t for t in trials if t.recipe == run.metrics["recipe"])
    assert stages[0].stage == "trained"
    assert stages[0].disk_bytes == fp16_bytes(adapter)
    assert stages[0].loss == run.metrics["trained_loss"]
    assert stages[-1].disk_bytes == run.metrics["disk_bytes"]
    assert recovery["taken"] == (stages[-1].stage == "recovered")
    assert recovery["taken"] == (recovery["drift"] < winner.drift)
    if recovery["taken"]:
        assert recovery["loss"] == run.metrics["loss"]
    else:
        assert run.metrics["loss"] == winner.loss
    assert len(run.read(LAYERS, LayerShare)) == len(adapter.layers)
