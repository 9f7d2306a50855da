"""The frozen base: loaded in 4 bits (or plain), on one device, with nothing cast to fp32 behind its back."""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from graft_shared.specs import ComputeDtype, Quantization
from graft_worker.training.attention import ATTENTION, register_attention
from graft_worker.training.durable import sync_folder

logger = logging.getLogger(__name__)

RANDOM_WORDS = ("dropout", "pdrop", "layerdrop", "jitter")  # in the names of what transformers' modules draw by
ABANDONED_SECONDS = 3600.0  # longer than any base takes to be written

BF16_CAPABILITY = (8, 0)  # older cards have no bfloat16 products


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The types a run computes in."""

    device: torch.device
    compute: torch.dtype  # products of the base
    base: torch.dtype  # what is not quantised: embeddings, norms, head

    @property
    def scales_loss(self) -> bool:
        """Whether gradients would underflow without a loss scale."""
        return self.compute is torch.float16


def choose_precision(wanted: ComputeDtype) -> Precision:
    """Decide the types by the device: bf16 where the card has it, else fp16; on the CPU fp32 for what is not 4-bit."""
    if not torch.cuda.is_available():
        compute = torch.float32 if wanted is ComputeDtype.AUTO else getattr(torch, wanted.value)
        return Precision(device=torch.device("cpu"), compute=compute, base=torch.float32)
    has_bf16 = torch.cuda.get_device_capability() >= BF16_CAPABILITY
    automatic = torch.bfloat16 if has_bf16 else torch.float16
    compute = automatic if wanted is ComputeDtype.AUTO else getattr(torch, wanted.value)
    return Precision(device=torch.device("cuda", 0), compute=compute, base=compute)


def load_base(
    path: Path, quantization: Quantization, precision: Precision, *, quantised_dir: Path | None = None
) -> Any:
    """Load the base from a local folder of safetensors; every parameter is frozen.

    Args:
        quantised_dir: Where the 4-bit weights are kept once they are made: the same bits at a quarter of the bytes.
    """
    register_attention()
    if quantization.load_in_4bit and quantised_dir is not None:
        model = _load_quantised(path, quantization, precision, quantised_dir / _kind(quantization, precision))
    else:
        model = _load(path, precision, _bitsandbytes(quantization, precision) if quantization.load_in_4bit else None)
    # Architectures that transformers has not moved to its attention interface (Falcon) keep their own.
    model.set_attn_implementation(ATTENTION)
    model.requires_grad_(False)
    model.config.use_cache = False
    _silence_dropout(model)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes' own forward in eval mode would repack the weights in place, where others still read them.
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (bitsandbytes is untyped)
    return model


def _load_quantised(path: Path, quantization: Quantization, precision: Precision, kept: Path) -> Any:
    """Load what an earlier run has kept, or quantise and keep; what cannot be kept or read costs time, not the run."""
    if (kept / "config.json").exists():
        try:
            return _load(kept, precision, _bitsandbytes(quantization, precision))
        except (torch.cuda.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 (whatever is wrong with the copy, the base is still there)
            logger.warning("%s cannot be read and is made again: %s", kept, error)
            _remove(kept)
    model = _load(path, precision, _bitsandbytes(quantization, precision))
    partial = kept.with_name(f".{uuid4().hex}")  # other workers of the host may be at the same
    try:
        _remove_abandoned(kept.parent)
        model.save_pretrained(partial)
        sync_folder(partial)
        partial.rename(kept)
    except Exception as error:  # noqa: BLE001 (a full disk, or an architecture that cannot be saved in 4 bits)
        logger.warning("The 4-bit weights are not kept: %s", error)
        shutil.rmtree(partial, ignore_errors=True)
    return model


def _remove(kept: Path) -> None:
    """Take it away in one go, and only what is there now: another worker may be making it anew."""
    aside = kept.with_name(f".{uuid4().hex}")
    try:
        kept.rename(aside)
    except OSError:
        return  # somebody was faster
    shutil.rmtree(aside, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove what runs that were killed while they wrote have left."""
    for path in folder.glob(".*"):
        if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _silence_dropout(model: torch.nn.Module) -> None:
    """Turn the base's own dropout and jitter off: they draw from a generator, which packing, recomputing and capturing
    would all ask at other times. What regularises is the adapter's dropout.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and any(word in name for word in RANDOM_WORDS):
                setattr(module, name, 0.0)


def _load(path: Path, precision: Precision, quantization: BitsAndBytesConfig | None) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        path,
        dtype=precision.base,
        quantization_config=quantization,
        device_map={"": 0} if precision.device.type == "cuda" else {"": "cpu"},
        use_safetensors=True,
        local_files_only=True,
    )


def _bitsandbytes(quantization: Quantization, precision: Precision) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.bnb_4bit_quant_type.value,
        bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=precision.compute,
    )


def _kind(quantization: Quantization, precision: Precision) -> str:
    """A name for all that the kept weights depend on, the libraries that made them included."""
    double = "double" if quantization.bnb_4bit_use_double_quant else "single"
    dtype = "-".join(dict.fromkeys(str(kind).removeprefix("torch.") for kind in (precision.base, precision.compute)))
    made_by = "-".join(metadata.version(name) for name in ("bitsandbytes", "transformers"))
    return f"{quantization.bnb_4bit_quant_type}-{double}-{dtype}-{made_by}"
