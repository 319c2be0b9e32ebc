"""The sections of the configuration about who answers what the student fails."""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from cascade.config_sections import Fraction, Positive, Section, Usd

ANSWER_KEY = "answer-key"
"""As an endpoint's base_url: the offline teacher that replays the tasks' own answer key (see `cascade.teachers`)."""


class Endpoint(Section):
    """One OpenAI-compatible endpoint, with the limits of its key."""

    base_url: str = Field(description=f"…/v1 of the service, or {ANSWER_KEY!r} for the offline teacher")
    api_key_env: str | None = Field(None, description="environment variable that holds the key; null: none is sent")
    requests_per_minute: Positive = Field(500, description="most requests a minute, over all actors")
    tokens_per_minute: Positive = Field(200_000, description="most tokens a minute in and out, over all actors")
    max_concurrency: Positive = Field(32, description="most requests in flight; fewer after a 429, then more again")

    @field_validator("base_url")
    @classmethod
    def _can_be_asked(cls, url: str) -> str:
        if url != ANSWER_KEY and not _is_http(url):
            raise ValueError(
                "is no URL of a service: write https://… (or http://…) with its host and, if it has one of its own, a "
                f"port from 1 to 65535; or {ANSWER_KEY}"
            )
        return url


def _is_http(url: str) -> bool:
    """Whether it is http or https, and names a host and no port that there cannot be."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return known and not re.search(r"\s", url)


class AnswerKey(Section):
    """The offline teacher: knows the answer key up to a difficulty, plausibly wrong beyond."""

    max_difficulty: Positive = Field(description="answers right up to this difficulty")
    slip_rate: Fraction = Field(0.0, description="share of the answers within its reach that it gets wrong")
    latency_ms: float = Field(20.0, ge=0, description="how long it waits before it answers")


class Teacher(Section):
    """A tier: a model, its price, its endpoints and its budget."""

    name: str = Field(description="model name as the endpoint knows it; offline teachers must start with 'answer-key'")
    endpoints: list[Endpoint] = Field(
        min_length=1, description="or keys: their limits add up, and where one is down the others take over"
    )
    input_usd_per_million: Usd = Field(description="price of a million prompt tokens")
    output_usd_per_million: Usd = Field(description="price of a million completion tokens")
    cached_input_usd_per_million: Usd | None = Field(None, description="price of cached prompt tokens; null: as input")
    price_source: str = Field("", description="where the prices are from and of which day")
    system: str | None = Field(None, description="system message put before the task's messages")
    temperature: float | None = Field(None, ge=0, description="null leaves the model's default (GPT-5 takes no other)")
    max_tokens: Positive = Field(1024, description="upper limit of an answer's tokens, what it thinks included")
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
    timeout_s: float = Field(120.0, gt=0, description="seconds to wait for one answer")
    retries: int = Field(5, ge=0, description="per request, on 5xx, timeouts and lost connections; a 429 is waited out")
    budget_usd: Usd | None = Field(None, description="hard limit for this tier; null: the domain's budget alone")
    expected_share: Fraction | None = Field(
        None, description="share of the failures that this tier is expected to solve; used by the plan alone"
    )
    answer_key: AnswerKey | None = Field(None, description="what an offline teacher knows; for `base_url: answer-key`")

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

    enabled: bool = Field(False, description="predict at all")
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
