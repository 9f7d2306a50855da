"""Preparing: what is learnt and what is not, on a real tokenizer, in a process that never loads torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from safetensors.numpy import load_file

from graft_shared.errors import InvalidParameter, InvalidTrainingFile
from graft_shared.jobs import FailureReason
from graft_shared.rows import RowKind
from graft_shared.specs import JobSpec, Validation
from graft_worker.importing import import_hub_dataset
from graft_worker.preparing.prepare import RowSource, split
from graft_worker.preparing.rendering import Piece, render
from graft_worker.preparing.tokens import TokenRows, tokenize
from graft_worker.protocol import (
    REQUEST_NAME,
    Event,
    ExitCode,
    FailureEvent,
    PreparedEvent,
    PrepareRequest,
    WarningEvent,
    parse_event,
)
from tests.factories import make_metaspace_tokenizer, make_tokenizer

TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
FORGETFUL = (  # keeps only the last answer, as templates that strip thinking do
    "{% for message in messages %}{% if message['role'] != 'assistant' or loop.last %}"
    "[{{ message['role'] }}]{{ message['content'] }};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TURNS = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "2"},
]


@dataclass(frozen=True)
class Prepared:
    """A preparing child that has left."""

    code: int
    events: list[Event]
    folder: Path

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(path)
    return path


def run_preparing(
    folder: Path,
    tokenizer_path: Path,
    rows: list[dict[str, Any]],
    *,
    held_out: list[dict[str, Any]] | None = None,
    **spec: Any,
) -> Prepared:
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if held_out is not None:
        (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    made = JobSpec.model_validate({"base_model": "graft/tiny", "dataset": {"file": "file-a"}, **spec})
    request = PrepareRequest(
        base_commit=None,
        job_id="ftjob-test",
        spec=made.model_dump(mode="json", by_alias=True),
        tokenizer_path=str(tokenizer_path),
        max_positions=512,
        train_file=str(folder / "rows.jsonl"),
        validation_file=None if held_out is None else str(folder / "held_out.jsonl"),
    )
    (folder / REQUEST_NAME).write_text(request.model_dump_json())
    blocked = folder / "blocked"
    blocked.mkdir()
    (blocked / "torch.py").write_text("raise ImportError('preparing needs no torch')\n")
    environment = {**os.environ, "PYTHONPATH": str(blocked), "USE_TORCH": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "graft_worker.preparing", str(folder)], capture_output=True, env=environment, check=False
    )
    assert done.stdout, done.stderr.decode()
    return Prepared(done.returncode, [parse_event(line) for line in done.stdout.decode().splitlines()], folder)


def learnt_text(tokens: TokenRows, tokenizer: Any, row: int = 0) -> str:
    ids, mask = tokens.ids[row], tokens.masks[row].astype(bool)
    return str(tokenizer.decode(ids[mask]))


def test_only_the_answer_and_the_end_are_learnt() -> None:
    tokenizer = make_tokenizer()
    for kind, row in (
        (RowKind.PROMPT_COMPLETION, {"prompt": "What?", "completion": " The cat."}),
        (RowKind.ALPACA, {"instruction": "What?", "input": "Here.", "output": " The cat."}),
    ):
        tokens = tokenize([render(kind, row, tokenizer)], tokenizer, max_length=512, learn_all=False)
        assert learnt_text(tokens, tokenizer) == " The cat.</s>"
        assert "What?" in tokenizer.decode(tokens.ids[0])


def test_the_tokens_of_a_prompt_are_those_that_the_model_will_meet_when_it_is_used() -> None:
    tokenizer = make_tokenizer()
    row = render(RowKind.PROMPT_COMPLETION, {"prompt": "What does the ", "completion": "cat say?"}, tokenizer)
    tokens = tokenize([row], tokenizer, max_length=512, learn_all=False)
    prompt = tokenizer("What does the ", add_special_tokens=False)["input_ids"]
    assert tokens.ids[0][: len(prompt)].tolist() == prompt


def test_a_tokenizer_that_begins_every_text_with_a_space_puts_none_before_an_answer() -> None:
    tokenizer = make_metaspace_tokenizer()
    row = render(RowKind.PROMPT_COMPLETION, {"prompt": "What?", "completion": "cat"}, tokenizer)
    tokens = tokenize([row], tokenizer, max_length=512, learn_all=False)
    assert tokens.ids[0][:-1].tolist() == tokenizer("What?cat", add_special_tokens=False)["input_ids"]
    assert learnt_text(tokens, tokenizer) == "cat</s>"


def test_pieces_are_told_apart_in_a_batch_of_rows_of_every_shape() -> None:
    tokenizer = make_metaspace_tokenizer()
    tokenizer.chat_template = TEMPLATE
    chat = render(RowKind.MESSAGES, {"messages": TURNS}, tokenizer)
    pair = render(RowKind.PROMPT_COMPLETION, {"prompt": "What?", "completion": "cat"}, tokenizer)
    text = render(RowKind.TEXT, {"text": "the cat says"}, tokenizer)
    tokens = tokenize([text, chat, pair], tokenizer, max_length=512, learn_all=False)
    assert [learnt_text(tokens, tokenizer, row) for row in range(3)] == ["the cat says</s>", "1;2;", "cat</s>"]


@pytest.mark.parametrize("kind", [RowKind.MESSAGES, RowKind.SHAREGPT])
def test_every_answer_of_a_chat_is_learnt_and_no_question(kind: RowKind) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    names = {"user": "human", "assistant": "gpt"}
    shaped = {"conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in TURNS]}
    rendered = render(kind, shaped if kind is RowKind.SHAREGPT else {"messages": TURNS}, tokenizer)
    assert [(piece.text, piece.learnt) for piece in rendered.pieces] == [
        ("[user]one?;[assistant]", False),
        ("1;", True),
        ("[user]two?;[assistant]", False),
        ("2;", True),
    ]
    assert not rendered.last_turn_only


def test_a_template_that_rewrites_history_teaches_the_last_answer_only() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = FORGETFUL
    rendered = render(RowKind.MESSAGES, {"messages": TURNS}, tokenizer)
    assert rendered.last_turn_only
    assert rendered.pieces == (
        Piece(text="[user]one?;[user]two?;[assistant]", learnt=False),
        Piece(text="2;", learnt=True),
    )


def test_a_row_that_the_chat_template_refuses_is_named_with_its_line(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + TEMPLATE
    )
    rows = tmp_path / "rows.jsonl"
    system = [{"role": "system", "content": "Be kind."}, *TURNS]
    rows.write_text(json.dumps({"messages": TURNS}) + "\n" + json.dumps({"messages": system}) + "\n")
    with pytest.raises(InvalidTrainingFile, match="System role not supported") as refused:
        list(RowSource(rows, tokenizer, param="dataset"))
    assert (refused.value.facts["line"], refused.value.param) == (2, "dataset")


def test_splitting_is_the_same_for_the_same_seed_and_loses_no_row() -> None:
    rows = TokenRows(ids=[np.array([n, n]) for n in range(20)], masks=[np.ones(2, np.uint8)] * 20)
    quarter = Validation(split=0.25)
    first, again, other = split(rows, quarter, 1), split(rows, quarter, 1), split(rows, quarter, 2)
    held = [[int(row[0]) for row in part.ids] for part in first]
    assert held == [[int(row[0]) for row in part.ids] for part in again]
    assert held != [[int(row[0]) for row in part.ids] for part in other]
    assert (len(held[1]), sorted(held[0] + held[1])) == (5, list(range(20)))
    with pytest.raises(InvalidParameter):
        split(rows.take([0]), quarter, 1)


def test_prepared_files_hold_what_the_report_says(tokenizer_path: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"What does the {name} say?", "completion": f" {name}"} for name in ("cat", "dog", "hen", "cat")]
    ended = run_preparing(tmp_path / "run", tokenizer_path, rows, validation={"split": 0.25})
    assert ended.code == ExitCode.DONE
    (prepared,) = ended.of(PreparedEvent)
    report = prepared.report
    train = load_file(ended.folder / "prepared" / "train.safetensors")
    assert (
        (len(train["offsets"]) - 1, int(train["offsets"][-1]))
        == (report["rows"], report["tokens"])
        == (3, len(train["input_ids"]))
    )
    assert int(train["loss_mask"].sum()) == report["learnt_tokens"]
    assert (ended.folder / "prepared" / "validation.safetensors").exists()
    assert report["first_rows"][0] == [
        {"text": "What does the cat say?", "learnt": False},
        {"text": " cat", "learnt": True},
    ]
    assert [warning.code for warning in ended.of(WarningEvent)] == ["rows_duplicated"]


def test_rows_beyond_max_length_are_cut_and_dropped_and_told(tokenizer_path: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "cat " * 200, "completion": "late"}, {"prompt": "cat", "completion": " dog" * 200}]
    ended = run_preparing(tmp_path / "run", tokenizer_path, rows, training={"max_length": 32})
    (prepared,) = ended.of(PreparedEvent)
    facts = {key: prepared.report[key] for key in ("rows", "truncated", "dropped", "tokens")}
    assert facts == {"rows": 1, "truncated": 2, "dropped": 1, "tokens": 32}
    assert {warning.code for warning in ended.of(WarningEvent)} == {"rows_truncated", "rows_dropped"}


def test_a_broken_line_of_the_validation_file_is_told_from_one_of_the_dataset(
    tokenizer_path: Path, tmp_path: Path
) -> None:
    ended = run_preparing(
        tmp_path / "run",
        tokenizer_path,
        [{"text": "cat"}],
        held_out=[{"text": "dog"}, {"text": ""}],
        validation={"file": "file-b"},
    )
    (failure,) = ended.of(FailureEvent)
    assert (ended.code, failure.param, failure.facts["line"]) == (ExitCode.USER_ERROR, "validation.file", 2)


@pytest.mark.parametrize(
    ("rows", "training", "reason", "says"),
    [
        ([{"text": "a"}, {"text": 3}], {}, FailureReason.INVALID_TRAINING_FILE, "Line 2"),
        ([{"text": "a b"}], {"completion_only_loss": True}, FailureReason.INVALID_PARAMETER, "no completion"),
        (
            [{"prompt": "cat " * 99, "completion": "x"}],
            {"max_length": 8},
            FailureReason.NO_TRAINABLE_TOKENS,
            "all 1 rows",
        ),
    ],
)
def test_what_the_user_must_change_is_said_and_not_tried_again(
    tokenizer_path: Path, tmp_path: Path, rows: list[Any], training: dict[str, Any], reason: FailureReason, says: str
) -> None:
    ended = run_preparing(tmp_path / "run", tokenizer_path, rows, training=training)
    (failure,) = ended.of(FailureEvent)
    assert (ended.code, failure.reason) == (ExitCode.USER_ERROR, reason)
    assert says in failure.message


def test_a_hub_dataset_becomes_jsonl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"p{number}", "completion": "ünïcode"} for number in range(5)]
    folder = tmp_path / "org" / "data"
    folder.mkdir(parents=True)
    Dataset.from_list(rows).to_parquet(str(folder / "train.parquet"))
    monkeypatch.chdir(tmp_path)  # a folder of that name stands in for the hub's repository
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "rows.jsonl"
    assert import_hub_dataset("org/data", "train", None, out, token=None, max_bytes=10_000) == 5
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    with pytest.raises(InvalidParameter, match="nosuch"):
        import_hub_dataset("org/data", "nosuch", None, out, token=None, max_bytes=10_000)
    with pytest.raises(InvalidParameter, match="more than 100 bytes"):
        import_hub_dataset("org/data", "train", None, out, token=None, max_bytes=100)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("data.py", "raise SystemExit('ran')", "scripts"),
        ("weights.bin", "a", "data files"),
        ("train.jsonl", '{"text": "a"}\n{"text": \n', "parse"),
    ],
)
def test_a_hub_dataset_that_cannot_be_read_is_the_users_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str, says: str
) -> None:
    folder = tmp_path / "org" / "data"
    folder.mkdir(parents=True)
    (folder / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidParameter, match=says) as refused:
        import_hub_dataset("org/data", "train", None, tmp_path / "rows.jsonl", token=None, max_bytes=10_000)
    assert refused.value.param == "dataset.hub"


def test_a_hub_dataset_with_a_column_that_is_no_json_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "data").mkdir(parents=True)
    Dataset.from_list([{"text": "a", "picture": b"\x00"}]).to_parquet(str(tmp_path / "org" / "data" / "train.parquet"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidParameter, match="'picture'"):
        import_hub_dataset("org/data", "train", None, tmp_path / "rows.jsonl", token=None, max_bytes=10_000)
