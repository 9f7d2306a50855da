"""An adapter merged into its full-precision base by PEFT, written as sharded safetensors, and proven."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from graft_worker.host import free_memory_bytes
from graft_worker.protocol import MergeRequest
from graft_worker.training.publish import TOKENIZER_FILES

SHARD_SIZE = "4GB"
# The merged model does not remember the base's fp32 sums: its logits differ by rounding, relative to their norm.
TOLERANCE = {torch.float32: 1e-3}
HALF_TOLERANCE = 0.1
_MIB = 1024**2
_ROOM = 1.3  # of the base's bytes: the weights, one shard on its way to disk, and the interpreter


class NoRoom(Exception):
    """The base does not fit into this machine's memory."""


class NotMerged(Exception):
    """What was written is not base and adapter together."""


def merge(request: MergeRequest, folder: Path) -> dict[str, Any]:
    """Write the merged model into `folder`; returns what was proven about it.

    Raises:
        NoRoom: Before anything is loaded.
        NotMerged: It says something else than base and adapter, or reads back differently.
    """
    base_path, adapter_path = Path(request.base_path), Path(request.adapter_path)
    _require_room(base_path)
    base = AutoModelForCausalLM.from_pretrained(
        base_path, dtype="auto", device_map={"": "cpu"}, use_safetensors=True, local_files_only=True
    )
    adapted = PeftModel.from_pretrained(base, str(adapter_path)).eval()
    before = _said(adapted)
    merged: Any = adapted.merge_and_unload(safe_merge=True)  # raises ValueError for weights that are not finite
    difference = float(((_said(merged) - before).norm(dim=-1) / before.norm(dim=-1)).median())
    if not difference <= TOLERANCE.get(merged.dtype, HALF_TOLERANCE):
        raise NotMerged(f"its logits are {difference:.2g} away from those of base and adapter")
    merged.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    for pattern in TOKENIZER_FILES:
        for path in adapter_path.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    tensors = _read_back(merged, folder)
    _write_card(request, folder)
    return {"logits_difference": difference, "tensors": tensors, "dtype": str(merged.dtype).removeprefix("torch.")}


def _require_room(base_path: Path) -> None:
    needed = int(_ROOM * sum(path.stat().st_size for path in base_path.glob("*.safetensors")))
    free = free_memory_bytes()
    if needed > free:
        raise NoRoom(
            f"merging needs {needed // _MIB} MiB of memory, and {free // _MIB} MiB are free on this worker's machine"
        )


@torch.no_grad()
def _said(model: Any) -> torch.Tensor:
    """The logits of a few random tokens; fp32 [tokens, vocabulary]."""
    vocabulary = model.config.get_text_config().vocab_size
    row = torch.randint(3, vocabulary, (1, 24), generator=torch.Generator().manual_seed(0))
    logits: torch.Tensor = model(input_ids=row, use_cache=False).logits[0].float()
    return logits


def _read_back(merged: Any, folder: Path) -> int:
    """Compare every tensor on disk with the one in memory, a shard at a time; returns how many there are."""
    state = merged.state_dict()
    count = 0
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if name in state and not torch.equal(tensor, state[name]):
                raise NotMerged(f"{name} reads back with other numbers than were written")
            count += 1
    return count


def _write_card(request: MergeRequest, folder: Path) -> None:
    (folder / "README.md").write_text(
        f"---\nbase_model: {request.base_model}\nlibrary_name: transformers\ntags: [merged, qlora, graft]\n---\n\n"
        f"# {request.job_id}\n\n{request.base_model}, revision {request.base_revision}, with the adapter of "
        f"{request.job_id} merged into its weights by Graft. The adapter was trained on the base in the job's "
        "quantisation and is merged into the base as it was published: on a base in 4 bits it may say something else.\n"
    )
