"""Where rows come from: an uploaded file, an object of an allowed bucket, a dataset of the hub; to JSONL on disk."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from graft_shared.errors import FileNotFound, InvalidParameter, ObjectNotFound
from graft_shared.specs import DatasetSource
from graft_worker.settings import WorkerSettings
from graft_worker.supervisor.neighbours import Neighbours

CHUNK_BYTES = 1024 * 1024


def fetch_rows(tenant: str, source: DatasetSource, path: Path, neighbours: Neighbours, *, param: str) -> dict[str, str]:
    """Put a source's rows at `path`, and return what its report should say of where they are from.

    Raises:
        InvalidParameter: There is no such source here, or it is too large.
        BucketUnavailable, BaseModelUnavailable: Its keeper does not answer.
    """
    if source.file is not None:
        _fetch_file(tenant, source.file, path, neighbours, param)
        return {"file": source.file}
    if source.uri is not None:
        _import_object(source.uri, path, neighbours)
        return {"uri": source.uri}
    from graft_worker.importing import import_hub_dataset  # `datasets` takes a second to import

    settings, hub, split = neighbours.settings, str(source.hub), source.split or "train"
    commit = import_hub_dataset(
        hub, split, source.revision, path, token=_token_for(hub, settings), max_bytes=settings.max_file_bytes
    )
    return {"hub": hub, "split": split, "commit": commit}


def _token_for(hub: str, settings: WorkerSettings) -> str | None:
    """The operator's token, which opens what is the operator's: any tenant may name a dataset."""
    if settings.hub_token is None or not any(fnmatchcase(hub, each) for each in settings.hub_token_datasets):
        return None
    return settings.hub_token.get_secret_value()


def _fetch_file(tenant: str, file_id: str, path: Path, neighbours: Neighbours, param: str) -> None:
    try:
        stored = neighbours.files.get(tenant, file_id)
    except FileNotFound as error:
        raise InvalidParameter(param=f"{param}.file", reason=error.message.rstrip(".")) from error
    neighbours.base_models.cache.fetch(neighbours.bucket, stored.object, path)


def _import_object(uri: str, path: Path, neighbours: Neighbours) -> None:
    name, _, key = uri.removeprefix("s3://").partition("/")
    allowed_buckets, limit = neighbours.settings.dataset_buckets, neighbours.settings.max_file_bytes
    if name not in allowed_buckets:
        allowed = ", ".join(allowed_buckets) or "none"
        raise InvalidParameter(param="dataset.uri", reason=f"bucket '{name}' is not allowed here; allowed: {allowed}")
    size = 0
    try:
        with neighbours.open_dataset_bucket(name).open(key) as source, path.open("wb") as sink:
            while chunk := source.read(CHUNK_BYTES):
                size += len(chunk)
                if size > limit:
                    raise InvalidParameter(param="dataset.uri", reason=f"the object has more than {limit} bytes")
                sink.write(chunk)
    except ObjectNotFound as error:
        raise InvalidParameter(param="dataset.uri", reason=f"the bucket '{name}' holds no object '{key}'") from error
