"""What a spec accepts, refuses and echoes."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from graft_shared.specs import JobSpec, Training, Validation

MINIMAL: dict[str, Any] = {"base_model": "meta-llama/Llama-2-7b-hf", "dataset": {"file": "file-abc"}}


def spec(**changes: Any) -> JobSpec:
    return JobSpec.model_validate({**MINIMAL, **changes})


def test_two_lines_are_a_whole_job() -> None:
    made = spec()
    assert made.training.sequences_per_update == 16
    assert made.training.optim == "paged_adamw_8bit"
    assert made.quantization.bnb_4bit_quant_type == "nf4"


def test_a_normalised_spec_reads_back_as_itself() -> None:
    body = spec(lora={"target_modules": ["q_proj"]}, gpu={"class": "24gb"}).model_dump(mode="json", by_alias=True)
    assert body["gpu"] == {"class": "24gb", "count": 1}
    assert JobSpec.model_validate(body).model_dump(mode="json", by_alias=True) == body


def test_the_guides_own_configuration_is_understood() -> None:
    made = spec(
        quantization={
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_use_double_quant": True,
        },
        lora={
            "r": 16,
            "lora_alpha": 32,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "lora_dropout": 0.05,
            "bias": "none",
            "task_type": "CAUSAL_LM",
        },
        training={
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 4,
            "learning_rate": 2e-4,
            "num_train_epochs": 3,
            "fp16": False,
            "bf16": True,
            "logging_steps": 10,
            "gradient_checkpointing": True,
        },
    )
    assert made.lora.lora_alpha == 32
    assert made.training.logging_steps == 10


@pytest.mark.parametrize(
    ("given", "section", "name", "value"),
    [
        ({"training": {"max_seq_length": 512}}, "training", "max_length", 512),
        ({"training": {"n_epochs": 2}}, "training", "num_train_epochs", 2),
        ({"training": {"optim": "paged_adamw"}}, "training", "optim", "paged_adamw_32bit"),
        ({"training": {"optim": "adamw_bnb_8bit"}}, "training", "optim", "adamw_8bit"),
        ({"training": {"fp16": True}}, "quantization", "bnb_4bit_compute_dtype", "float16"),
        ({"training": {"bf16": True}}, "quantization", "bnb_4bit_compute_dtype", "bfloat16"),
        ({"lora": {"rank": 8}}, "lora", "r", 8),
    ],
)
def test_aliases_are_echoed_under_one_name(given: dict[str, Any], section: str, name: str, value: Any) -> None:
    assert spec(**given).model_dump(mode="json")[section][name] == value


@pytest.mark.parametrize(("epochs", "steps"), [(1, 3), (0.5, 2), (2.4, 8), (0.01, 1)])
def test_a_fraction_of_an_epoch_is_rounded_up_to_whole_updates(epochs: float, steps: int) -> None:
    training = Training(num_train_epochs=epochs, per_device_train_batch_size=4, gradient_accumulation_steps=1)
    assert training.total_steps(10) == steps
    assert Training(num_train_epochs=epochs, max_steps=7).total_steps(10) == 7


@pytest.mark.parametrize(("share", "rows", "held_out"), [(0.1, 1000, 100), (0.05, 17, 1), (0.01, 10, 1), (0.9, 2, 1)])
def test_a_share_is_held_out_and_at_least_a_row_on_each_side(share: float, rows: int, held_out: int) -> None:
    assert Validation(split=share).rows_held_out(rows) == held_out
    assert Validation(file="file-a").rows_held_out(rows) == 0


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"training": {"fp16": True, "bf16": True}}, "never both"),
        ({"training": {"max_seq_length": 512, "max_length": 256}}, "disagree"),
        ({"training": {"bf16": True}, "quantization": {"bnb_4bit_compute_dtype": "float16"}}, "disagree"),
        ({"lora": {"task_type": "SEQ_CLS"}}, "CAUSAL_LM"),
        ({"lora": {"target_modules": []}}, "all-linear"),
        ({"lora": {"r": 0}}, "greater than or equal to 1"),
        ({"gpu": {"count": 2}}, "several are not supported"),
        ({"dataset": {}}, "exactly one of"),
        ({"dataset": {"file": "file-a", "hub": "a/b"}}, "exactly one of"),
        ({"dataset": {"file": "file-a", "split": "train"}}, "belong to 'hub'"),
        ({"dataset": {"uri": "file:///etc/passwd"}}, "pattern"),
        ({"validation": {"split": 0.1, "file": "file-b"}}, "exactly one of"),
        ({"validation": {"split": 1.0}}, "less than 1"),
        ({"base_model": "../../etc"}, "pattern"),
        ({"base_model": "/etc/passwd"}, "pattern"),
        ({"training": {"learning_rate": float("nan")}}, "finite"),
        ({"training": {"early_stopping_patience": 2}}, "needs 'validation'"),
        ({"training": {"trust_remote_code": True}}, "Extra inputs"),
        ({"trust_remote_code": True}, "Extra inputs"),
        ({"metadata": {f"k{number}": "v" for number in range(17)}}, "at most 16"),
        ({"metadata": {"a b": "v"}}, "no blanks"),
        ({"metadata": {"a": "v" * 513}}, "at most 512"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_reason(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as refused:
        spec(**given)
    assert says in str(refused.value)
