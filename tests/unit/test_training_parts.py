"""What the trainer decides before it computes: which rows, how they are packed, when to save and to evaluate."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graft_shared.catalogue import ModelShape
from graft_shared.memory import SIZE_STEP, Recompute, TrainingPlan, estimate, pinned_bytes, size_for
from graft_shared.specs import JobSpec, Optim, Training
from graft_worker.training import host_memory, layers
from graft_worker.training.batches import Split, largest_microbatch, microbatches, update_rows
from graft_worker.training.expectation import expectation_of
from graft_worker.training.graphs import empty, fill, of_short_sequences
from graft_worker.training.schedule import evaluation_is_due, save_is_due, warmup_steps
from tests.factories import make_tiny_base

CPU = torch.device("cpu")


def a_split(*rows: list[int], mask: list[int] | None = None) -> Split:
    tokens = [token for row in rows for token in row]
    learnt = np.array(mask if mask is not None else [1] * len(tokens), np.uint8)
    return Split(np.array(tokens, np.int32), learnt, np.cumsum([0, *(len(row) for row in rows)]))


def test_a_sequence_teaches_nothing_by_its_first_token() -> None:
    split = a_split([5, 6, 7], [8], [9, 10], mask=[1, 0, 1, 1, 1, 1])
    assert split.learnt_rows.tolist() == [0, 2]
    (batch,) = microbatches(split, np.arange(3), budget=6, packing=True, device=CPU)
    assert batch.input_ids.tolist() == [[5, 6, 7, 9, 10, 8]]
    assert batch.targets.tolist() == [7, 10]
    assert batch.predictors.tolist() == [1, 3]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch.cu_seq_lens.tolist() == [0, 3, 5, 6]


@given(tokens=st.integers(1, 16_384))
def test_a_microbatch_is_filled_up_a_little_to_one_of_few_sizes(tokens: int) -> None:
    size = size_for(tokens)
    assert tokens <= size < tokens + max(SIZE_STEP, tokens / 16)
    assert size % SIZE_STEP == 0
    assert size_for(size) == size


@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=12))
def test_what_is_filled_up_covers_every_token_by_sequences_that_attention_was_told_of(lengths: list[int]) -> None:
    split = a_split(*([[7] * length for length in lengths]))
    (batch,) = microbatches(split, np.arange(len(lengths)), budget=sum(lengths), packing=True, device=CPU)
    size, sequences = size_for(batch.real_tokens), 1 << len(batch.cu_seq_lens).bit_length()
    held = empty(batch, size, sequences)
    fill(held, batch)
    for filled in (held, of_short_sequences(batch, size)):
        borders = filled.cu_seq_lens.tolist()
        assert (borders[0], borders[-1]) == (0, size)
        assert all(0 <= after - before <= max(*lengths, SIZE_STEP) for before, after in pairwise(borders))
    assert held.input_ids[0, : batch.real_tokens].tolist() == batch.input_ids[0].tolist()
    assert held.cu_seq_lens.tolist()[: len(batch.cu_seq_lens)] == batch.cu_seq_lens.tolist()


def test_there_are_at_most_32_sizes_to_an_octave() -> None:
    for low in (1024, 2048, 4096, 8192):
        assert len({size_for(tokens) for tokens in range(low + 1, 2 * low + 1)}) <= 32


def test_no_microbatch_is_larger_than_the_largest() -> None:
    split = a_split(*([[1] * length for length in (9, 30, 2, 7, 12)]))
    for budget in (30, 40, 100):
        largest = largest_microbatch(split, budget=budget, sequences_per_update=2)
        assert largest == min(42, budget)
        for rows in ([0, 1], [1, 4], [2, 3]):
            for batch in microbatches(split, np.array(rows), budget=budget, packing=True, device=CPU):
                assert batch.real_tokens <= largest


def test_empty_rows_are_passed_over() -> None:
    split = a_split([5, 6], [], [7, 8], [])
    (batch,) = microbatches(split, np.arange(4), budget=8, packing=True, device=CPU)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8]]
    assert list(microbatches(split, np.array([1, 3]), budget=8, packing=True, device=CPU)) == []


def test_without_packing_no_group_would_outgrow_the_budget_when_padded() -> None:
    rows = [[1] * length for length in (3, 9, 2, 2, 2, 12, 1)]
    batches = list(microbatches(a_split(*rows), np.arange(7), budget=12, packing=False, device=CPU))
    shapes = [(len(batch.cu_seq_lens) - 1, batch.max_length) for batch in batches]
    assert [count * longest <= 12 for count, longest in shapes] == [True] * len(shapes)
    assert sum(batch.real_tokens for batch in batches) == 31


def test_the_last_update_of_an_epoch_takes_what_is_left_and_the_next_epoch_another_order() -> None:
    split = a_split(*([[1, 2]] * 10))
    sizes = [len(update_rows(split, step, sequences_per_update=4, seed=1)) for step in range(6)]
    assert sizes == [4, 4, 2, 4, 4, 2]
    first, second = (
        [row for step in steps for row in update_rows(split, step, sequences_per_update=4, seed=1).tolist()]
        for steps in (range(3), range(3, 6))
    )
    assert sorted(first) == sorted(second)
    assert first != second


def test_warm_up_is_a_share_or_a_number_of_steps() -> None:
    assert warmup_steps(Training(warmup_ratio=0.03), 60) == 2
    assert warmup_steps(Training(warmup_ratio=0.03, warmup_steps=7), 60) == 7


def test_a_run_saves_every_eighth_and_every_minute_but_not_at_its_end() -> None:
    def due(step: int, *, unsaved: float = 0.0, last: float = 0.0) -> bool:
        return save_is_due(Training(), step, 80, seconds_unsaved=unsaved, last_save_seconds=last)

    assert [step for step in range(1, 81) if due(step)] == [10, 20, 30, 40, 50, 60, 70]
    assert due(11, unsaved=61)
    assert not due(11, unsaved=61, last=2)
    assert due(11, unsaved=101, last=2)
    assert not due(80, unsaved=1000)


def test_a_wanted_interval_between_checkpoints_is_kept() -> None:
    training = Training(save_steps=3)
    due = [step for step in range(1, 9) if save_is_due(training, step, 9, seconds_unsaved=999, last_save_seconds=0)]
    assert due == [3, 6]


def test_a_run_is_evaluated_before_it_begins_at_intervals_and_at_its_end() -> None:
    assert [step for step in range(11) if evaluation_is_due(Training(), step, 10)] == [0, 3, 6, 9, 10]
    assert [step for step in range(11) if evaluation_is_due(Training(eval_steps=4), step, 10)] == [0, 4, 8, 10]


def test_the_trainer_pins_what_the_estimate_says_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, whose streams and pinned memory are stand-ins: who asks for how much is the trainer's own code."""
    from transformers import AutoModelForCausalLM

    base = make_tiny_base(tmp_path, num_hidden_layers=3, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    plan = TrainingPlan(
        recompute=Recompute.OFFLOAD, recompute_every_n=1, microbatch_tokens=300, packing=True, optim=Optim.ADAMW_TORCH
    )
    asked: list[int] = []

    def pinned(numbers: int, dtype: torch.dtype) -> torch.Tensor:
        asked.append(numbers * dtype.itemsize)
        return torch.empty(numbers, dtype=dtype)

    stream = SimpleNamespace(wait_stream=print, wait_event=print, record_event=object)
    for module in (host_memory, layers):
        monkeypatch.setattr(module, "pinned", pinned)
    monkeypatch.setattr(host_memory, "_seen_by_gpu", lambda held: held)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    host_memory.keep_on_host(model.get_input_embeddings())
    with monkeypatch.context() as gpu:
        gpu.setattr(torch.cuda, "is_available", lambda: True)
        layers.arrange_layers(model.model, plan, backend=None, largest_microbatch=size_for(plan.microbatch_tokens))
    layers.require_input_gradients(model)
    for tokens in (200, 300):
        model(torch.zeros(1, tokens, dtype=torch.int64))
    shape = ModelShape.from_config(model.config.to_dict(), base_model="graft/tiny", revision="main")
    spec = JobSpec.model_validate({"base_model": "graft/tiny", "dataset": {"file": "file-a"}})
    needed = estimate(shape, spec, plan).host
    assert len(asked) == 1 + 3
    assert pinned_bytes(asked[0]) == needed["embeddings"]
    assert sum(map(pinned_bytes, asked[1:])) == needed["parked_inputs"]
    assert needed["paged_optimizer"] == 0


@pytest.mark.parametrize(
    ("planned", "is_planned", "tokens", "is_captured"),
    [
        (4096, True, 4096, True),
        (16_384, False, 16_384, False),
        (16_384, False, 1024, True),  # the data are short: graphs of so few tokens need less than was planned
        (8448, False, 8192, False),  # and of so many more
        (512, False, 512, False),  # there was too little memory for graphs
    ],
)
def test_microbatches_are_captured_as_planned_or_where_that_needs_no_more(
    planned: int, is_planned: bool, tokens: int, is_captured: bool
) -> None:
    config = {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": True,
    }  # fmt: skip
    spec = JobSpec.model_validate({"base_model": "a/b", "dataset": {"file": "file-a"}})
    plan = TrainingPlan(
        recompute=Recompute.OFFLOAD,
        recompute_every_n=1,
        microbatch_tokens=planned,
        packing=True,
        optim=Optim.PAGED_ADAMW_8BIT,
        cuda_graphs=is_planned,
    )
    found = expectation_of(config, spec, plan, tokens=tokens, evaluation_tokens=tokens)
    assert found.plan == dataclasses.replace(plan, microbatch_tokens=tokens, cuda_graphs=is_captured)
    shape = ModelShape.from_config(config, base_model="a/b", revision="main")
    assert found.peak_bytes is not None
    assert found.peak_bytes <= estimate(shape, spec, plan).expected_bytes
    unknown = expectation_of({"model_type": "gpt2"}, spec, plan, tokens=tokens, evaluation_tokens=tokens)
    assert unknown.peak_bytes is None
