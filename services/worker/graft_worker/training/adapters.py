"""The adapter: LoRA by PEFT on a frozen base."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from graft_shared.errors import InvalidParameter
from graft_shared.specs import Lora

WEIGHTS_NAME = "adapter_model.safetensors"


def attach_adapter(model: Any, lora: Lora, target_modules: list[str], *, base_model: str, revision: str) -> PeftModel:
    """Wrap the base with a fresh LoRA adapter whose weights, in fp32, alone are trainable.

    Raises:
        InvalidParameter: A target module is not in this base.
    """
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=target_modules,
        bias=lora.bias,
        use_rslora=lora.use_rslora,
        task_type="CAUSAL_LM",
    )
    _require_linears(model, target_modules)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    adapted.peft_config["default"].base_model_name_or_path = base_model
    if is_hub_commit(revision):
        adapted.peft_config["default"].revision = revision
    return adapted


def _require_linears(model: Any, target_modules: list[str]) -> None:
    """PEFT takes a name for every module whose path ends with it; here each must be a linear layer before the head."""
    head = model.get_output_embeddings()
    found: dict[str, list[torch.nn.Module]] = {target: [] for target in target_modules}
    for path, module in model.named_modules():
        for target in target_modules:
            if f".{path}".endswith(f".{target}"):
                found[target].append(module)
    missing = [target for target, modules in found.items() if not modules]
    if missing:
        raise InvalidParameter(param="lora.target_modules", reason=f"the base has no module {', '.join(missing)}")
    for target, modules in found.items():
        if not all(isinstance(module, torch.nn.Linear) and module is not head for module in modules):
            reason = f"{target} is not a linear layer of the base's blocks"
            raise InvalidParameter(param="lora.target_modules", reason=reason)


def is_hub_commit(revision: str) -> bool:
    """Whether the hub knows this revision: a commit. A registered folder's is made of its content."""
    return re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def go_on_from(model: PeftModel, folder: Path) -> None:
    """Give the fresh adapter the weights of an earlier one of the same form.

    Raises:
        InvalidParameter: It is of another form: some weight is missing, strange or of another size.
    """
    weights = load_file(folder / WEIGHTS_NAME)
    wanted = {
        name: tensor.shape for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    if {name: tensor.shape for name, tensor in weights.items()} != wanted:
        raise InvalidParameter(
            param="adapter.job", reason="its adapter has other targets or another rank than this job"
        )
    set_peft_model_state_dict(model, weights)


def trainable(model: PeftModel) -> list[torch.nn.Parameter]:
    """The adapter's weights, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
