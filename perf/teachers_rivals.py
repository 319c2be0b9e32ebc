"""What one would install instead, on the same prompts and the same server: run by `teachers.py`, one tool at a time.

    python teachers_rivals.py TOOL URL PROMPTS CONCURRENCY

TOOL is curator, distilabel or ray; the last line printed is the number of answers and the seconds they took, the
start of the tool left out: for curator and distilabel from the call that generates, for ray.data.llm from the first
request that the server saw (see `teachers.py`).
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

PACKAGES = {
    "curator": ["bespokelabs-curator==0.1.31", "setuptools<81"],
    "distilabel": ["distilabel==1.5.3", "openai==3.54.0", "requests", "setuptools<81"],
}


def curator(url: str, prompts: list[str], concurrency: int) -> tuple[int, float]:
    """Bespoke curator, online mode."""
    os.environ |= {"OPENAI_API_KEY": "none", "CURATOR_DISABLE_CACHE": "1", "TELEMETRY_ENABLED": "false"}
    import litellm

    # it counts tokens with a table from the network; litellm, which it brings along, carries a copy
    os.environ["TIKTOKEN_CACHE_DIR"] = str(Path(litellm.__file__).parent / "litellm_core_utils" / "tokenizers")
    from bespokelabs import curator as tool

    unlimited = {"max_requests_per_minute": 10_000_000, "max_tokens_per_minute": 1_000_000_000}
    params = {"base_url": url, "max_concurrent_requests": concurrency, **unlimited}
    llm = tool.LLM(model_name="model-a", backend="openai", backend_params=params)
    began = time.monotonic()
    answers = llm(prompts)
    return len(getattr(answers, "dataset", answers)), time.monotonic() - began


def distilabel(url: str, prompts: list[str], concurrency: int) -> tuple[int, float]:
    """distilabel, a pipeline with one step of text generation."""
    from distilabel.models import OpenAILLM
    from distilabel.pipeline import Pipeline
    from distilabel.steps import LoadDataFromDicts
    from distilabel.steps.tasks import TextGeneration

    with Pipeline(name="perf") as pipeline:
        load = LoadDataFromDicts(data=[{"instruction": p} for p in prompts], batch_size=concurrency)
        llm = OpenAILLM(model="model-a", base_url=url, api_key="none")
        load >> TextGeneration(llm=llm, input_batch_size=concurrency)
    began = time.monotonic()
    answers = pipeline.run(use_cache=False)
    return len(answers["default"]["train"]), time.monotonic() - began


def ray(url: str, prompts: list[str], concurrency: int) -> tuple[int, float]:
    """ray.data.llm's HTTP processor with one actor; it has no setting for requests in flight."""
    import ray as tool
    from ray.data.llm import HttpRequestProcessorConfig, build_processor

    tool.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    config = HttpRequestProcessorConfig(url=f"{url}/chat/completions", concurrency=1, max_retries=3)

    def ask(row: dict[str, str]) -> dict[str, object]:
        return {"payload": {"model": "model-a", "messages": [{"role": "user", "content": row["item"]}]}}

    def read(row: dict[str, object]) -> dict[str, object]:
        return {"answer": row["http_response"]["choices"][0]["message"]["content"]}  # type: ignore[index]

    began = time.monotonic()
    answers = build_processor(config, preprocess=ask, postprocess=read)(tool.data.from_items(prompts)).take_all()
    return len(answers), time.monotonic() - began


if __name__ == "__main__":
    name, where, file, most = sys.argv[1:]
    with open(file) as f:
        asked = json.load(f)
    answered, seconds = {"curator": curator, "distilabel": distilabel, "ray": ray}[name](where, asked, int(most))
    print(json.dumps([answered, seconds]))
