"""Merging: the full-precision base with the adapter in its weights, as anyone can load it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from graft_shared.jobs import FailureReason
from graft_worker.merging import merge as merging
from graft_worker.protocol import (
    REQUEST_NAME,
    Event,
    ExitCode,
    FailureEvent,
    MergedEvent,
    MergeRequest,
    parse_event,
)
from tests.factories import make_tiny_base

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_adapter(base: Path, folder: Path) -> Path:
    """An adapter as training leaves it, with weights that change what the base says."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def a_request(base: Path, adapter: Path) -> MergeRequest:
    return MergeRequest(
        job_id="ftjob-test",
        base_path=str(base),
        base_model="graft/tiny",
        base_revision="sha256-test",
        adapter_path=str(adapter),
    )


def run_merging(workdir: Path, request: MergeRequest, *, log: str = os.devnull) -> tuple[int, list[Event]]:
    workdir.mkdir(exist_ok=True)
    (workdir / REQUEST_NAME).write_text(request.model_dump_json())
    command = [sys.executable, "-m", "graft_worker.merging", str(workdir)]
    with Path(log).open("wb") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, check=False)
    return done.returncode, [parse_event(line) for line in done.stdout.decode().splitlines()]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        said: torch.Tensor = model(input_ids=torch.arange(5, 40)[None]).logits.float()
    return said


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_model_says_what_base_and_adapter_say(tmp_path: Path, tied: bool) -> None:
    base = make_tiny_base(tmp_path / "base", tie_word_embeddings=tied)
    adapter = make_adapter(base, tmp_path / "adapter")
    code, events = run_merging(tmp_path / "work", a_request(base, adapter))
    assert code == ExitCode.DONE
    merged = events[-1]
    assert isinstance(merged, MergedEvent)
    assert merged.proof["logits_difference"] < 1e-3
    alone = AutoModelForCausalLM.from_pretrained(base)
    untouched = logits(alone)
    together = logits(PeftModel.from_pretrained(alone, adapter))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "work" / "merged")
    torch.testing.assert_close(logits(loaded), together, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together, untouched, rtol=1e-1, atol=1e-1), "the adapter does something"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "work" / "merged")
    assert tokenizer("hello")["input_ids"] == AutoTokenizer.from_pretrained(base)("hello")["input_ids"]


def test_weights_keep_the_type_of_the_base(tmp_path: Path) -> None:
    base = make_tiny_base(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    adapter = make_adapter(base, tmp_path / "adapter")
    merging.merge(a_request(base, adapter), tmp_path / "merged")
    (shard,) = (tmp_path / "merged").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(shard).values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_base_that_the_machine_cannot_hold_is_refused_with_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_tiny_base(tmp_path / "base")
    monkeypatch.setattr(merging, "_ROOM", 1e9)
    with pytest.raises(merging.NoRoom, match=r"needs \d+ MiB of memory, and \d+ MiB are free"):
        merging.merge(a_request(base, make_adapter(base, tmp_path / "adapter")), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_merged_model_that_says_something_else_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_tiny_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self, **_: self.unload(), raising=False)
    with pytest.raises(merging.NotMerged, match="away from those of base and adapter"):
        merging.merge(a_request(base, adapter), tmp_path / "merged")


def test_a_disk_that_is_full_is_told_as_such(tmp_path: Path) -> None:
    base = make_tiny_base(tmp_path / "base")
    merged = tmp_path / "work" / "merged"
    merged.mkdir(parents=True)
    (merged / "README.md").symlink_to("/dev/full")
    request = a_request(base, make_adapter(base, tmp_path / "adapter"))
    code, events = run_merging(tmp_path / "work", request, log="/dev/full")
    assert code == ExitCode.CRASHED
    failure = events[-1]
    assert isinstance(failure, FailureEvent) and failure.reason is FailureReason.DISK_FULL


def test_weights_that_are_no_numbers_are_not_merged(tmp_path: Path) -> None:
    base = make_tiny_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    from safetensors.torch import save_file

    weights = load_file(adapter / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, adapter / "adapter_model.safetensors")
    code, events = run_merging(tmp_path / "work", a_request(base, adapter))
    assert code == ExitCode.CRASHED
    failure = events[-1]
    assert isinstance(failure, FailureEvent) and failure.reason is FailureReason.CRASH
