"""Every command in the documentation is run, or read by the program that it names."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml
from doc_commands import Command, Misunderstood, check, commands
from documents import PAGES, ROOT
from pydantic import TypeAdapter
from stand_in import StandIn, build_stand_in

from cascade import benchmarks
from cascade.config import Config, Teacher, load_config
from cascade.scoring.sandbox import missing_walls
from cascade.tasks import Completion

NODE = shutil.which("node", path="/usr/local/bin:/usr/bin:/bin")
WITH_COMMANDS = [p for p in PAGES if commands(p.read_text(encoding="utf-8"))]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    return build_stand_in(tmp_path_factory.mktemp("documented"))


@pytest.fixture
def workplace(stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository's files with a tiny base, and what the quickstart leaves; all writing is done here."""
    for name in ("configs", "docs", "deploy"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for file in [*ROOT.glob("*.yaml"), ROOT / "Makefile"]:
        shutil.copy(file, tmp_path)
    (tmp_path / "perf").symlink_to(ROOT / "perf")
    (tmp_path / "FOLDER").mkdir()  # what the pages call one that the reader has
    for name in ("configs/quickstart.yaml", "docs/examples/shop.yaml"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        changed = re.sub(r"model: wheel:\S+", f"model: {stand_in.config.base.model}", text)
        assert changed != text
        (tmp_path / name).write_text(changed, encoding="utf-8")
    shutil.copytree(stand_in.config.storage, tmp_path / "out/quickstart")
    monkeypatch.chdir(tmp_path)
    return tmp_path


CHEAP = {"docs/howto/new-domain.md": 2, "docs/tutorial.md": 4, "docs/howto/production.md": 3}
"""Page -> how many of its commands are cheap, and so run."""
LEFT = {"docs/tutorial.md": ("my.yaml", ""), "docs/howto/production.md": ("out/code/keys.json", "[]")}
"""Page -> a file that its commands leave, and what that says: keys were added, shown, and revoked."""


@pytest.mark.parametrize("name", [str(page.relative_to(ROOT)) for page in WITH_COMMANDS])
def test_the_commands_of_a_page_work(name: str, workplace: Path) -> None:
    done = [check(command, workplace) for command in commands((ROOT / name).read_text(encoding="utf-8"))]
    if name in CHEAP:
        assert done.count("run") == CHEAP[name]
    if name == "docs/howto/new-domain.md":
        assert done == ["run", "run", "read", "read"]
    if name in LEFT:
        file, said = LEFT[name]
        assert said in ("", (workplace / file).read_text().strip())


def test_pages_with_cheap_commands_are_among_those_that_are_checked() -> None:
    assert {*CHEAP, *LEFT} <= {str(page.relative_to(ROOT)) for page in WITH_COMMANDS}


@pytest.mark.parametrize(
    "line",
    [
        "cascade plan configs/quickstart.yaml --smaple 3",
        "cascade plan configs/nowhere.yaml",
        "cascade plna configs/quickstart.yaml",
        "cascade plan configs/code.yaml --sample 99",
        "cascade compress ONLY_ONE",
        "make everything",
        "python -m serve configs/code.yaml replica=2",
        "python -m serve configs/code.yaml --prot 8000",
        "python -m serve.keys out/x make NAME",
        "python -m serve.keys out/x revoke nobody",
        "python -m ray_jobs.train --config configs/code.yaml",
        "python -m ray_jobs.pipeline configs/code.yaml",
        "python perf/compression.py --part large",
        "ray job submti -- python -m ray_jobs.pipeline --config configs/code.yaml",
        "ray job submit --working-dri . -- python -m ray_jobs.pipeline --config configs/code.yaml",
        "ray job submit --working-dir . -- python -m ray_jobs.pipelin --config configs/code.yaml",
        "curl http://127.0.0.1:8000/v1/chat",
        "tensorboard --logdri out",
        "kubectl apply -f deploy/kuberay/job.yaml",
        "casacde plan configs/quickstart.yaml",
    ],
)
def test_what_would_not_work_is_noticed(line: str, workplace: Path) -> None:
    (command,) = commands(f"```sh\n{line}\n```\n")
    with pytest.raises(Misunderstood):
        check(command, workplace)


def test_commands_are_read_as_a_shell_does() -> None:
    page = "```sh\na b \\\n  c   # note\nd '{\n e}' && f | g\n```\ntext\n```python\nh\n```\n```sh\ni\n```\n"
    words = [c.words for c in commands(page)]
    assert words == [("a", "b", "c"), ("d", "{\n e}"), ("f",), ("g",), ("i",)]
    assert isinstance(commands(page)[0], Command)


def blocks(language: str) -> list[tuple[str, str]]:
    fence = re.compile(rf"^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [(str(p.relative_to(ROOT)), b) for p in PAGES for b in fence.findall(p.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("page", "block"), blocks("yaml"))
def test_pieces_of_a_config_are_valid(page: str, block: str) -> None:
    for key, value in yaml.safe_load(block).items():
        shape = list[Teacher] if key == "tiers" else Config.model_fields[key].annotation
        TypeAdapter(shape).validate_python(value)


@pytest.mark.parametrize(("page", "block"), blocks("python"))
def test_python_is_python(page: str, block: str) -> None:
    compile(block, page, "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} leads nowhere"
        if anchor:
            there = file.read_text(encoding="utf-8")
            headings = re.findall(r"^#+ (.*)$", there, re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs | set(re.findall(r'<a id="([^"]+)">', there)), f"{target} has no such place"


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_example_tasks_load_and_their_answers_pass(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config("docs/examples/shop.yaml")
    (source,) = config.tasks.split(split).sources
    jsonl = benchmarks.get("jsonl")
    tasks = jsonl.load(split, domain="shop", options=source.options, seed=1, count=None)
    kinds = {t.reference["kind"] for t in tasks}
    assert kinds == {"exact", "multiple_choice", "unit_tests", "function", "calls"} or split != "train"
    for task in tasks:
        if task.reference["kind"] in ("unit_tests", "function") and (missing_walls() or not NODE):
            continue  # other tests say so
        assert jsonl.score(task, Completion(task.id, "m", "", jsonl.reference_answer(task))).passed, task.id
        is_wrong = not jsonl.score(task, Completion(task.id, "m", "", "?")).passed
        assert is_wrong or task.reference["expected"] == []
