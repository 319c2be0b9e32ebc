"""The config schema: what is refused, and that the message says which key and what is allowed there."""

from __future__ import annotations

import copy
import re

import pytest
import yaml

from cascade.config import Config, Execution, check_config, load_config
from cascade.errors import ConfigError
from cascade.fingerprints import fingerprint
from cascade.tasks import Message, Task
from ray_jobs import JOBS, _runs

TEACHER = {
    "name": "answer-key-small",
    "endpoints": [{"base_url": "answer-key"}],
    "input_usd_per_million": 0.1,
    "output_usd_per_million": 0.4,
    "answer_key": {"max_difficulty": 1},
}
SOURCES = {"count": 4, "sources": [{"benchmark": "reasoning_gym"}]}
MINIMAL = {
    "domain": "reasoning",
    "base": {"model": "some/model"},
    "tasks": {"train": SOURCES, "validation": SOURCES, "test": SOURCES},
    "tiers": [copy.deepcopy(TEACHER) for _ in range(3)],
    "budget_usd": 1,
}


def changed(path, value):
    """The minimal config with one value set; a path like "tiers.0.name". ... removes the key."""
    raw = copy.deepcopy(MINIMAL)
    *parents, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    place = raw
    for part in parents:
        place = place.setdefault(part, {}) if isinstance(place, dict) else place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return raw


def refusal(path, value):
    with pytest.raises(ConfigError) as caught:
        check_config(changed(path, value), source="my.yaml")
    message = str(caught.value)
    assert message.startswith("my.yaml cannot be used:\n")
    return message


def test_the_minimal_config_is_taken_with_its_defaults():
    config = check_config(MINIMAL)
    assert config.seed == 17
    assert config.tier(1).name == "answer-key-small"
    assert config.tasks.split("test").count == 4
    assert config.execution == Execution()


@pytest.mark.parametrize(
    ("path", "section_keys"),
    [
        ("learning_rate", ["domain", "seed", "tiers", "execution"]),
        ("base.modle", ["model", "revision", "dtype"]),
        ("tiers.1.price", ["input_usd_per_million", "budget_usd"]),
        ("tiers.0.endpoints.0.url", ["base_url", "api_key_env", "requests_per_minute"]),
        ("tiers.2.answer_key.difficulty", ["max_difficulty", "slip_rate"]),
        ("training.lora.r", ["rank", "alpha", "learning_rate"]),
        ("tasks.train.sources.0.option", ["benchmark", "weight", "options"]),
        ("probe.lora.lr", ["learning_rate"]),
    ],
)
def test_an_unknown_key_is_named_with_those_that_are_allowed_there(path, section_keys):
    message = refusal(path, 1)
    assert f"- {path}: unknown key; allowed here: " in message
    allowed = message.split("allowed here: ")[1].splitlines()[0].split(", ")
    assert set(section_keys) <= set(allowed)
    assert path.split(".")[-1] not in allowed


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("domain", ..., "domain: is required"),
        ("base.model", ..., "base.model: is required"),
        ("base.dtype", "float16", "base.dtype: Input should be 'auto', 'float32' or 'bfloat16' (got 'float16')"),
        ("domain", "Code!", "domain: String should match pattern"),
        ("domain", "a" * 65, "domain: String should match pattern"),
        ("seed", -1, "seed: Input should be greater than or equal to 0 (got -1)"),
        ("seed", 2**32, "seed: Input should be less than 2147483648 (got 4294967296)"),
        ("student.prompts", [{"name": "a.b"}, {"name": "a_b"}], "student.prompts: each style needs a name of its own"),
        (
            "reference",
            {"model": "m", "source": "s", "scores": {"mbpp": 0}, "target_ratio": [0.5, 1]},
            "reference.scores.mbpp: Input should be greater than 0 (got 0)",
        ),
        (
            "reference",
            {"model": "m", "source": "s", "scores": {"mmmlu": 86}, "target_ratio": [0.5, 1]},
            "the whole file: reference.scores has mmmlu, which tasks.test does not: tested are reasoning_gym; correct",
        ),
        (
            "reference",
            {"model": "m", "source": "s", "scores": {}, "target_ratio": [1.2, 1.0]},
            "reference.target_ratio: two numbers above 0, the lower first",
        ),
        (
            "reference",
            {"model": "m", "source": "s", "scores": {"mmlu": True}, "target_ratio": [1, 1.2]},
            "reference.scores: true and false are no numbers: write the number",
        ),
        ("tasks.train.count", True, "tasks.train.count: true and false are no numbers: write the number (got True)"),
        ("seed", False, "seed: true and false are no numbers: write the number (got False)"),
        (
            "tasks.train.sources.0.weight",
            float("inf"),
            "tasks.train.sources.0.weight: Input should be a finite number (got inf)",
        ),
        ("budget_usd", float("nan"), "budget_usd: Input should be a finite number (got nan)"),
        ("domain", "base", "domain: requests name the base and the router so (got 'base')"),
        ("training.zero_stage", 4, "training.zero_stage: Input should be 0, 1, 2 or 3 (got 4)"),
        ("training.lora.rank", 0, "training.lora.rank: Input should be greater than 0 (got 0)"),
        ("probe.folds", 1, "probe.folds: Input should be greater than or equal to 2 (got 1)"),
        (
            "router.features",
            16384,
            "router: features 16384 and hidden 64 make a router of 21.4 MB",
        ),
        ("budget_usd", -1, "budget_usd: Input should be greater than or equal to 0 (got -1)"),
        ("tasks.test.sources", [], "tasks.test.sources: List should have at least 1 item"),
        ("compression.max_ratio", 1.5, "compression.max_ratio: Input should be less than or equal to 1 (got 1.5)"),
        ("tiers", [TEACHER], "tiers: List should have at least 3 items"),
        ("execution.train_workers", "two", "execution.train_workers: Input should be a valid integer"),
    ],
)
def test_a_bad_value_is_named_with_what_would_do(path, value, expected):
    assert f"  - {expected}" in refusal(path, value)


@pytest.mark.parametrize(
    "url",
    ["api.openai.com/v1", "localhost:8001/v1", "ftp://h/v1", "", "http:///v1", " https://h/v1", "https://h /v1"]
    + ["http://h:99999/v1", "http://h:0/v1", "http://[::1/v1"],
)
def test_a_url_that_no_service_has_is_refused_before_it_is_asked(url):
    key = "tiers.0.endpoints.0.base_url"
    assert f"  - {key}: is no URL of a service: write https://… (or http://…)" in refusal(key, url)


def test_all_mistakes_are_told_at_once():
    raw = changed("base.modle", "x") | {"budget_usd": "much"}
    with pytest.raises(ConfigError) as caught:
        check_config(raw)
    assert {"base.modle", "budget_usd"} <= {line.split(":")[0].strip("- ") for line in str(caught.value).splitlines()}


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("tiers.0.name", "gpt-5", "must start with 'answer-key'"),
        ("tiers.0.answer_key", None, "go together"),
        ("tiers.0.endpoints.0.base_url", "https://api.openai.com/v1", "go together"),
        ("tiers.0.endpoints", [{"base_url": "answer-key"}, {"base_url": "https://a/v1"}], "go together"),
    ],
)
def test_a_teacher_that_replays_answers_cannot_pass_for_a_real_one(path, value, expected):
    message = refusal(path, value)
    assert "- tiers.0: " in message
    assert expected in message


def test_configs_are_immutable():
    config = check_config(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3


def test_files_that_are_no_config_are_refused_in_words(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the config .*nothing\.yaml: No such file"):
        load_config(tmp_path / "nothing.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("tiers: [1, 2")
    with pytest.raises(ConfigError, match=r"bad\.yaml is not valid YAML"):
        load_config(bad)
    bad.write_bytes("domain: café".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"bad\.yaml is not UTF-8 text"):
        load_config(bad)
    bad.write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match="must hold a mapping with the keys domain, seed"):
        load_config(bad)
    bad.write_text("")
    with pytest.raises(ConfigError, match="must hold a mapping"):
        load_config(bad)


def test_a_repeated_key_is_named_with_its_lines(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + "router:\n  hidden: 32\n  epochs: 3\n  hidden: 64\n")
    last = len(path.read_text().splitlines())
    with pytest.raises(
        ConfigError, match=rf"c\.yaml, line {last}: the key hidden is in line {last - 2} already; keep one"
    ):
        load_config(path)
    path.write_text(f"seed: 1\n{yaml.safe_dump(MINIMAL)}seed: 2\n")
    with pytest.raises(ConfigError, match="the key seed is in line 1 already"):
        load_config(path)
    merged = (
        "tasks:\n  train: &t {count: 4, sources: [{benchmark: arc}]}\n  validation: {<<: *t, count: 5}\n  test: *t\n"
    )
    path.write_text(yaml.safe_dump({k: v for k, v in MINIMAL.items() if k != "tasks"}) + merged)
    assert load_config(path).tasks.validation.count == 5


def test_numbers_as_people_write_them_are_read(tmp_path):
    """PyYAML takes 1e-3 for a string and 47_000_000 for a number; both must work."""
    path = tmp_path / "c.yaml"
    text = (
        yaml.safe_dump(MINIMAL) + "training: {lora: {learning_rate: 1e-3}}\ncompression: {target_bytes: 47_000_000}\n"
    )
    path.write_text(text)
    config = load_config(path)
    assert config.training.lora.learning_rate == 1e-3
    assert config.compression.target_bytes == 47_000_000


def test_execution_is_apart_so_that_fingerprints_can_leave_it_out():
    """Every section that a fingerprint may take is the same whatever the execution."""
    one, other = check_config(MINIMAL), check_config(changed("execution.student_tokens", 7))
    assert one.execution != other.execution
    for section in set(Config.model_fields) - {"execution"}:
        assert fingerprint(x=getattr(one, section)) == fingerprint(x=getattr(other, section))


def tasks_of(**more):
    """In place of `load_tasks`: one task of each split, with these fields."""

    def tasks(config, split):
        asked = (Message("user", split),)
        return [Task(f"t/{split}", "reasoning_gym", "reasoning", split, asked, config.seed, **more)]

    return tasks


@pytest.fixture
def fingerprints(monkeypatch):
    """Of every job of a config whose tasks and base cost nothing."""
    monkeypatch.setattr(_runs, "load_tasks", tasks_of())
    monkeypatch.setattr(_runs, "base_sha256", lambda base: base.model)

    def found(config):
        runs = _runs.Runs(config)
        return {job: runs.run(job).fingerprint for job in JOBS}

    return found


def test_runs_of_the_pipeline_do_not_depend_on_execution(fingerprints):
    plain = fingerprints(check_config(MINIMAL))
    for key, value in (("execution.student_tokens", 7), ("execution.use_gpu", True), ("execution.train_workers", 2)):
        assert fingerprints(check_config(changed(key, value))) == plain
    for key, value, first in (
        ("seed", 18, "test_domain"),
        ("base.model", "other", "test_domain"),
        ("tiers.0.temperature", 0.5, "generate_tier1"),
        ("tiers.2.max_tokens", 9, "generate_tier3"),
        ("probe.folds", 3, "test_tier1"),
        ("training.lora.rank", 8, "train_modifier"),
        ("compression.trials", 3, "compress_modifier"),
        ("router.hidden", 8, "train_router"),
    ):
        other = fingerprints(check_config(changed(key, value)))
        changed_jobs = [job for job in JOBS if other[job] != plain[job]]
        assert changed_jobs == list(JOBS[JOBS.index(first) :]), key
    assert fingerprints(check_config(changed("tiers.0.input_usd_per_million", 9))) == plain, "a price decides no answer"
    assert fingerprints(check_config(changed("tiers.0.answer_key.latency_ms", 9))) == plain


@pytest.mark.parametrize(
    "field", [{"max_tokens": 9}, {"stop": ("\n",)}, {"difficulty": 2}, {"form": "likelihood", "choices": ("a", "b")}]
)
def test_how_a_task_is_asked_decides_all_runs(fingerprints, monkeypatch, field):
    plain = fingerprints(check_config(MINIMAL))
    monkeypatch.setattr(_runs, "load_tasks", tasks_of(**field))
    other = fingerprints(check_config(MINIMAL))
    assert not set(plain.items()) & set(other.items())


def test_what_a_judge_says_decides_the_tiers_and_its_limits_and_prices_do_not(fingerprints):
    model = {"name": "judge", "endpoints": [{"base_url": "https://a/v1"}]}
    model |= {"input_usd_per_million": 1, "output_usd_per_million": 1}

    def judged(more=None, **judge):
        return fingerprints(check_config(changed("judge", {"model": model | (more or {}), **judge})))

    plain = judged()
    assert judged({"input_usd_per_million": 2, "retries": 9, "budget_usd": 3, "timeout_s": 5}) == plain
    assert judged({"endpoints": [{"base_url": "https://a/v1", "requests_per_minute": 5, "api_key_env": "K"}]}) == plain
    for other in (judged({"name": "another"}), judged(rubric="short is good")):
        assert other["test_domain"] == plain["test_domain"]
        assert other["generate_tier1"] != plain["generate_tier1"]


@pytest.mark.parametrize(
    ("training", "execution", "said"),
    [
        ({"lora": {"freeze_a": True, "lora_plus": 4}}, {}, "training.lora: lora_plus sets the rates of A and B apart"),
        ({"lora": {"init": "pissa", "freeze_a": True}}, {}, "training.lora: init: pissa trains A and B"),
        ({"lora": {"init": "pissa", "dora": True}}, {}, "set freeze_a and dora to false"),
        ({"lora": {"init": "pissa"}, "zero_stage": 3}, {}, "need whole weights on every worker"),
        ({"lora": {"dora": True}, "zero_stage": 3}, {}, "need whole weights on every worker"),
        ({"lora": {"init": "pissa"}, "base_bits": 4}, {}, "takes the base's weights apart"),
        ({"lora": {"dora": True}, "base_bits": 8}, {}, "set base_bits to 4 or 16, dora false, or execution.use_gpu"),
        ({"validation": {"keep": "best_accuracy"}}, {}, "training.validation: keep: best_accuracy needs answers"),
        ({"validation": {"tasks": 0, "keep": "best_loss"}}, {}, "keep: best_loss and patience need validation tasks"),
        ({"validation": {"tasks": 0, "patience": 2}}, {}, "keep: best_loss and patience need validation tasks"),
        ({"zero_stage": 3, "validation": {"answered": 8}}, {}, "set zero_stage below 3"),
        ({"offload": True}, {}, "training: offload is DeepSpeed ZeRO's: set zero_stage to 1, 2 or 3"),
        (
            {},
            {"train_workers": 2, "train_workers_min": 3},
            "train_workers_min 3 is more than execution.train_workers 2",
        ),
        ({"zero_stage": 3}, {"compile": True}, "execution.compile does not go together with training.zero_stage 3"),
        ({"trackers": ["comet"]}, {}, "training.trackers.0: Input should be 'mlflow' or 'wandb'"),
    ],
)
def test_training_options_that_do_not_go_together_are_refused(training, execution, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        check_config(MINIMAL | {"training": training, "execution": execution})


@pytest.mark.parametrize("more", [{"execution": {"use_gpu": True}}, {"base": {"model": "x", "dtype": "float32"}}])
def test_weights_in_8_bits_are_for_cpus_and_bfloat16(more):
    serving = {"serving": {"weights": "int8"}}
    assert check_config(MINIMAL | serving).serving.weights == "int8"
    with pytest.raises(ConfigError, match=re.escape("serving.weights int8 is for CPUs and a base in bfloat16")):
        check_config(MINIMAL | serving | more)
