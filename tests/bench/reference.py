"""The usual recipe on the same base and data: transformers' Trainer with PEFT and bitsandbytes, or TRL with packing.

    python tests/bench/reference.py --dims llama-2-7b --steps 40 --gradient-checkpointing --out result.json

As guides to QLoRA have it: NF4 with double quantisation, `prepare_model_for_kbit_training`, batch 4 × accumulation 4,
bf16, paged 8-bit AdamW, rows padded to the longest of their batch. Updates see the rows that Graft's would see, in the
same order. Real tokens are counted, padding is not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from graft_worker.training.batches import Split, update_rows
from graft_worker.training.versions import versions
from tests.bench.train_once import DIMS, WORKLOADS, command_line, make_base, make_workload

PER_DEVICE, ACCUMULATION, SEED = 4, 4, 42
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


class Moments(TrainerCallback):  # type: ignore[misc]
    """When each optimizer step was done."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """The first step's beginning."""
        if not self.at:
            self.at.append(time.monotonic())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Wait for the device, then look at the clock."""
        torch.cuda.synchronize()
        self.at.append(time.monotonic())


class InOrder(Trainer):  # type: ignore[misc]
    """Takes the rows as they lie."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def main() -> None:
    """Load, train, report."""
    arguments = _arguments()
    arguments.workspace.mkdir(parents=True, exist_ok=True)
    base = make_base(arguments.workspace / arguments.dims, arguments.dims)
    split = Split.load(make_workload(arguments.workspace, arguments.workload, DIMS[arguments.dims]["vocab_size"]))
    model = load(base, arguments)
    moments = Moments()
    train = with_trl if arguments.trl else with_trainer
    tokens, losses = train(model, split, moments, arguments)
    speeds = [
        count / (after - before) for count, before, after in zip(tokens, moments.at, moments.at[1:], strict=False)
    ]
    result = {
        "tokens_per_second": round(statistics.median(speeds[len(speeds) // 2 :]), 1),
        "steps": len(speeds),
        "losses": losses,
        "memory": {
            "reserved_peak_bytes": torch.cuda.max_memory_reserved(),
            "allocated_peak_bytes": torch.cuda.max_memory_allocated(),
        },
        "versions": versions(),
        "command": command_line(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "losses"}, indent=1))


def load(base: Path, arguments: argparse.Namespace) -> Any:
    """Load the base in 4 bits and attach the adapter, line by line as guides to QLoRA do."""
    model = AutoModelForCausalLM.from_pretrained(
        base,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=True,
        ),
        dtype=torch.bfloat16,
        device_map={"": 0},
    )
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=arguments.gradient_checkpointing)
    model.config.use_cache = False
    targets = [*ATTENTION, *(MLP if arguments.all_linear else [])]
    torch.manual_seed(SEED)
    lora = LoraConfig(
        r=16, lora_alpha=32, lora_dropout=arguments.dropout, target_modules=targets, bias="none", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, lora)


def with_trainer(
    model: Any, split: Split, moments: Moments, arguments: argparse.Namespace
) -> tuple[list[int], list[float]]:
    """Train; return the tokens and the loss of each update."""
    per_update = PER_DEVICE * ACCUMULATION
    updates = [update_rows(split, step, sequences_per_update=per_update, seed=SEED) for step in range(arguments.steps)]
    rows = [split.input_ids[split.offsets[row] : split.offsets[row + 1]] for row in np.concatenate(updates)]
    trainer = InOrder(
        model=model,
        args=TrainingArguments(**_settings(arguments), per_device_train_batch_size=PER_DEVICE,
                               gradient_accumulation_steps=ACCUMULATION),
        train_dataset=[{"input_ids": torch.from_numpy(row.astype(np.int64))} for row in rows],
        data_collator=_padded,
        callbacks=[moments],
    )  # fmt: skip
    trainer.train()
    return [int(split.lengths[rows].sum()) for rows in updates], _losses(trainer)


def with_trl(
    model: Any, split: Split, moments: Moments, arguments: argparse.Namespace
) -> tuple[list[int], list[float]]:
    """TRL with packing: rows as long as the cap, one in place of the average sequences that fill it."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from tests.factories import make_tokenizer

    cap = WORKLOADS[arguments.workload]["cap"]
    rows = max(1, round(PER_DEVICE * ACCUMULATION * float(split.lengths.mean()) / cap))
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    ids = [split.input_ids[a:b].tolist() for a, b in zip(split.offsets, split.offsets[1:], strict=False)]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**_settings(arguments), per_device_train_batch_size=rows, gradient_accumulation_steps=1,
                       packing=True, max_length=cap, eos_token=None),
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        processing_class=tokenizer,
        callbacks=[moments],
    )  # fmt: skip
    trainer.train()
    return [rows * cap] * arguments.steps, _losses(trainer)


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "output_dir": str(arguments.workspace / "reference"),
        "max_steps": arguments.steps,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": -(-3 * arguments.steps // 100),
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "bf16": True,
        "optim": "paged_adamw_8bit",
        "gradient_checkpointing": arguments.gradient_checkpointing,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "seed": SEED,
    }


def _padded(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    ids = [row["input_ids"] for row in rows]
    mask = [torch.ones_like(row) for row in ids]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad(mask, batch_first=True),
        "labels": pad(ids, batch_first=True, padding_value=-100),
    }


def _losses(trainer: Any) -> list[float]:
    return [round(line["loss"], 4) for line in trainer.state.log_history if "loss" in line]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", choices=sorted(DIMS), default="llama-2-7b")
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="a")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--all-linear", action="store_true")
    parser.add_argument("--trl", action="store_true")
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--workspace", type=Path, default=Path("/tmp/graft-bench"))
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
