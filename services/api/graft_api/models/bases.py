"""How the name of a base model becomes its shape: a registered folder, the catalogue, or the hub's `config.json`."""

from __future__ import annotations

import difflib
import fnmatch
import json
import re
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

from graft_shared.catalogue import Catalogue, ModelShape
from graft_shared.errors import (
    BaseModelNotFound,
    BaseModelUnavailable,
    GatedBaseModel,
    UnknownBaseModel,
    UnsupportedBaseModel,
)
from graft_shared.specs import BASE_MODEL_PATTERN
from graft_shared.weights import check_folder

HUB_ANSWERS_HOLD = timedelta(minutes=10)  # a branch of a hub repository may move
CONFIG = "config.json"
MAX_CONFIG_BYTES = 1_000_000  # a config.json has a few kB


class Source(StrEnum):
    """Where a shape comes from."""

    CATALOGUE = "catalogue"
    REGISTERED = "registered"


@dataclass(frozen=True, kw_only=True)
class HubConfigs:
    """Fetches `config.json` of hub repositories, with the operator's token, and remembers shapes for a while.

    Args:
        allowed: Shell patterns of the hub ids that jobs may name.
        endpoint: Another hub than huggingface_hub's own default (which HF_ENDPOINT sets).
    """

    allowed: tuple[str, ...]
    token: str | None
    cache_dir: Path
    timeout_seconds: float
    endpoint: str | None = None
    _remembered: dict[tuple[str, str], tuple[float, ModelShape]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def allows(self, base_model: str) -> bool:
        """Tell whether the operator lets jobs name this hub id."""
        return any(fnmatch.fnmatchcase(base_model, pattern) for pattern in self.allowed)

    def shape(self, base_model: str, revision: str) -> ModelShape:
        """Return the shape of a hub repository.

        Raises:
            UnknownBaseModel: The hub knows no such repository or revision.
            GatedBaseModel: The operator's token may not read it.
            UnsupportedBaseModel: It has no config, or one that cannot be trained here.
            BaseModelUnavailable: The hub does not answer.
        """
        key = (base_model, revision)
        with self._lock:
            until, remembered = self._remembered.get(key, (0.0, None))
        if remembered is not None and time.monotonic() < until:
            return remembered
        shape = _shape_of(self._fetch(base_model, revision), base_model, revision)
        with self._lock:
            self._remembered[key] = (time.monotonic() + HUB_ANSWERS_HOLD.total_seconds(), shape)
        return shape

    def _fetch(self, base_model: str, revision: str) -> Path:
        from huggingface_hub import errors  # half a second that most services never need

        try:
            return self._download(base_model, revision)
        except errors.GatedRepoError as error:
            raise GatedBaseModel(base_model=base_model) from error
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
            hint = f"The hub shows this service no such repository, or no revision '{revision}' of it."
            raise UnknownBaseModel(base_model=base_model, hint=hint, param="base_model") from error
        except errors.RemoteEntryNotFoundError as error:
            raise UnsupportedBaseModel(base_model=base_model, reason="it has no config.json") from error
        except (errors.LocalEntryNotFoundError, OSError, _transport_error()) as error:
            return self._cached(base_model, revision, error)

    def _download(self, base_model: str, revision: str) -> Path:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

        token = self.token or False
        # Asked first because it tries once: the download itself waits out a dead hub for half a minute.
        url = hf_hub_url(base_model, CONFIG, revision=revision, endpoint=self.endpoint)
        get_hf_file_metadata(url, token=token, timeout=self.timeout_seconds, endpoint=self.endpoint)
        path = hf_hub_download(
            base_model,
            CONFIG,
            revision=revision,
            cache_dir=self.cache_dir,
            etag_timeout=self.timeout_seconds,
            token=token,
            endpoint=self.endpoint,
        )
        return Path(path)

    def _cached(self, base_model: str, revision: str, error: Exception) -> Path:
        """What an earlier download left, when the hub does not answer."""
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(base_model, CONFIG, cache_dir=self.cache_dir, revision=revision)
        if not isinstance(path, str):
            raise BaseModelUnavailable(base_model=base_model, reason=_first_line(error)) from error
        return Path(path)


@dataclass(frozen=True, kw_only=True)
class BaseModels:
    """Every base that jobs may name."""

    registered_dir: Path
    catalogue: Catalogue
    hub: HubConfigs

    def resolve(self, base_model: str, revision: str) -> ModelShape:
        """Return the shape of the base that a job names; the operator's own folder goes before the catalogue.

        Raises:
            UnknownBaseModel: Nobody knows it; with the nearest names.
            GatedBaseModel, UnsupportedBaseModel, BaseModelUnavailable: As `HubConfigs.shape`.
        """
        shape = self._registered(base_model) or self.catalogue.get(base_model)
        if shape is not None:
            return shape
        if self.hub.allows(base_model):
            return self.hub.shape(base_model, revision)
        raise self._unknown(base_model)

    def get(self, base_model: str) -> tuple[Source, ModelShape]:
        """Return one base of `known`.

        Raises:
            BaseModelNotFound: It is neither registered nor in the catalogue.
        """
        registered = self._registered(base_model)
        if registered is not None:
            return Source.REGISTERED, registered
        shape = self.catalogue.get(base_model)
        if shape is None:
            raise BaseModelNotFound(base_model=base_model)
        return Source.CATALOGUE, shape

    def known(self) -> Iterator[tuple[Source, ModelShape]]:
        """Every base that can be named without asking the hub."""
        seen = set()
        for shape in self.registered():
            seen.add(shape.base_model)
            yield Source.REGISTERED, shape
        yield from ((Source.CATALOGUE, shape) for shape in self.catalogue if shape.base_model not in seen)

    def registered(self) -> Iterator[ModelShape]:
        """The bases in folders of the operator's; a folder that is unusable is left out."""
        for base_model in self._registered_names():
            try:
                shape = self._registered(base_model)
            except UnsupportedBaseModel:
                continue
            if shape is not None:
                yield shape

    def _registered(self, base_model: str) -> ModelShape | None:
        if not re.fullmatch(BASE_MODEL_PATTERN, base_model):
            return None
        folder = self.registered_dir / base_model
        if not (folder / CONFIG).is_file():
            return None
        check_folder(base_model, folder)
        return _shape_of(folder / CONFIG, base_model, "main")

    def _registered_names(self) -> list[str]:
        configs = [*self.registered_dir.glob("*/config.json"), *self.registered_dir.glob("*/*/config.json")]
        return sorted(path.parent.relative_to(self.registered_dir).as_posix() for path in configs)

    def _unknown(self, base_model: str) -> UnknownBaseModel:
        own = [shape.base_model for shape in self.registered()]
        near = list(dict.fromkeys([*_near(base_model, own), *_near(base_model, self.catalogue.shapes)]))
        meant = f"Did you mean '{near[0]}'? " if near else ""
        place = f"models/{base_model} in the service's state folder (.graft by default)"
        hint = (
            f"{meant}GET /models (graft models) lists what this service trains; "
            f"to add a base of your own, put its folder at {place}."
        )
        return UnknownBaseModel(param="base_model", base_model=base_model, hint=hint, suggestions=near)


def _near(base_model: str, names: Iterable[str]) -> list[str]:
    """Those names that look most like this one."""
    return difflib.get_close_matches(base_model, names, n=3, cutoff=0.5)


def _shape_of(path: Path, base_model: str, revision: str) -> ModelShape:
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise UnsupportedBaseModel(base_model=base_model, reason=f"its config.json has over {MAX_CONFIG_BYTES} bytes")
    try:
        config: Any = json.loads(path.read_bytes())
    except RecursionError as error:
        raise UnsupportedBaseModel(base_model=base_model, reason="its config.json is nested too deeply") from error
    except ValueError as error:
        raise UnsupportedBaseModel(base_model=base_model, reason=f"its config.json is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UnsupportedBaseModel(base_model=base_model, reason="its config.json is not an object")
    return ModelShape.from_config(config, base_model=base_model, revision=revision)


def _transport_error() -> type[Exception]:
    """What the hub client's own HTTP library raises: httpx up to huggingface_hub 1, httpx2 since 2."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError" and kind is not HfHubHTTPError)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
