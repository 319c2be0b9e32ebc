"""The server that one writes in half an hour: transformers' generate and PEFT behind a plain FastAPI.

    python perf/serving_plain.py BASE DTYPE PORT THREADS NAME=PEFT_FOLDER…

Knows nothing of Cascade. All adapters are loaded; a lock keeps requests apart, for the active adapter is the model's.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding

base, dtype, port, threads, *adapters = sys.argv[1:]
torch.set_num_threads(int(threads))
folders = dict(a.split("=", 1) for a in adapters)
tokenizer = AutoTokenizer.from_pretrained(base)
plain = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)).eval()
names = list(folders)
model = PeftModel.from_pretrained(plain, folders[names[0]], adapter_name=names[0])
for name in names[1:]:
    model.load_adapter(folders[name], adapter_name=name)
lock = threading.Lock()
api = FastAPI()


@api.get("/health")
def health() -> dict[str, str]:
    return {"status": "ok"}


@api.post("/v1/chat/completions")
def chat(body: dict[str, Any]) -> dict[str, Any]:
    inputs = tokenizer.apply_chat_template(
        body["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert isinstance(inputs, BatchEncoding)
    with lock, torch.inference_mode():
        model.set_adapter(body["model"])
        made = model.generate(
            **inputs, max_new_tokens=body["max_tokens"], do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
    ids = made[0, inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return {"choices": [{"message": {"content": text}}], "usage": {"completion_tokens": len(ids)}}


uvicorn.run(api, host="127.0.0.1", port=int(port), log_level="warning")
