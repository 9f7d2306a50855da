"""Where a base model comes from: a registered local folder, or the hub's snapshot in this machine's cache."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from graft_shared.buckets import hash_file
from graft_shared.errors import BaseModelUnavailable, GatedBaseModel, UnknownBaseModel, UnsupportedBaseModel

TOKENIZER_FILES = ("config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
                   "*.model", "chat_template*", "generation_config.json")  # fmt: skip
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")  # never a pickle

_hash_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class LocalBase:
    """A base model on this machine's disk."""

    path: Path
    revision: str  # the hub's commit, or `sha256-…` over the files of a registered folder


@dataclass(frozen=True, kw_only=True)
class BaseModels:
    """Brings base models to this machine."""

    registered_dir: Path
    cache_dir: Path
    hub_token: str | None

    def tokenizer(self, base_model: str, revision: str) -> Path:
        """Return a folder that holds at least the config and the tokenizer."""
        registered = self._registered(base_model)
        return registered or self._snapshot(base_model, revision, TOKENIZER_FILES)

    def whole(self, base_model: str, revision: str) -> LocalBase:
        """Return the folder of the whole base and its exact revision.

        Raises:
            UnknownBaseModel: Neither registered nor on the hub.
            GatedBaseModel: The operator's token may not read it.
            UnsupportedBaseModel: It has no safetensors.
            BaseModelUnavailable: The hub does not answer.
        """
        registered = self._registered(base_model)
        path = registered or self._snapshot(base_model, revision, (*TOKENIZER_FILES, *WEIGHT_FILES))
        if not any(path.glob("*.safetensors")):
            raise UnsupportedBaseModel(base_model=base_model, reason="it has no .safetensors weights")
        if registered is None:
            return LocalBase(path=path, revision=path.name)
        return LocalBase(path=path, revision=self._content_revision(path))

    def _registered(self, base_model: str) -> Path | None:
        path = self.registered_dir / base_model
        return path if (path / "config.json").is_file() else None

    def _snapshot(self, base_model: str, revision: str, patterns: Sequence[str]) -> Path:
        try:
            return Path(
                snapshot_download(
                    base_model,
                    revision=revision,
                    allow_patterns=list(patterns),
                    cache_dir=self.cache_dir / "hub",
                    token=self.hub_token or False,
                )
            )
        except GatedRepoError as error:
            raise GatedBaseModel(base_model=base_model) from error
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            hint = f"The hub knows no such repository or revision ('{revision}')."
            raise UnknownBaseModel(base_model=base_model, hint=hint) from error
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise BaseModelUnavailable(base_model=base_model, reason=reason) from error

    def _content_revision(self, path: Path) -> str:
        """Hash a registered folder's files; files that did not change are not read again."""
        remembered_at = self.cache_dir / "base-hashes.json"
        with _hash_lock:
            remembered: dict[str, str] = json.loads(remembered_at.read_text()) if remembered_at.exists() else {}
            whole = hashlib.sha256()
            for file in sorted(path.iterdir()):
                if not file.is_file() or file.name.startswith("."):
                    continue
                stat = file.stat()
                name = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
                if name not in remembered:
                    remembered[name] = hash_file(file)[1]
                whole.update(f"{file.name} {remembered[name]}\n".encode())
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            partial = remembered_at.with_suffix(f".{threading.get_ident()}")
            partial.write_text(json.dumps(remembered))
            partial.replace(remembered_at)
        return f"sha256-{whole.hexdigest()[:40]}"
