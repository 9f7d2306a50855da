"""Where rows come from: objects of buckets that the operator allows, and no others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import SecretStr

from graft_shared.buckets.directory import DirectoryBucket
from graft_shared.errors import InvalidParameter
from graft_shared.specs import DatasetSource
from graft_worker.supervisor.sources import fetch_rows

ROWS = b'{"text": "a"}\n' * 10


@pytest.fixture
def neighbours(tmp_path: Path) -> Any:
    buckets = {name: DirectoryBucket(tmp_path / name) for name in ("open", "wide")}
    buckets["open"].put_bytes("folder/rows.jsonl", ROWS)
    settings = SimpleNamespace(dataset_buckets=("open", "wide"), max_file_bytes=len(ROWS))
    return SimpleNamespace(settings=settings, open_dataset_bucket=buckets.__getitem__)


def fetched(uri: str, path: Path, neighbours: Any) -> dict[str, str]:
    return fetch_rows("t", DatasetSource(uri=uri), path, neighbours, param="dataset")


def test_an_object_of_an_allowed_bucket_is_brought_here(tmp_path: Path, neighbours: Any) -> None:
    assert fetched("s3://open/folder/rows.jsonl", tmp_path / "rows", neighbours) == {
        "uri": "s3://open/folder/rows.jsonl"
    }
    assert (tmp_path / "rows").read_bytes() == ROWS


@pytest.mark.parametrize(
    ("hub", "token"), [("our-org/rows", "hf_own"), ("our-org-2/rows", None), ("another/our-org", None)]
)
def test_the_operators_token_opens_the_datasets_that_the_operator_names_and_no_others(
    tmp_path: Path, neighbours: Any, monkeypatch: pytest.MonkeyPatch, hub: str, token: str | None
) -> None:
    neighbours.settings.hub_token = SecretStr("hf_own")
    neighbours.settings.hub_token_datasets = ("our-org/*",)
    shown: list[str | None] = []

    def read(*_: object, token: str | None, max_bytes: int) -> str:
        shown.append(token)
        return "commit"

    monkeypatch.setattr("graft_worker.importing.import_hub_dataset", read)
    fetch_rows("t", DatasetSource(hub=hub), tmp_path / "rows", neighbours, param="dataset")
    assert shown == [token]


@pytest.mark.parametrize(
    ("uri", "most", "says"),
    [
        ("s3://closed/rows.jsonl", 1000, "bucket 'closed' is not allowed here; allowed: open, wide"),
        ("s3://open/none.jsonl", 1000, "the bucket 'open' holds no object 'none.jsonl'"),
        ("s3://open/folder", 1000, "holds no object 'folder'"),
        ("s3://open/folder/rows.jsonl", len(ROWS) - 1, f"the object has more than {len(ROWS) - 1} bytes"),
    ],
)
def test_what_cannot_be_brought_is_the_users_to_change(
    tmp_path: Path, neighbours: Any, uri: str, most: int, says: str
) -> None:
    neighbours.settings.max_file_bytes = most
    with pytest.raises(InvalidParameter) as refused:
        fetched(uri, tmp_path / "rows", neighbours)
    assert refused.value.param == "dataset.uri"
    assert says in refused.value.message
