"""Datasets of the hub: the real `datasets` over a small hub on loopback, which speaks the hub's protocol."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from typing import Any

import pytest
from datasets import Dataset

from tests.fakes.hub_datasets import COMMITS, FakeDatasetHub

ROWS = [{"prompt": f"p{number}", "completion": "ünïcode"} for number in range(5)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
MAX_BYTES = 10_000
ELSEWHERE = ("org/local", "org/gated", "org/down")  # of this machine, not for us, away
LOCAL = "local.jsonl"  # lies in the folder that the importing process works in
IMPORT = """
import json, sys
from pathlib import Path
from graft_shared.errors import GraftError
from graft_worker.hub import bound_requests
from graft_worker.importing import import_hub_dataset

bound_requests()
for hub, split, revision in json.loads(sys.argv[1]):
    out = Path("rows.jsonl")
    out.unlink(missing_ok=True)
    try:
        commit = import_hub_dataset(hub, split, revision, out, token=None, max_bytes=int(sys.argv[2]))
        print(json.dumps({"commit": commit, "rows": [json.loads(line) for line in out.read_text().splitlines()]}))
    except GraftError as error:
        print(json.dumps({"code": error.code, "param": error.param, "message": error.message}))
"""


def parquet(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    Dataset.from_list(rows).to_parquet(out)
    return out.getvalue()


def card(data_files: str) -> dict[str, bytes]:
    text = f"---\nconfigs:\n- config_name: default\n  data_files: {data_files}\n---\n"
    return {"README.md": text.encode(), "own.jsonl": JSONL}


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What came of every case, by its name: one process imports them all, because `datasets` takes long to start."""
    folder = tmp_path_factory.mktemp("importer")
    (folder / LOCAL).write_bytes(b'{"text": "of this machine"}\n')
    (folder / "org" / "local").mkdir(parents=True)
    (folder / "org" / "local" / "train.jsonl").write_bytes(b'{"text": "of this machine"}\n')
    repositories = {
        "org/data": {
            "main": {"train.jsonl": JSONL, "test.jsonl": JSONL},
            "old": {"train.jsonl": b"".join(JSONL.splitlines(keepends=True)[:2])},
        },
        "org/parquet": {"main": {"data/train-00000.parquet": parquet(ROWS)}},
        "org/card": {"main": {**card("parts/*.jsonl"), "parts/a.jsonl": JSONL}},
        "org/large": {"main": {"train.jsonl": JSONL * 500}},
        "org/broken": {"main": {"train.jsonl": JSONL + b'{"prompt": \n'}},
        "org/picture": {"main": {"train.parquet": parquet([{"text": "a", "picture": b"\x00"}])}},
        "org/script": {"main": {"script.py": b"raise SystemExit('ran')"}},
        "org/pickle": {"main": {"train.pkl": b"cos\nsystem\n(S'touch pwned'\ntR."}},
        "org/tar": {"main": {"train.tar": b"x" * 1024}},
        "org/disk": {"main": card(str(folder / LOCAL))},
        "org/climbing": {"main": card("../../org/data/train.jsonl")},
        "org/address": {"main": card("http://127.0.0.1:9/rows.jsonl")},
        "org/other": {
            "main": {**card("own.jsonl"), ".huggingface.yaml": card("hf://datasets/org/data/x")["README.md"][4:-4]}
        },
        "org/yaml": {"main": {"train.jsonl": JSONL, "README.md": b"---\nconfigs: [open\n---\n"}},
        "org/empty": {"main": {}},
    }
    cases = {
        "branch": ("org/data", "train", "old"),
        "split": ("org/data", "nosuch", None),
        "revision": ("org/data", "train", "nosuch"),
        **{name.removeprefix("org/"): (name, "train", None) for name in (*repositories, *ELSEWHERE)},
    }
    errors = {"org/gated": (403, "GatedRepo"), "org/down": (503, "")}
    with FakeDatasetHub(repositories, errors=errors) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1"}
        arguments = [json.dumps(list(cases.values())), str(MAX_BYTES)]
        done = subprocess.run(
            [sys.executable, "-c", IMPORT, *arguments], cwd=folder, env=environment, capture_output=True, check=False
        )
    assert done.returncode == 0, done.stderr.decode()
    assert not (folder / "pwned").exists()
    return dict(zip(cases, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize(
    ("case", "commit", "rows"),
    [
        ("data", COMMITS["main"], ROWS),
        ("branch", COMMITS["old"], ROWS[:2]),
        ("parquet", COMMITS["main"], ROWS),
        ("card", COMMITS["main"], ROWS),
    ],
)
def test_a_hub_dataset_becomes_jsonl_at_a_commit(
    imported: dict[str, dict[str, Any]], case: str, commit: str, rows: list[Any]
) -> None:
    assert imported[case] == {"commit": commit, "rows": rows}


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("split", "nosuch"),
        ("revision", "no dataset 'org/data' at 'nosuch'"),
        ("local", "no dataset 'org/local'"),
        ("gated", "gated"),
        ("large", "more than 10000 bytes"),
        ("broken", "JSON parse error"),
        ("picture", "'picture'"),
        ("script", "scripts"),
        ("pickle", "no file of rows"),
        ("tar", "webdataset"),
        ("disk", "not its own"),
        ("climbing", "not its own"),
        ("address", "not its own"),
        ("other", "not its own"),
        ("yaml", "flow sequence"),
        ("empty", "no file of rows"),
    ],
)
def test_a_hub_dataset_that_cannot_be_read_is_the_users_to_change(
    imported: dict[str, dict[str, Any]], case: str, says: str
) -> None:
    answer = imported[case]
    assert (answer["code"], answer["param"]) == ("invalid_parameter", "dataset.hub")
    assert says in answer["message"]


def test_a_hub_that_does_not_answer_is_worth_another_try(imported: dict[str, dict[str, Any]]) -> None:
    assert imported["down"]["code"] == "base_model_unavailable"
