"""`python demo/make_base.py OUT_DIR`: make a small Llama with its own tokenizer and teach it some English.

It takes a minute or two on two cores: 4 million parameters, a byte-level BPE of 2,048 tokens, a chat template. The
result is a folder as the hub would give it, for `models/` of the state directory.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin starve a busy machine

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))
from base_text import prose, small_talk

VOCABULARY = 2048
ROW_TOKENS = 128
BATCH_ROWS = 6
SECONDS = 75.0  # at least; up to twice as long on a machine that has not done enough steps by then
ENOUGH_STEPS = 240
LEARNING_RATE = 2e-3
WARMUP_STEPS = 20
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIALS = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


def main() -> None:
    """Make tokenizer and model, pre-train, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    print(f"base: {model.num_parameters() / 1e6:.1f} million parameters, {len(tokenizer)} tokens in the vocabulary")
    pretrain(model, make_rows(tokenizer), seconds=arguments.seconds)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE over the text that the model will read."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    talk = [text for pair in small_talk()[:1000] for text in pair]
    tokenizer.train_from_iterator([*prose(), *talk], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIALS[0], pad_token=SPECIALS[0])
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(vocabulary: int) -> LlamaForCausalLM:
    """A Llama small enough for a laptop."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def make_rows(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All the text as rows of equal length, int64 [rows, ROW_TOKENS]."""
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}], tokenize=False
        )
        for asked, answered in small_talk()
    ]
    texts = [*(paragraph + SPECIALS[0] for paragraph in prose()), *chats]
    order = torch.randperm(len(texts)).tolist()
    tokens = [token for index in order for token in tokenizer(texts[index])["input_ids"]]
    rows = len(tokens) // ROW_TOKENS
    return torch.tensor(tokens[: rows * ROW_TOKENS]).view(rows, ROW_TOKENS)


def pretrain(model: LlamaForCausalLM, rows: torch.Tensor, *, seconds: float) -> None:
    """Plain next-token training until the time is over and enough steps are done, or twice the time is over."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    started, step = time.monotonic(), 0
    model.train()
    while (done := _done(spent := time.monotonic() - started, step, seconds)) < 1:
        rate = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * max(0.1, 1 - done)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = rows[torch.randint(len(rows), (BATCH_ROWS,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 50 == 0:
            print(f"base: step {step}, {spent:.0f} s, loss {loss.item():.2f}", flush=True)


def _done(spent: float, step: int, seconds: float) -> float:
    """How much of the training lies behind, from 0 to 1."""
    return max(spent / (2 * seconds), min(spent / seconds, step / ENOUGH_STEPS))


if __name__ == "__main__":
    main()
