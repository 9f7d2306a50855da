"""Small real things for tests: a base model with its tokenizer, and prepared data."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from graft_shared.catalogue import ModelShape
from graft_shared.memory import TrainingPlan, runs_as_graphs

EMPTY_WEIGHTS = (2).to_bytes(8, "little") + b"{}"  # a safetensors file of no tensor


def plan_that_ran(plan: dict[str, Any], shape: ModelShape) -> TrainingPlan:
    """A plan of a published run: the earlier ones do not say that small microbatches were captured."""
    captured = runs_as_graphs(shape, plan["microbatch_tokens"])
    return TrainingPlan.from_dict({"cuda_graphs": captured, **plan})


_making = threading.Lock()  # the random state and transformers' half-imported modules are shared by all threads
_SENTENCES = [
    "What does the cat say? The cat says cat cat.",
    "What does the dog say? The dog says dog dog.",
    "hen cow pig owl fox bee word words too late for the answer",
]


def make_tiny_base(path: Path, *, model_type: str = "llama", **config: Any) -> Path:
    """Write a base of some ten thousand random weights, with a real fast tokenizer; returns its folder."""
    with _making:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        fast = make_tokenizer()
        sizes: dict[str, Any] = {
            "initializer_range": 0.15,  # so that an adapter on the layers alone can move the output
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(fast),
            "max_position_embeddings": 512,
            "bos_token_id": 0,
            "eos_token_id": 1,
            **config,
        }
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
        path.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(path)
        fast.save_pretrained(path)
    return path


def make_tokenizer() -> Any:
    """A byte-level BPE of 320 tokens, as transformers loads it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def make_metaspace_tokenizer() -> Any:
    """A BPE that puts a space before every text, as Llama 2's SentencePiece does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    alphabet = sorted({chr(code) for code in range(33, 127)})
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def make_prepared_split(path: Path, rows: list[list[int]], *, prompt_tokens: int = 0) -> Path:
    """Write token rows as preparing would; the first `prompt_tokens` of each are not learnt."""
    mask = [[0] * min(prompt_tokens, len(row)) + [1] * max(0, len(row) - prompt_tokens) for row in rows]
    tensors = {
        "input_ids": np.array([token for row in rows for token in row], dtype=np.int32),
        "loss_mask": np.array([bit for row in mask for bit in row], dtype=np.uint8),
        "offsets": np.cumsum([0, *(len(row) for row in rows)]).astype(np.int64),
    }
    save_file(tensors, path)
    return path
