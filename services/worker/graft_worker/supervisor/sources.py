"""Where rows come from: an uploaded file, an object of an allowed bucket, a dataset of the hub; to JSONL on disk."""

from __future__ import annotations

from pathlib import Path

from graft_shared.errors import FileNotFound, InvalidParameter, ObjectNotFound
from graft_shared.specs import DatasetSource
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

    settings, split = neighbours.settings, source.split or "train"
    token = settings.hub_token.get_secret_value() if settings.hub_token else None
    commit = import_hub_dataset(
        str(source.hub), split, source.revision, path, token=token, max_bytes=settings.max_file_bytes
    )
    return {"hub": str(source.hub), "split": split, "commit": commit}


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
