"""The frozen base: loaded in 4 bits (or plain), on one device, with nothing cast to fp32 behind its back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from graft_shared.specs import ComputeDtype, Quantization
from graft_worker.training.attention import ATTENTION, register_attention

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


def load_base(path: Path, quantization: Quantization, precision: Precision) -> Any:
    """Load the base from a local folder of safetensors; every parameter is frozen."""
    register_attention()
    config = None
    if quantization.load_in_4bit:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization.bnb_4bit_quant_type.value,
            bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=precision.compute,
        )
    model: Any = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=precision.base,
        quantization_config=config,
        device_map={"": 0} if precision.device.type == "cuda" else {"": "cpu"},
        use_safetensors=True,
        local_files_only=True,
    )
    # Architectures that transformers has not moved to its attention interface (Falcon) keep their own.
    model.set_attn_implementation(ATTENTION)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model
