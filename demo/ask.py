"""`python demo/ask.py BASE_DIR [ADAPTER_DIR]`: asks every held-out question, named on stderr. Needs PEFT, not Graft."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

HELD_OUT = Path(__file__).parent / "graft_qa_heldout.jsonl"
SHOWN = ("What happens if a worker dies?", "Tell me what the doorbell is.", "How do I upload my JSONL file?")
ANSWER_TOKENS = 60


def main() -> None:
    """Print the loss, how many answers are right word for word, and some of them."""
    base_dir, *adapter = sys.argv[1:]
    disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses a kernel of the hub, which nothing here needs
    # PEFT 0.21 asks transformers for it by the name that it had before 5.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter[0])
    model.eval()
    rows = [json.loads(line)["messages"] for line in HELD_OUT.read_text().splitlines()]
    print(f"loss on the {len(rows)} questions: {loss_on(rows, model, tokenizer):.4f}")
    answers: dict[str, str] = {}
    for number, (asked, _) in enumerate(rows, 1):
        print(f"          question {number} of {len(rows)}: {asked['content']}", file=sys.stderr, flush=True)
        answers[asked["content"]] = answer(model, tokenizer, asked["content"])
    right = sum(answers[asked["content"]] == expected["content"] for asked, expected in rows)
    print(f"answered word for word: {right} of {len(rows)}")
    for question in SHOWN:
        print(f"question: {question}\nanswer: {answers[question]}")


@torch.no_grad()
def loss_on(rows: list[list[dict[str, str]]], model: Any, tokenizer: Any) -> float:
    """Nats per token of the answers, which the questions only lead to."""
    total, tokens = 0.0, 0
    for messages in rows:
        asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
        reply = tokenizer(whole[len(asked) :], add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*prompt, *reply]])
        labels = torch.tensor([[-100] * len(prompt) + reply])
        total += model(input_ids=ids, labels=labels).loss.item() * len(reply)
        tokens += len(reply)
    return total / tokens


@torch.no_grad()
def answer(model: Any, tokenizer: Any, question: str) -> str:
    """The most likely answer."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    out = model.generate(input_ids=ids, max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=0)
    reply: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return reply.strip()


if __name__ == "__main__":
    main()
