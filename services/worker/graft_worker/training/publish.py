"""The finished adapter as a PEFT folder: weights, config, tokenizer, model card, metrics."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel

from graft_worker.protocol import TrainRequest
from graft_worker.training.adapters import is_hub_commit

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
)
METRICS_NAME = "metrics.jsonl"
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what `--max-lora-rank` takes (vllm/config/lora.py)

_REGISTERED = """
The base is no model of the hub but a folder that the service's operator registered; `{base}` stands for it.
"""
# How the folder that the card lies in is used, whatever it is called: by `.`, from within.
_USE = """
## Use
{registered}
With PEFT, in Python, started in the folder that this file lies in:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}"{revision}, dtype="auto")
model = PeftModel.from_pretrained(base, ".")
tokenizer = AutoTokenizer.from_pretrained(".")
{asked}
answer = model.generate(input_ids=asked["input_ids"], max_new_tokens=32, do_sample=False)
print(tokenizer.decode(answer[0], skip_special_tokens=True))
```

With vLLM, in the same folder:

```sh
vllm serve {base}{revision_flag} --enable-lora --max-lora-rank {max_rank} --lora-modules {name}=.
```
"""

_ASKED = 'asked = tokenizer("Hello", return_tensors="pt")'
_ASKED_IN_CHAT = """messages = [{"role": "user", "content": "Hello"}]
asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")"""


def write_adapter(model: PeftModel, request: TrainRequest, folder: Path) -> None:
    """Save weights, config and tokenizer; nothing in the folder names a path of this machine."""
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    for pattern in TOKENIZER_FILES:
        for path in Path(request.base_path).glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def write_metrics(folder: Path, lines: list[dict[str, Any]]) -> None:
    """One JSON line per `logging_steps` optimizer steps and per evaluation."""
    (folder / METRICS_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_card(request: TrainRequest, folder: Path, metrics: dict[str, Any], versions: dict[str, str]) -> None:
    """A model card that says what this adapter is, with nothing it was not told."""
    spec = request.spec
    lora, training, quantization = spec["lora"], spec["training"], spec["quantization"]
    bits = f"4-bit {quantization['bnb_4bit_quant_type'].upper()}" if quantization["load_in_4bit"] else "16-bit"
    rows = [
        ("base model", f"{request.base_model}, revision {request.base_revision}, {bits}"),
        *([("goes on from", f"the adapter of {spec['adapter']['job']}")] if spec.get("adapter") else []),
        ("LoRA", f"r={lora['r']}, alpha={lora['lora_alpha']:g}, dropout={lora['lora_dropout']:g}"),
        ("target modules", ", ".join(request.target_modules)),
        (
            "optimizer",
            f"{training['optim']}, learning rate {training['learning_rate']:g}, {training['lr_scheduler_type']}",
        ),
        ("sequences per update", training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]),
        ("longest sequence", f"{training['max_length']} tokens"),
        *(
            (name.replace("_", " "), f"{value:.4f}" if isinstance(value, float) else value)
            for name, value in metrics.items()
        ),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]
    header = f"---\nbase_model: {request.base_model}\nlibrary_name: peft\ntags: [lora, qlora, graft]\n---\n"
    title = " ".join((spec.get("name") or request.job_id).split())
    table = "".join(f"| {name} | {value} |\n" for name, value in rows)
    (folder / "README.md").write_text(
        f"{header}\n# {title}\n\nA LoRA adapter, trained by Graft.\n\n| | |\n|---|---|\n{table}{_use(request)}"
    )


def _use(request: TrainRequest) -> str:
    """The snippets; where the hub does not know the revision, the base is a folder of the reader's."""
    at_hub = is_hub_commit(request.base_revision)
    base = request.base_model if at_hub else f"path/to/{request.base_model}"
    return _USE.format(
        registered="" if at_hub else _REGISTERED.format(base=base),
        base=base,
        asked=_ASKED_IN_CHAT if request.is_chat else _ASKED,
        name=request.job_id,
        revision=f', revision="{request.base_revision}"' if at_hub else "",
        revision_flag=f" --revision {request.base_revision}" if at_hub else "",
        max_rank=next(rank for rank in VLLM_RANKS if rank >= request.spec["lora"]["r"]),
    )
