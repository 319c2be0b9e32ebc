"""TRL's SFTTrainer on the same tokenised examples: a contender of perf/training.py, in TRL's own environment."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from datasets.table import InMemoryTable
from training_plain import Stopwatch, load_model, lora_config, read_job, validation_loss
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Watch(TrainerCallback):
    """Times the steps. With packing, examples per step are what the packed rows hold on average."""

    def __init__(self, job: dict[str, Any], validation: list[dict[str, Any]]) -> None:
        self.watch, self.validation = Stopwatch(job), validation
        self.seen: list[dict[str, Any]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        validate = lambda: validation_loss(model, self.validation, self.watch.job["device"])  # noqa: E731
        count = args.gradient_accumulation_steps
        batches, self.seen = self.seen[:count], self.seen[count:]  # they are collated ahead of their step
        if not self.watch.step(batches, validate):
            control.should_training_stop = True


def main() -> None:
    job, train, validation = read_job()
    settings = dict(job["trl"])
    packing = settings.get("packing", False)
    # Packed rows together have as many tokens as the opponents' step; unpacked, as many examples.
    if packing:
        length, rows = settings.pop("row", job["tokens_per_step"]), settings.pop("rows", 1)
        length = max(job["longest"], length)
        parts = -(-job["tokens_per_step"] // (length * rows))
        settings |= {"max_length": length, "packing_strategy": "bfd"}
        settings |= {"per_device_train_batch_size": rows, "gradient_accumulation_steps": parts}
    else:
        parts = -(-job["batch"] // job["micro_batch"])
        settings |= {"max_length": job["longest"], "per_device_train_batch_size": -(-job["batch"] // parts)}
        settings |= {"gradient_accumulation_steps": parts}
    rows = [{"input_ids": e["ids"], "completion_mask": [int(m) for m in e["mask"]]} for e in train]
    # Named: datasets' own hash of the rows pickles pyarrow, which fails on some Python versions.
    dataset = Dataset(InMemoryTable.from_pylist(rows), fingerprint="training-examples")
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            learning_rate=job["learning_rate"],
            lr_scheduler_type="constant",
            max_steps=job["steps"] + job["warmup_steps"] + 1,
            gradient_checkpointing=False,
            completion_only_loss=True,
            bf16=job["dtype"] == "bfloat16",
            use_cpu=job["device"] == "cpu",
            optim="adamw_torch_fused",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            **settings,
        )
        watch = Watch(job, validation)
        trainer = SFTTrainer(
            model=load_model(job),
            args=config,
            train_dataset=dataset,
            processing_class=AutoTokenizer.from_pretrained(job["model"]),
            peft_config=lora_config(job),
            callbacks=[watch],
        )
        count_batches(trainer, watch)
        trainer.train()
    watch.watch.report()


def count_batches(trainer: Any, watch: Watch) -> None:
    """Note what each batch holds: tokens that attention sees and labels that are learned."""
    collate = trainer.data_collator

    def counting(rows: list[dict[str, Any]]) -> Any:
        batch = collate(rows)
        learned = int((batch["labels"] != -100).sum())
        tokens = int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
        watch.seen.append({"ids": [0] * tokens, "mask": [True] * learned + [False] * (tokens - learned)})
        return batch

    trainer.data_collator = counting


torch.manual_seed(0)
if __name__ == "__main__":
    main()
