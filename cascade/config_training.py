"""How modifiers are trained and compressed: their sections of the configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cascade.config_sections import Fraction, Positive, Section


class Lora(Section):
    """Shape and optimisation of a LoRA adapter."""

    rank: Positive = Field(16, description="of A and B, on every linear layer")
    alpha: float | None = Field(None, gt=0, description="the adapter is scaled by alpha / rank; null: twice the rank")
    learning_rate: float = Field(1e-3, gt=0, description="AdamW's highest, after warm-up")
    epochs: float = Field(3.0, gt=0, description="times that every example is seen; fractions are allowed")
    warmup_share: Fraction = Field(0.06, description="share of the steps in which the learning rate rises")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="how the learning rate falls after warm-up"
    )
    final_rate: Fraction = Field(0.05, description="share of the highest learning rate that it falls to at the end")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's")
    gradient_clip: float = Field(1.0, gt=0, description="largest norm of a step's gradient")
    tokens_per_step: Positive = Field(1024, description="packed tokens of one optimiser step, over all workers")
    max_length: Positive = Field(
        512, description="longest example in tokens, within the base's context; longer ones are refused, never cut"
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead of alpha / rank")
    lora_plus: float | None = Field(
        None, ge=1, description="LoRA+: how many times A's learning rate B learns at; null: as fast as A"
    )
    freeze_a: bool = Field(
        False, description="train B alone; A stays at its seeded start, which a modifier file stores as one number"
    )

    init: Literal["seeded", "pissa"] = Field(
        "seeded",
        description="where A and B start: seeded noise and zero, or the weight's own first singular vectors (PiSSA), "
        "which decomposes every layer at the start, computes more a step and leaves a file of twice the rank",
    )
    dora: bool = Field(
        False,
        description="train the length of every row of the weights apart (DoRA); stock PEFT loads such a modifier, but "
        "it is more than B A, which is all that compression and serving hold: `cascade run` refuses it, `cascade "
        "train-modifier` trains it",
    )

    @model_validator(mode="after")
    def _options_go_together(self) -> Lora:
        if self.init == "pissa" and (self.freeze_a or self.dora):
            raise ValueError("init: pissa trains A and B from the weight itself: set freeze_a and dora to false")
        if self.freeze_a and self.lora_plus is not None:
            raise ValueError("lora_plus sets the rates of A and B apart, but freeze_a leaves B alone: choose one")
        return self


class Probe(Section):
    """The short cross-fitted training that asks what the student still fails after a tier's data."""

    enabled: bool = Field(True, description="false: teacher verdicts alone decide what goes to the next tier")
    folds: int = Field(2, ge=2, description="parts; each is answered by a probe trained on the others")
    lora: Lora = Field(Lora(rank=8, epochs=2), description="shape and optimisation of a probe")


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

    lora: Lora = Field(Lora(), description="shape and optimisation of the modifier")
    validation: Validation = Field(Validation(), description="looks at held-out tasks on the way")
    replay_share: Fraction = Field(0.0, description="passed tasks mixed in with the student's own answers, per example")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        0,
        description="DeepSpeed ZeRO, what is spread over the workers: 1 optimiser state, 2 gradients, 3 parameters too",
    )
    offload: bool = Field(
        False, description="optimiser state (and with zero_stage 3, parameters) in CPU memory; needs zero_stage 1 to 3"
    )
    base_bits: Literal[16, 8, 4] = Field(
        16,
        description="of the frozen base while the modifier is trained on it: 16 as base.dtype says, 8 (LLM.int8) or 4 "
        "(NF4, QLoRA) by bitsandbytes: less memory, more time; the modifier is tested on the base as it is",
    )
    checkpoint_steps: Positive = Field(20, description="optimiser steps between checkpoints")
    gradient_checkpointing: bool = Field(
        False, description="compute activations again instead of keeping them: less memory, a third more time"
    )
    trackers: list[Literal["mlflow", "wandb"]] = Field(
        [], description="where figures go beside TensorBoard; each has its usual environment variables"
    )

    near_duplicates: Fraction = Field(
        0.8,
        description="Jaccard similarity of word 5-grams, of questions and of all that is said, from which on an "
        "example repeats an earlier one and goes",
    )

    @model_validator(mode="after")
    def _stage_allows_it(self) -> Training:
        if self.offload and not self.zero_stage:
            raise ValueError("offload is DeepSpeed ZeRO's: set zero_stage to 1, 2 or 3, or offload to false")
        if self.zero_stage == 3 and self.validation.answered:
            raise ValueError("validation.answered needs the whole base on every worker: set zero_stage below 3")
        if self.zero_stage == 3 and self.base_bits != 16:
            raise ValueError("zero_stage: 3 cannot spread a base of base_bits 8 or 4: set zero_stage below 3")
        if self.zero_stage == 3 and (self.lora.dora or self.lora.init == "pissa"):
            raise ValueError(
                "lora.dora and lora.init: pissa need whole weights on every worker: set zero_stage below 3"
            )
        if self.base_bits != 16 and self.lora.init == "pissa":
            raise ValueError("lora.init: pissa takes the base's weights apart, which base_bits 8 and 4 pack: set one")
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
    trials: Positive = Field(12, description="recipes that the search tries")
    halving: bool = Field(
        True,
        description="end trials that are behind after a quarter or half of held-out rows and keep less than keep_gain",
    )
    tolerance: float = Field(
        0.02, ge=0, description="share of validation tasks that may be lost, one standard error included"
    )
    choose: Literal["smallest", "best"] = Field(
        "smallest",
        description="the smallest within the tolerance, or within the size limits the nearest to the uncompressed one, "
        "unless another is surely more accurate",
    )
    keep_gain: Fraction = Field(
        0.99, description="choose smallest: share of the improvement in held-out loss that a small finalist must keep"
    )
    finalists: Positive = Field(2, description="candidates of the Pareto front whose verdicts are compared")
    recovery_steps: int = Field(
        0,
        ge=0,
        description="steps that train what the chosen one has left to answer as the uncompressed modifier does; taken "
        "if that brings it nearer",
    )
    recovery_rate: float = Field(
        0.01, gt=0, description="their learning rate, as a share of training.lora.learning_rate"
    )
