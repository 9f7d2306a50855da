"""Datasets of the hub, brought to JSONL: what is trained on is always a file of rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from datasets import load_dataset_builder
from datasets.exceptions import DatasetsError
from datasets.packaged_modules.arrow.arrow import Arrow
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.packaged_modules.text.text import Text
from huggingface_hub import HfApi, hf_hub_download, metadata_load
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from yaml import YAMLError

from graft_shared.errors import BaseModelUnavailable, InvalidParameter
from graft_worker.hub import ANSWER_SECONDS, HubHTTPError, first_answer, first_line

READERS = (Arrow, Csv, Json, Parquet, Text)  # of formats that hold rows and nothing that is run when it is read
CARD, STANDALONE_CARD = "README.md", ".huggingface.yaml"  # where `datasets` looks for which files there are


def import_hub_dataset(
    hub: str, split: str, revision: str | None, path: Path, *, token: str | None, max_bytes: int
) -> str:
    """Write one split of a hub dataset as JSONL, and return the commit that it was read at.

    Code from the hub is never run, and only files of tabular formats are read. A branch is pinned to its commit first,
    and the files are read at that commit, so that all are of one moment.

    Raises:
        InvalidParameter: There is no such dataset, split or revision; it is gated, a script, or too large;
            or a column is no JSON.
        BaseModelUnavailable: The hub does not answer.
    """
    try:
        commit = _commit_of(hub, revision, token)
        _check_card(hub, commit, token)
        # By its address: a folder of this name on this machine must not be taken for the hub's dataset.
        builder = load_dataset_builder(f"hf://datasets/{hub}", revision=commit, token=token or False)
        _check_files(builder, f"hf://datasets/{hub}@{commit}/")
        _write(builder.as_streaming_dataset(split=split), path, max_bytes)
    except GatedRepoError as error:
        raise _refused(f"'{hub}' is gated on the hub: its terms must be accepted for the operator's token") from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        named = f"'{hub}'" if revision is None else f"'{hub}' at '{revision}'"
        raise _refused(f"the hub shows this service no dataset {named}") from error
    except (HubHTTPError, LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
        raise BaseModelUnavailable(base_model=hub, reason=first_line(error)) from error
    except FileNotFoundError as error:
        raise _refused(f"'{hub}' holds no file of rows that can be read") from error
    except (DatasetsError, ValueError, RuntimeError, YAMLError) as error:  # RuntimeError: it is a script
        raise _refused(first_line(error)) from error
    return commit


def _refused(reason: str) -> InvalidParameter:
    return InvalidParameter(param="dataset.hub", reason=reason)


def _commit_of(hub: str, revision: str | None, token: str | None) -> str:
    ask = partial(HfApi().dataset_info, hub, revision=revision, timeout=ANSWER_SECONDS, token=token or False)
    info = first_answer(hub, ask)
    if info.sha is None:
        raise ValueError("the hub names no commit of it")
    return str(info.sha)


def _check_card(hub: str, commit: str, token: str | None) -> None:
    """Refuse a dataset that names files elsewhere before anything looks for them: on this disk, or at an address."""
    for name, read in ((CARD, metadata_load), (STANDALONE_CARD, _yaml_of)):
        try:
            path = hf_hub_download(hub, name, repo_type="dataset", revision=commit, token=token or False)
        except RemoteEntryNotFoundError:
            continue
        for text in _texts((read(path) or {}).get("configs")):
            if text.startswith(("/", "~")) or ".." in text.split("/") or "://" in text or "\\" in text:
                raise ValueError("it names files that are not its own, and these are not read")


def _yaml_of(path: str) -> Any:
    return yaml.safe_load(Path(path).read_text(errors="replace"))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)
    elif isinstance(value, str):
        yield value


def _check_files(builder: Any, repository: str) -> None:
    """Refuse other formats, and whatever files of elsewhere were found all the same."""
    if not isinstance(builder, READERS):
        kind = type(builder).__mro__[1].__name__.lower()
        raise ValueError(f"its files are of the kind '{kind}'; JSON, CSV, Parquet, Arrow and text files are read")
    for files in (builder.config.data_files or {}).values():
        for file in files:
            if not str(file).startswith(repository):
                raise ValueError("it names files that are not its own, and these are not read")


def _write(rows: Any, path: Path, max_bytes: int) -> None:
    size = 0
    with path.open("wb") as out:
        for row in rows:
            size += out.write(_line(row))
            if size > max_bytes:
                raise ValueError(
                    f"as JSONL it has more than {max_bytes} bytes; name a smaller split, or upload a part of it"
                )


def _line(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except TypeError as error:
        column = next((name for name, value in row.items() if not _is_json(value)), "?")
        raise ValueError(f"the column '{column}' holds {type(row.get(column)).__name__}, which is no JSON") from error


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
