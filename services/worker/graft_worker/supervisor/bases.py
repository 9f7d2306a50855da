"""Where a base model comes from: a registered local folder, or the hub's snapshot in this host's cache."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from graft_shared.buckets import hash_file
from graft_shared.errors import (
    ArtifactCorrupt,
    BaseModelUnavailable,
    GatedBaseModel,
    UnknownBaseModel,
    UnsupportedBaseModel,
)
from graft_shared.weights import check_folder
from graft_worker.hub import ANSWER_SECONDS, HubHTTPError, first_answer, first_line
from graft_worker.supervisor.cache import HostCache
from graft_worker.supervisor.hashes import known_hashes, remember_hashes

TOKENIZER_FILES = ("config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
                   "*.model", "chat_template*", "generation_config.json")  # fmt: skip
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")  # never a pickle


@dataclass(frozen=True, kw_only=True)
class LocalBase:
    """A base model on this machine's disk."""

    path: Path
    revision: str  # the hub's commit, or `sha256-…` over the files of a registered folder
    quantised_dir: Path  # where its 4-bit weights are kept


@dataclass(frozen=True, kw_only=True)
class LocalTokenizer:
    """A base model's config and tokenizer on this machine's disk."""

    path: Path
    commit: str | None  # of the hub, so that training takes the weights of the same; None for a registered folder


@dataclass(frozen=True, kw_only=True)
class BaseModels:
    """Brings base models to this machine."""

    registered_dir: Path
    cache: HostCache
    hub_token: str | None

    @contextmanager
    def tokenizer(self, base_model: str, revision: str) -> Iterator[LocalTokenizer]:
        """A folder that holds at least the config and the tokenizer, kept for as long as the block runs.

        Raises:
            UnknownBaseModel, GatedBaseModel, BaseModelUnavailable: As for `whole`.
        """
        if (registered := self._registered(base_model)) is not None:
            yield LocalTokenizer(path=registered, commit=None)
            return
        with self.cache.borrowed(base_model):
            snapshot = self._snapshot(base_model, revision, TOKENIZER_FILES)
            yield LocalTokenizer(path=snapshot, commit=snapshot.name)

    @contextmanager
    def whole(self, base_model: str, revision: str) -> Iterator[LocalBase]:
        """The folder of the whole base and its exact revision, kept for as long as the block runs.

        Raises:
            UnknownBaseModel: Neither registered nor on the hub.
            GatedBaseModel: The operator's token may not read it.
            UnsupportedBaseModel: It has no safetensors; a registered one also as `check_folder`.
            BaseModelUnavailable: The hub does not answer.
            ArtifactCorrupt: Its bytes on this disk are not those of the hub.
        """
        if (registered := self._registered(base_model)) is not None:
            check_folder(base_model, registered)
            revision = self._content_revision(registered)
            with self.cache.quantised(revision) as kept:
                yield LocalBase(path=registered, revision=revision, quantised_dir=kept)
            return
        with self.cache.borrowed(base_model):
            self.cache.make_room()
            snapshot = self._snapshot(base_model, revision, (*TOKENIZER_FILES, *WEIGHT_FILES))
            _check_weights(base_model, snapshot)
            self._prove(snapshot)
            self.cache.make_room()
            with self.cache.quantised(snapshot.name) as kept:
                yield LocalBase(path=snapshot, revision=snapshot.name, quantised_dir=kept)

    def _registered(self, base_model: str) -> Path | None:
        path = self.registered_dir / base_model
        return path if (path / "config.json").is_file() else None

    def _snapshot(self, base_model: str, revision: str, patterns: Sequence[str]) -> Path:
        away = self._away(base_model, revision)
        try:
            return Path(
                snapshot_download(
                    base_model,
                    revision=revision,
                    allow_patterns=list(patterns),
                    cache_dir=self.cache.hub_dir,
                    token=self.hub_token or False,
                    local_files_only=away is not None,
                )
            )
        except GatedRepoError as error:
            raise GatedBaseModel(base_model=base_model) from error
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            hint = f"The hub knows no such repository or revision ('{revision}')."
            raise UnknownBaseModel(base_model=base_model, hint=hint) from error
        except (HubHTTPError, OSError) as error:
            raise away or BaseModelUnavailable(base_model=base_model, reason=first_line(error)) from error

    def _away(self, base_model: str, revision: str) -> BaseModelUnavailable | None:
        """Why only what is on this disk can be had now; None where the hub answers, if only to refuse."""
        token = self.hub_token or False
        ask = partial(HfApi().model_info, base_model, revision=revision, timeout=ANSWER_SECONDS, token=token)
        try:
            first_answer(base_model, ask)
        except BaseModelUnavailable as error:
            return error
        except HfHubHTTPError:
            return None
        return None

    def _content_revision(self, folder: Path) -> str:
        """Hash a registered folder's files."""
        files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
        hashes = self._hashes(files)
        whole = hashlib.sha256("".join(f"{path.name} {hashes[path]}\n" for path in files).encode())
        return f"sha256-{whole.hexdigest()[:40]}"

    def _prove(self, snapshot: Path) -> None:
        """Compare the weights with their names in the hub's cache, which are their sha256.

        A file that is wrong is removed, so that the next run fetches it anew.
        """
        large = [path for path in snapshot.glob("*.safetensors") if _SHA256.fullmatch(path.resolve().name)]
        for path, sha256 in self._hashes(large).items():
            blob = path.resolve()
            if sha256 != blob.name:
                blob.unlink(missing_ok=True)
                raise ArtifactCorrupt(key=path.name, expected=blob.name, found=sha256)

    def _hashes(self, files: Sequence[Path]) -> dict[Path, str]:
        """The sha256 of every file; one that has not changed since it was last read is not read again."""
        memory = self.cache.folder / "base-hashes.json"
        known = known_hashes(memory)
        hashes: dict[Path, str] = {}
        learnt: dict[str, str] = {}
        for path in files:
            stat = path.stat()
            name = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
            hashes[path] = known.get(name) or learnt.setdefault(name, hash_file(path)[1])
        if learnt:
            remember_hashes(memory, learnt)
        return hashes


def _check_weights(base_model: str, folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        raise UnsupportedBaseModel(base_model=base_model, reason="it has no .safetensors weights")


_SHA256 = re.compile(r"[0-9a-f]{64}")
