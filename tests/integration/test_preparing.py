"""Preparing: what is learnt and what is not, on a real tokenizer, in a process that never loads torch."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.numpy import load_file

from graft_shared.errors import InvalidParameter, InvalidTrainingFile
from graft_shared.jobs import FailureReason
from graft_shared.rows import RowKind
from graft_shared.specs import JobSpec, ReportSpec
from graft_worker.preparing.prepare import RowSource, report, split
from graft_worker.preparing.rendering import ChatTemplate, Piece, Rendered, as_one_piece, render
from graft_worker.preparing.tokens import Encoder, TokenRows, tokenize
from graft_worker.protocol import (
    REQUEST_NAME,
    Event,
    ExitCode,
    FailureEvent,
    PreparedEvent,
    PrepareRequest,
    ReportRequest,
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
    begins_with: str = "",
    log: Path | None = None,
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
    (blocked / "sitecustomize.py").write_text(begins_with)
    environment = {**os.environ, "PYTHONPATH": str(blocked), "USE_TORCH": "0"}
    log = log or folder / "trainer.log"
    with log.open("wb") as errors:
        command = [sys.executable, "-m", "graft_worker.preparing", str(folder)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, env=environment, check=False)
    assert done.stdout, log
    return Prepared(done.returncode, [parse_event(line) for line in done.stdout.decode().splitlines()], folder)


def report_on(
    folder: Path,
    tokenizer_path: Path,
    rows: list[dict[str, Any]],
    *,
    held_out: list[dict[str, Any]] | None = None,
    **spec: Any,
) -> dict[str, Any]:
    """What the preparing child says when it is asked for a report alone, without the seconds that a child takes."""
    files = {"report.jsonl": rows, **({} if held_out is None else {"held_out.jsonl": held_out})}
    for name, content in files.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    said: list[Any] = []
    request = ReportRequest(
        spec=ReportSpec.model_validate({"base_model": "graft/tiny", **spec}).model_dump(mode="json"),
        tokenizer_path=str(tokenizer_path),
        train_file=str(folder / "report.jsonl"),
        validation_file=None if held_out is None else str(folder / "held_out.jsonl"),
    )
    report(request, SimpleNamespace(emit=said.append))  # type: ignore[arg-type]
    (made,) = said
    return dict(made.report)


def tokens_of(rows: list[Rendered], tokenizer: Any) -> TokenRows:
    made = TokenRows()
    for _, row in tokenize(rows, tokenizer):
        made.add(row, 512)
    return made


def learnt_text(tokens: TokenRows, tokenizer: Any, row: int = 0) -> str:
    ids, mask = tokens.ids[row], tokens.masks[row].astype(bool)
    return str(tokenizer.decode(ids[mask]))


def test_only_the_answer_and_the_end_are_learnt() -> None:
    tokenizer = make_tokenizer()
    for kind, row in (
        (RowKind.PROMPT_COMPLETION, {"prompt": "What?", "completion": " The cat."}),
        (RowKind.ALPACA, {"instruction": "What?", "input": "Here.", "output": " The cat."}),
    ):
        tokens = tokens_of([render(kind, row, ChatTemplate(tokenizer))], tokenizer)
        assert learnt_text(tokens, tokenizer) == " The cat.</s>"
        assert "What?" in tokenizer.decode(tokens.ids[0])


def test_the_tokens_of_a_prompt_are_those_that_the_model_will_meet_when_it_is_used() -> None:
    tokenizer = make_tokenizer()
    row = render(
        RowKind.PROMPT_COMPLETION, {"prompt": "What does the ", "completion": "cat say?"}, ChatTemplate(tokenizer)
    )
    tokens = tokens_of([row], tokenizer)
    prompt = tokenizer("What does the ", add_special_tokens=False)["input_ids"]
    assert tokens.ids[0][: len(prompt)].tolist() == prompt


def test_a_tokenizer_that_begins_every_text_with_a_space_puts_none_before_an_answer() -> None:
    tokenizer = make_metaspace_tokenizer()
    row = render(RowKind.PROMPT_COMPLETION, {"prompt": "What?", "completion": "cat"}, ChatTemplate(tokenizer))
    tokens = tokens_of([row], tokenizer)
    assert tokens.ids[0][:-1].tolist() == tokenizer("What?cat", add_special_tokens=False)["input_ids"]
    assert learnt_text(tokens, tokenizer) == "cat</s>"


def test_pieces_are_told_apart_in_a_batch_of_rows_of_every_shape() -> None:
    tokenizer = make_metaspace_tokenizer()
    tokenizer.chat_template = TEMPLATE
    chat = render(RowKind.MESSAGES, {"messages": TURNS}, ChatTemplate(tokenizer))
    pair = render(RowKind.PROMPT_COMPLETION, {"prompt": "What?", "completion": "cat"}, ChatTemplate(tokenizer))
    text = render(RowKind.TEXT, {"text": "the cat says"}, ChatTemplate(tokenizer))
    tokens = tokens_of([text, chat, pair], tokenizer)
    assert [learnt_text(tokens, tokenizer, row) for row in range(3)] == ["the cat says</s>", "1;2;", "cat</s>"]


@pytest.mark.parametrize("kind", [RowKind.MESSAGES, RowKind.SHAREGPT])
def test_every_answer_of_a_chat_is_learnt_and_no_question(kind: RowKind) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    names = {"user": "human", "assistant": "gpt"}
    shaped = {"conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in TURNS]}
    rendered = render(kind, shaped if kind is RowKind.SHAREGPT else {"messages": TURNS}, ChatTemplate(tokenizer))
    assert [(piece.text, piece.learnt) for piece in rendered.pieces] == [
        ("[user]one?;[assistant]", False),
        ("1;", True),
        ("[user]two?;[assistant]", False),
        ("2;", True),
    ]
    assert not rendered.last_turn_only


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = ("one?", " 2", "the cat says", "\n\ncat", "cat<|im_end|>dog", "ünïcödé 🙂", "  ", "<|im_start|>", "x" * 300)


@pytest.mark.parametrize("make", [make_tokenizer, make_metaspace_tokenizer])
def test_special_tokens_spare_work_and_change_no_token(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The borders that special tokens give are those that every piece, tokenised by itself or up to it, would give."""
    tokenizer = make()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    chat, rng = ChatTemplate(tokenizer), random.Random(0)
    rows = []
    for _ in range(200):
        turns = [{"role": role, "content": rng.choice(TEXTS)} for role in ("user", "assistant") * rng.randint(1, 3)]
        rows.append(render(RowKind.MESSAGES, {"messages": turns}, chat))
    quick = Encoder(tokenizer).encode(rows)
    monkeypatch.setattr(Encoder, "_tails_of", lambda *_: None)
    slow = Encoder(tokenizer).encode(rows)
    assert quick == slow
    texts = ["".join(piece.text for piece in row.pieces) for row in rows]
    assert [ids for ids, _ in quick] == tokenizer(texts, add_special_tokens=False)["input_ids"]


def test_a_chat_is_rendered_as_transformers_renders_it() -> None:
    tokenizer = make_tokenizer()
    for template in (TEMPLATE, FORGETFUL, CHATML, "{{ bos_token }}{% set x = messages %}{{ x[0].content|tojson }}"):
        tokenizer.chat_template = template
        chat = ChatTemplate(tokenizer)
        for ask in (False, True):
            wanted = tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=ask)
            assert chat.text(TURNS, ask=ask) == chat.text(TURNS, ask=ask) == wanted


def test_where_everything_is_learnt_a_row_is_one_piece() -> None:
    tokenizer = make_tokenizer()
    pair = render(RowKind.PROMPT_COMPLETION, {"prompt": "What?", "completion": " cat"}, ChatTemplate(tokenizer))
    assert learnt_text(tokens_of([as_one_piece(pair)], tokenizer), tokenizer) == "What? cat</s>"


def test_a_template_that_rewrites_history_teaches_the_last_answer_only() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = FORGETFUL
    rendered = render(RowKind.MESSAGES, {"messages": TURNS}, ChatTemplate(tokenizer))
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
    quarter = ReportSpec.model_validate({"base_model": "graft/tiny", "validation": {"split": 0.25}, "seed": 1})
    first, again = split(20, quarter), split(20, quarter)
    other = split(20, quarter.model_copy(update={"seed": 2}))
    held = [part.tolist() for part in first]
    assert held == [part.tolist() for part in again]
    assert held != [part.tolist() for part in other]
    assert (len(held[1]), sorted(held[0] + held[1])) == (5, list(range(20)))
    with pytest.raises(InvalidParameter):
        split(1, quarter)


def test_prepared_files_hold_what_the_report_says(tokenizer_path: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"What does the {name} say?", "completion": f" {name}"} for name in ("cat", "dog", "hen", "cat")]
    ended = run_preparing(tmp_path / "run", tokenizer_path, rows, validation={"split": 0.25})
    assert ended.code == ExitCode.DONE
    (prepared,) = ended.of(PreparedEvent)
    report = prepared.report
    train = load_file(ended.folder / "prepared" / "train.safetensors")
    assert (
        (len(train["offsets"]) - 1, int(train["offsets"][-1]))
        == (report["train"]["rows"], report["train"]["tokens"])
        == (3, len(train["input_ids"]))
    )
    assert int(train["loss_mask"].sum()) == report["train"]["trained_tokens"]
    assert (ended.folder / "prepared" / "validation.safetensors").exists()
    spans = [(span["text"], span["trained"]) for span in report["first_rows"][0]["spans"]]
    assert spans == [("What does the cat say?", False), (" cat", True), ("</s>", True)]
    assert [warning.code for warning in ended.of(WarningEvent)] == ["rows_duplicated", "validation_overlap"]
    assert report["validation"]["overlap_rows"] == 1


def test_rows_beyond_max_length_are_cut_and_dropped_and_told(tokenizer_path: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "cat " * 200, "completion": "late"}, {"prompt": "cat", "completion": " dog" * 200}]
    ended = run_preparing(tmp_path / "run", tokenizer_path, rows, training={"max_length": 32})
    (prepared,) = ended.of(PreparedEvent)
    facts = {key: prepared.report[key] for key in ("rows", "truncated_rows", "nothing_to_learn_rows")}
    assert facts == {"rows": 2, "truncated_rows": 2, "nothing_to_learn_rows": 1}
    assert prepared.report["train"] == {"rows": 1, "tokens": 32, "trained_tokens": 30}
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


NO_ROOM_FOR_A_REPORT = """
from pathlib import Path
mkdir = Path.mkdir
def and_fill_up(folder, *arguments, **options):
    mkdir(folder, *arguments, **options)
    if folder.name == "prepared":
        (folder / "report.json").symlink_to("/dev/full")
Path.mkdir = and_fill_up
"""


def test_a_disk_that_is_full_is_told_as_such(tokenizer_path: Path, tmp_path: Path) -> None:
    full: dict[str, Any] = {"begins_with": NO_ROOM_FOR_A_REPORT, "log": Path("/dev/full")}
    ended = run_preparing(tmp_path / "run", tokenizer_path, [{"text": "cat"}], **full)
    (failure,) = ended.of(FailureEvent)
    assert (ended.code, failure.reason) == (ExitCode.CRASHED, FailureReason.DISK_FULL)


PAIRS = [{"prompt": f"What does the {name} say?", "completion": f" {name}"} for name in ("cat", "dog", "hen", "cow")]


def test_a_report_says_what_the_prepared_data_of_a_job_says(tokenizer_path: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"validation": {"split": 0.5}}
    (of_job,) = run_preparing(tmp_path / "job", tokenizer_path, PAIRS * 2, **asked).of(PreparedEvent)
    of_file = report_on(tmp_path, tokenizer_path, PAIRS * 2, **asked)
    assert of_file == of_job.report
    assert of_file["duplicate_rows"] == 4
    assert of_file["validation"]["rows"] == of_file["train"]["rows"] == 4


def test_overlap_with_a_validation_file_is_counted_in_its_rows(tokenizer_path: Path, tmp_path: Path) -> None:
    held_out = [PAIRS[0], PAIRS[0], {"prompt": "new", "completion": "row"}]
    made = report_on(tmp_path, tokenizer_path, PAIRS, held_out=held_out, validation={"file": "file-b"}, max_length=64)
    assert (made["validation"]["rows"], made["validation"]["overlap_rows"]) == (3, 2)
    assert [warning["code"] for warning in made["warnings"]] == ["validation_overlap"]


def test_a_report_shows_what_lies_beyond_max_length_and_counts_every_length(
    tokenizer_path: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": "cat", "completion": " dog" * 200}, *PAIRS]
    made = report_on(tmp_path, tokenizer_path, rows, max_length=32)
    first = made["first_rows"][0]
    marks = [(span["trained"], span["cut"]) for span in first["spans"]]
    assert (first["line"], marks[:3]) == (1, [(False, False), (True, False), (False, True)])
    assert "".join(span["text"] for span in first["spans"][:2]) == "cat" + " dog" * 30
    histogram, longest = made["lengths"]["histogram"], made["lengths"]["percentiles"]["100"]
    assert sum(histogram["counts"]) == len(rows) == made["rows"]
    assert len(histogram["edges"]) == len(histogram["counts"]) + 1
    assert histogram["edges"][-1] == first["tokens"] + 1 == longest + 1


def test_long_texts_and_rows_of_many_turns_are_shown_in_part(tokenizer_path: Path, tmp_path: Path) -> None:
    turns = [{"role": role, "content": "cat " * 1000} for role in ("user", "assistant") * 50]
    (shown,) = report_on(tmp_path, tokenizer_path, [{"messages": turns}], max_length=1_000_000)["first_rows"]
    assert (len(shown["spans"]), shown["spans_left_out"]) == (24, 76 + 1)
    assert all(len(span["text"]) < 1000 and span["left_out"] > 3000 for span in shown["spans"])
    assert len(json.dumps(shown)) < 30_000


def test_a_report_on_rows_that_teach_nothing_says_so(tokenizer_path: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "cat " * 99, "completion": "x"}]
    made = report_on(tmp_path, tokenizer_path, rows, max_length=8, validation={"split": 0.5})
    assert made["train"] == {"rows": 0, "tokens": 0, "trained_tokens": 0}
    assert "no_trainable_tokens" in [warning["code"] for warning in made["warnings"]]
