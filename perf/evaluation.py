"""Tasks per second against lm-evaluation-harness: same model folder, same questions, same token limits, same device.

    python perf/evaluation.py --data FOLDER --model FOLDER [--limit 1.0] [--dtype float32] [--threads 2]

FOLDER of the data holds bbh/*.json, mbpp.jsonl, mmlu/{dev,test}/*.csv and arc/*.jsonl as published. The harness gets
them through its own task templates (prompts are compared, letter by letter), runs in an environment of its own that
this script makes, and its clock runs inside the model's methods alone. Both answers are judged by our scorers. Beside
that we judge the harness's answers as it reads them (BBH's reading `harness`, acc, acc_norm), and every task is named
on which its own score is another; MBPP has none, see `_mbpp`. Sides take turns; ratios are within one run.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from _figures import at_least, at_most
from own_environment import python_with

from cascade import benchmarks
from cascade.benchmarks.mbpp import SHOT_IDS
from cascade.benchmarks.sources import local_rows
from cascade.config import Base, PromptStyle
from cascade.models.base import LoadedBase, default_device, load_base
from cascade.models.student import Student
from cascade.tasks import Completion, Task

PACKAGES = ["lm-eval[hf]==0.4.13", "torch==2.13.0", "transformers==5.23.0"]
TARGET = 2.0
Row = dict[str, Any]


@dataclass(frozen=True)
class Set:
    """Tasks of one benchmark as both sides know them.

    Attributes:
        template: file of lm-eval's that the harness's task includes, by category; "" for MBPP, see `_mbpp`.
        row: the published row of a task, by its id.
    """

    name: str
    benchmark: str
    options: Mapping[str, Any]
    count: int
    max_tokens: int
    template: Callable[[str], str]
    row: Callable[[Path, Task], Row]


def _bbh_row(data: Path, task: Task) -> Row:
    return local_rows(str(data / "bbh" / f"{task.category}.json"))[int(task.id.rsplit("/", 1)[1])]


def _mbpp_row(data: Path, task: Task) -> Row:
    return next(r for r in local_rows(str(data / "mbpp.jsonl")) if f"mbpp/{r['task_id']}" == task.id)


def _arc_row(data: Path, task: Task) -> Row:
    texts, labels = task.reference["texts"], task.reference["labels"]
    question = next(r["question"] for r in local_rows(str(data / "arc"), "test") if task.id.endswith(f"/{r['id']}"))
    stem = question["stem"] if isinstance(question, dict) else question
    answer = labels[task.reference["answer"]]
    return {"question": stem, "choices": {"text": texts, "label": labels}, "answerKey": answer}


def _mmlu_row(data: Path, task: Task) -> Row:
    return _mmlu_file(data, "test", task.category)[int(task.id.rsplit("/", 1)[1])]


def _mmlu_file(data: Path, split: str, subject: str) -> list[Row]:
    with (data / "mmlu" / split / f"{subject}_{split}.csv").open(encoding="utf-8", newline="") as f:
        lines = list(csv.reader(f))[1:]
    return [{"question": x[0], "choices": x[1:5], "answer": int(x[5])} for x in lines]


AS_THE_HARNESS: dict[str, dict[str, Row]] = {
    "bbh": {"exact_match": {"reading": "harness"}},
    "arc": {"acc": {"normalise": False}, "acc_norm": {"normalise": True}},
    "mmlu": {"acc": {"normalise": False}},
    "mbpp": {"pass_at_1": {}},
}
"""Benchmark -> the harness's metric -> what a task's reference says where we are to judge as it does."""
SUBJECTS = ["high_school_psychology", "miscellaneous"]
BBH = ["navigate", "date_understanding"]
SETS = [
    Set("BBH, 3 shots", "bbh", {"path": "bbh", "tasks": BBH}, 48, 256, "bbh/cot_fewshot/{}.yaml".format, _bbh_row),
    Set("MBPP, 3 shots", "mbpp", {"path": "mbpp.jsonl"}, 32, 256, lambda c: "", _mbpp_row),
    Set("ARC-Challenge", "arc", {"path": "arc"}, 64, 1, lambda c: "arc/arc_challenge.yaml", _arc_row),
    Set(
        "MMLU, 5 shots",
        "mmlu",
        {"path": "mmlu", "subjects": SUBJECTS},
        48,
        1,
        "mmlu/default/mmlu_{}.yaml".format,
        _mmlu_row,
    ),
]


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    loaded = load_base(Base(model=arguments.model, dtype=arguments.dtype), torch.device(arguments.device))
    print(f"{'':16}{'n':>5}{'lm-eval':>10}{'ours':>10}{'ratio':>8}{'cpu ratio':>11}{'score: lm-eval':>16}{'ours':>8}")
    figures: dict[str, Any] = {}
    for s in [s for s in SETS if s.benchmark in arguments.sets.split(",")]:
        tasks = _tasks(s, arguments)
        with tempfile.TemporaryDirectory() as folder:
            theirs = _theirs(s, tasks, arguments, Path(folder))
        figures |= _compare(s, tasks, _ours(s, tasks, loaded), theirs)
    print(f"tasks/s; {arguments.dtype}, {arguments.device}, {arguments.threads} threads, load {os.getloadavg()[0]:.0f}")
    print(json.dumps(figures))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True, help="a local folder")
    parser.add_argument("--sets", default="bbh,mbpp,arc,mmlu")
    parser.add_argument("--limit", type=float, default=1.0, help="times the tasks of each set")
    parser.add_argument("--batch", default="16", help="the harness's batch size")
    parser.add_argument("--dtype", default="bfloat16", help="of both sides")
    parser.add_argument("--device", default=str(default_device()))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    return parser.parse_args()


def _tasks(s: Set, arguments: argparse.Namespace) -> list[Task]:
    options = {**s.options, "path": str(arguments.data / s.options["path"])}
    count = max(1, round(s.count * arguments.limit))
    found = benchmarks.get(s.benchmark).load("test", domain="evaluation", options=options, seed=3, count=count)
    return [replace(t, max_tokens=s.max_tokens) for t in found]


def _ours(s: Set, tasks: list[Task], loaded: LoadedBase) -> tuple[list[Completion], float, float]:
    """Completions, wall and CPU seconds, after a first task that does not count."""
    student = Student(loaded, max_tokens=s.max_tokens)
    student.answer([replace(tasks[0], max_tokens=2)], PromptStyle(name="warm-up"))
    wall, cpu = time.perf_counter(), time.process_time()
    completions = student.answer(tasks, PromptStyle(name="plain"))
    return completions, time.perf_counter() - wall, time.process_time() - cpu


def _theirs(s: Set, tasks: list[Task], arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What lm-eval's side wrote."""
    python = python_with("lm-eval", PACKAGES)
    found = subprocess.run([python, "-c", "import lm_eval; print(lm_eval.__path__[0])"], capture_output=True, text=True)
    installed = Path(found.stdout.strip().splitlines()[-1]) / "tasks"
    named = _write_tasks(s, tasks, arguments.data.absolute(), installed, folder)
    settings = {key: getattr(arguments, key) for key in ("model", "dtype", "device", "threads")}
    settings |= {"batch": int(arguments.batch), "include": str(folder), "tasks": named, "out": str(folder / "out.json")}
    (folder / "settings.json").write_text(json.dumps(settings))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    if str(python) != sys.executable:
        environment |= {"PYTHONPATH": ""}
    command = [str(python), str(Path(__file__).with_name("evaluation_lm_eval.py")), str(folder / "settings.json")]
    with (folder / "log").open("wb") as log:
        if subprocess.run(command, env=environment, stdout=log, stderr=log).returncode:
            raise SystemExit(f"lm-eval failed:\n{(folder / 'log').read_text()[-3000:]}")
    answer: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return answer


def _write_tasks(s: Set, tasks: list[Task], data: Path, installed: Path, folder: Path) -> list[str]:
    """A YAML task per category that includes the harness's own template; returns their names."""
    names = []
    for category in sorted({t.category for t in tasks}):
        name = f"cascade_{s.benchmark}_{category.replace(' ', '_')}"
        rows = [{**s.row(data, t), "cascade_id": t.id} for t in tasks if t.category == category]
        files = {"test": _write_rows(folder / f"{name}.jsonl", rows)}
        if s.benchmark == "mmlu":
            shots = [{**row, "cascade_id": ""} for row in _mmlu_file(data, "dev", category)]
            files["dev"] = _write_rows(folder / f"{name}_dev.jsonl", shots)
        template = s.template(category)
        task: Row = {"include": str(installed / template)} if template else _mbpp(data, installed)
        task |= {"task": name, "tag": None, "dataset_path": "json", "dataset_name": None}
        task |= {"dataset_kwargs": {"data_files": files}, "test_split": "test"}
        task |= {"training_split": None, "validation_split": None, "should_decontaminate": False}
        if tasks[0].form != "likelihood":
            kwargs = {"until": list(tasks[0].stop), "max_gen_toks": s.max_tokens, "do_sample": False}
            task |= {"generation_kwargs": kwargs}
        if s.benchmark == "mmlu":
            task |= {"num_fewshot": 5}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
        names.append(name)
    return names


def _write_rows(file: Path, rows: list[Row]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def _mbpp(data: Path, installed: Path) -> Row:
    """The harness's own MBPP task out of its YAML, less its functions.

    Its metric loads code from the hub as soon as the harness reads the file, so that the task cannot be included as it
    stands offline. Prompt, target and sampler are taken from the file at run time; the worked examples, which one of
    its functions lists, are the published rows of the same ids. The metric is one that nobody looks at: there is no
    score of the harness's to compare with, and the answers of both sides are judged by our scorer alone.
    """

    class Loader(yaml.SafeLoader):
        """Reads a function's name as text instead of importing it."""

    Loader.add_constructor("!function", lambda _, node: str(node.value))
    task: Row = yaml.load((installed / "mbpp" / "mbpp.yaml").read_text(encoding="utf-8"), Loader)
    rows = {r["task_id"]: r for r in local_rows(str(data / "mbpp.jsonl"))}
    task["fewshot_config"]["samples"] = [{**rows[i], "is_fewshot": True} for i in SHOT_IDS]
    return {**task, "metric_list": [{"metric": "exact_match"}], "unsafe_code": False}


def _compare(s: Set, tasks: list[Task], ours: Any, theirs: dict[str, Any]) -> dict[str, Any]:
    """Print one row and every task judged differently; the set's figures."""
    completions, wall, cpu = ours
    said = {sample["id"]: sample for sample in theirs["samples"]}
    judge = benchmarks.get(s.benchmark).score
    verdicts = [
        (judge(t, c), judge(t, _as_completion(t, said[t.id]["said"]))) for t, c in zip(tasks, completions, strict=True)
    ]
    passed = [sum(v.passed for v in side) for side in zip(*verdicts, strict=True)]
    n = len(tasks)
    ratio, cpu_ratio = theirs["wall"] / wall, theirs["cpu"] / cpu
    row = f"{s.name:16}{n:5}{n / theirs['wall']:10.3f}{n / wall:10.3f}{ratio:8.2f}{cpu_ratio:11.2f}"
    print(row + f"{passed[1]:13}/{n}{passed[0]:5}/{n}")
    same_prompts = sum(t.messages[-1].content == said[t.id]["prompt"] for t in tasks)
    differing = [t.id for t, (one, two) in zip(tasks, verdicts, strict=True) if one.passed != two.passed]
    texts = sum(c.text == said[t.id]["said"] for t, c in zip(tasks, completions, strict=True))
    if tasks[0].form == "likelihood":
        pairs = [(c.choice_logprobs, said[t.id]["said"]) for t, c in zip(tasks, completions, strict=True)]
        gap = max(abs(a - b) for one, two in pairs for a, b in zip(one, two, strict=True))
        print(f"    prompts alike {same_prompts}/{n}, largest difference of a log-likelihood {gap:.4f}")
    else:
        print(f"    prompts alike {same_prompts}/{n}, texts alike {texts}/{n}")
    print(f"    judged differently: {', '.join(differing) or 'none'}")
    key = s.name.split(",")[0].lower()
    return _scored_otherwise(s, tasks, said, key) | {
        f"{key}: tasks per second, ratio": at_least(ratio, TARGET),
        f"{key}: tasks per CPU second, ratio": at_least(cpu_ratio, TARGET),
        f"{key}: prompts alike": at_least(same_prompts, n),
        f"{key}: judged differently": at_most(len(differing), 0),
    }


def _scored_otherwise(s: Set, tasks: list[Task], said: Mapping[str, Row], key: str) -> dict[str, Any]:
    """Our verdicts on the harness's answers, read as it does, beside its own scores; prints the tasks that differ."""
    figures: dict[str, Any] = {}
    for metric, reading in AS_THE_HARNESS[s.benchmark].items():
        scored = [t for t in tasks if metric in said[t.id]["scores"]]
        if not scored or (s.benchmark == "mbpp" and metric != "pass_at_1"):
            print(f"    no {metric} in the harness's results")
            continue
        score = benchmarks.get(s.benchmark).score
        as_theirs = [replace(t, reference={**t.reference, **reading}) for t in scored]
        ours = [score(t, _as_completion(t, said[t.id]["said"])).passed for t in as_theirs]
        theirs = [said[t.id]["scores"][metric] == 1.0 for t in scored]
        other = [t.id for t, one, two in zip(scored, ours, theirs, strict=True) if one != two]
        print(
            f"    {metric}: {sum(theirs)}/{len(scored)}, ours {sum(ours)}; "
            f"scored differently: {', '.join(other) or 'none'}"
        )
        figures[f"{key}: {metric} scored differently"] = at_most(len(other), 0)
    return figures


def _as_completion(task: Task, said: Any) -> Completion:
    """The harness's answer, judged as one of ours would be."""
    if isinstance(said, str):
        return Completion(task.id, "lm-eval", "", said)
    return Completion(task.id, "lm-eval", "", "", choice_logprobs=tuple(said))


if __name__ == "__main__":
    main()
