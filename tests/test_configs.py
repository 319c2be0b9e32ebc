"""The configs that come with the project: all load, and hold what their domains are meant to be."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from cascade import benchmarks
from cascade.benchmarks.options import parse_options
from cascade.config import load_config
from cascade.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
DOMAINS = ("code", "reasoning", "automation")
TEST_ONLY = {"humaneval", "livecodebench", "bbh"}


def domain(name):
    return load_config(ROOT / f"configs/{name}.yaml")


def sources(config, *splits):
    return [(split, source) for split in splits for source in config.tasks.split(split).sources]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_config_loads_and_opens_with_the_command_that_runs_it(path):
    config = load_config(path)
    opening = re.split(r"^domain:", path.read_text(), flags=re.MULTILINE)[0]
    assert f"cascade run configs/{path.name}" in opening
    assert all(line.startswith("#") for line in opening.strip().splitlines())
    assert config.storage == f"out/{path.stem}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_source_has_options_that_its_benchmark_takes(path):
    for split, source in sources(load_config(path), "train", "validation", "test"):
        module = importlib.import_module(f"cascade.benchmarks.{source.benchmark}")
        assert benchmarks.get(source.benchmark) is module.BENCHMARK
        options = next(v for n, v in vars(module).items() if n in ("Options", "_Options"))
        parse_options(options, source.options, f"{source.benchmark} ({split})")


def test_options_that_a_benchmark_does_not_take_would_be_noticed():
    module = importlib.import_module("cascade.benchmarks.mbpp")
    with pytest.raises(ConfigError, match="shot"):
        parse_options(module.Options, {"shot": 1}, "mbpp")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_training_pools_touch_no_test_split(path):
    """Rule 2: only benchmarks with a training split of their own, by ids, hashes or disjoint seeds."""
    config = load_config(path)
    for split, source in sources(config, "train", "validation"):
        assert source.benchmark not in TEST_ONLY, f"{source.benchmark} has test tasks alone"
        if split == "train":
            assert source.benchmark != "mmlu", "MMLU has no training split"
        if source.benchmark == "bfcl":
            assert source.options.get("split_rule", "ids") == "ids"


@pytest.mark.parametrize("benchmark", sorted(TEST_ONLY))
def test_a_benchmark_with_test_tasks_alone_refuses_to_train(benchmark):
    with pytest.raises(ConfigError, match="train"):
        benchmarks.get(benchmark).load("train", domain="x", options={}, seed=1, count=1)


MISSION = {
    "code": {
        "rank": 128,
        "bytes": 47_000_000,
        "budget": 200,
        "ratio": (1.15, 1.30),
        "benchmarks": {"humaneval", "mbpp", "livecodebench"},
        "teachers": ["qwen3-coder", "deepseek", "gpt-5"],
    },
    "reasoning": {
        "rank": 112,
        "bytes": 48_000_000,
        "budget": 207,
        "ratio": (1.00, 1.08),
        "benchmarks": {"mmlu", "bbh", "arc", "reasoning_gym"},
        "teachers": ["llama-3.1-405b-instruct:free", "gpt-4o", "gpt-5"],
    },
    "automation": {
        "rank": 96,
        "bytes": 40_000_000,
        "budget": 170,
        "ratio": (1.05, 1.18),
        "benchmarks": {"bfcl"},
        "teachers": ["claude-3.5", "gpt-4o", "gpt-5"],
    },
}


@pytest.mark.parametrize("name", DOMAINS)
def test_the_domains_are_those_of_the_mission(name):
    config, wanted = domain(name), MISSION[name]
    assert config.domain == name
    assert config.tasks.train.count == 12_000
    assert config.training.lora.rank == wanted["rank"]
    assert config.compression.target_bytes == wanted["bytes"]
    assert config.compression.max_ratio == pytest.approx(48 / 260)
    assert config.budget_usd == wanted["budget"]
    assert config.reference.target_ratio == wanted["ratio"]
    assert {s.benchmark for _, s in sources(config, "test")} == wanted["benchmarks"]
    for teacher, part in zip(config.tiers, wanted["teachers"], strict=True):
        assert part in teacher.name


@pytest.mark.parametrize("name", DOMAINS)
def test_teachers_are_real_priced_and_keyed(name):
    for teacher in domain(name).tiers:
        assert not teacher.is_answer_key
        assert teacher.price_source, "a price needs to say where it is from"
        for endpoint in teacher.endpoints:
            assert re.fullmatch(r"https://[a-z.]+(/api)?/v1", endpoint.base_url)
            assert re.fullmatch(r"[A-Z]+_API_KEY", endpoint.api_key_env)
            opening = (ROOT / f"configs/{name}.yaml").read_text().splitlines()[0]
            assert f"{endpoint.api_key_env}=" in opening
    assert sum(t.expected_share for t in domain(name).tiers) == pytest.approx(1.0)


@pytest.mark.parametrize("name", DOMAINS)
def test_no_config_holds_a_key(name):
    assert not re.search(r"\bsk-|\bkey: *[A-Za-z0-9]{16,}", (ROOT / f"configs/{name}.yaml").read_text())


@pytest.mark.parametrize("name", DOMAINS)
def test_reference_scores_are_of_benchmarks_that_are_run_and_have_a_source(name):
    reference = domain(name).reference
    assert set(reference.scores) <= MISSION[name]["benchmarks"]
    assert all(0 < score <= 100 for score in reference.scores.values())
    assert all(benchmark in reference.source for benchmark in reference.scores)


@pytest.mark.parametrize("name", DOMAINS)
def test_the_base_is_pinned(name):
    assert re.fullmatch(r"[0-9a-f]{40}", domain(name).base.revision)


def test_the_example_of_a_vllm_server_has_the_base_of_the_config_that_is_served():
    page = (ROOT / "docs/howto/production.md").read_text(encoding="utf-8")
    served = re.search(
        r"^vllm serve (\S+) --revision (\S+) [^`]*^python -m serve configs/(\w+)\.yaml vllm=", page, re.M
    )
    base = domain(served[3]).base
    assert served.groups()[:2] == (base.model, base.revision)


def test_the_reasoning_teachers_are_asked_for_steps_and_the_steps_are_kept():
    for teacher in domain("reasoning").tiers:
        assert teacher.keep_reasoning
        assert "step by step" in teacher.system


def test_reasoning_models_are_left_their_own_temperature():
    for name in DOMAINS:
        assert all(t.temperature is None for t in domain(name).tiers if t.name == "gpt-5")


def test_a_teachers_answer_fits_into_what_is_trained_on():
    """Else answers would be bought that training then refuses as too long."""
    for name in DOMAINS:
        config = domain(name)
        visible = [t.max_tokens for t in config.tiers if t.name != "gpt-5"]  # of GPT-5's tokens most are thoughts
        assert max(visible) <= config.training.lora.max_length


def test_the_quickstart_needs_no_key_no_hub_and_no_gpu():
    config = load_config(ROOT / "configs/quickstart.yaml")
    assert config.base.model.startswith("wheel:")
    assert all(t.is_answer_key and e.api_key_env is None for t in config.tiers for e in t.endpoints)
    assert not config.execution.use_gpu
    assert config.tasks.test.count >= 300
    assert {s.benchmark for _, s in sources(config, "train", "validation", "test")} == {"reasoning_gym"}


@pytest.mark.parametrize("name", ["code", "automation"])
def test_the_line_that_a_config_shows_for_ones_own_tasks_is_a_task(name, tmp_path):
    opening = re.split(r"^domain:", (ROOT / f"configs/{name}.yaml").read_text(), flags=re.MULTILINE)[0]
    text = " ".join(line.lstrip("# ") for line in opening.splitlines())
    line = re.search(r'\{"id": 1.*\}', text)[0]
    (tmp_path / "train.jsonl").write_text(line + "\n")
    options = {"path": str(tmp_path / "train.jsonl")}
    tasks = benchmarks.get("jsonl").load("train", domain=name, options=options, seed=1, count=None)
    assert [t.split for t in tasks] == ["train"]


def test_the_reasoning_generators_give_tasks():
    """A few tasks of the real mixture, of the generators alone (the other sources need the hub)."""
    train = next(s for _, s in sources(domain("reasoning"), "train") if s.benchmark == "reasoning_gym")
    tasks = benchmarks.get("reasoning_gym").load("train", domain="reasoning", options=train.options, seed=17, count=40)
    assert len(tasks) == 40
    assert {t.category for t in tasks} == {g["name"] for g in train.options["generators"]}
    assert min(t.max_tokens for t in tasks) >= 384, "room for the steps"
