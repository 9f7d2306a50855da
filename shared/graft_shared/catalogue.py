"""ModelShape: the numbers of a base model that decide memory, read from a config.json or the operator's catalogue.

Sources: the config classes of `transformers` (key names, defaults) and the published config.json of each model.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from graft_shared.errors import InvalidParameter, UnsupportedBaseModel


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One linear layer that every decoder layer has; its name is the one PEFT's `target_modules` knows."""

    name: str
    in_features: int
    out_features: int

    @property
    def parameters(self) -> int:
        """Weights, biases left out: they are small and stay in 16 bits."""
        return self.in_features * self.out_features


@dataclass(frozen=True, kw_only=True)
class Family:
    """How an architecture lays out its decoder layer."""

    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    mlp: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    ties_by_default: bool = False
    norms_per_layer: int = 2


_LLAMA = Family()
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": Family(mlp=()),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": Family(ties_by_default=True),
    "gemma2": Family(ties_by_default=True, norms_per_layer=4),
    "gemma3_text": Family(ties_by_default=True, norms_per_layer=4),
    "phi": Family(attention=("q_proj", "k_proj", "v_proj", "dense"), mlp=("fc1", "fc2"), norms_per_layer=1),
    "phi3": Family(attention=("qkv_proj", "o_proj"), mlp=("gate_up_proj", "down_proj")),
    "falcon": Family(
        attention=("query_key_value", "dense"), mlp=("dense_h_to_4h", "dense_4h_to_h"), ties_by_default=True
    ),
}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of one decoder-only base model."""

    base_model: str
    revision: str
    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    max_position_embeddings: int
    num_local_experts: int = 0
    num_experts_per_tok: int = 0
    linears: tuple[Linear, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, base_model: str, revision: str) -> ModelShape:
        """Read a config.json.

        Raises:
            UnsupportedBaseModel: No decoder-only architecture that is known here, or a number is missing.
        """
        config = config.get("text_config") or config
        model_type = str(config.get("model_type"))
        family = FAMILIES.get(model_type)
        if family is None:
            known = ", ".join(sorted(FAMILIES))
            raise UnsupportedBaseModel(
                base_model=base_model, reason=f"its architecture '{model_type}' is not one of {known}"
            )
        if "quantization_config" in config:
            raise UnsupportedBaseModel(
                base_model=base_model, reason="it is quantised already; name its 16-bit original"
            )
        try:
            return _read(config, family, base_model=base_model, revision=revision, model_type=model_type)
        except KeyError as error:
            raise UnsupportedBaseModel(base_model=base_model, reason=f"its config.json has no {error}") from error

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Width of all key heads together; the values' is the same."""
        return self.num_key_value_heads * self.head_dim

    @property
    def gate_size(self) -> int:
        """Width of what comes out of the first products of the feed-forward part: gate and up, or the one there is."""
        first = FAMILIES[self.model_type].mlp[:-1]
        widths = [linear.out_features for linear in self.linears if linear.name in first]
        return sum(widths) or 2 * self.intermediate_size  # experts are no linear layers; theirs have a gate

    @property
    def linear_parameters(self) -> int:
        """Weights of one layer that 4-bit loading quantises."""
        return sum(linear.parameters for linear in self.linears)

    @property
    def expert_parameters(self) -> int:
        """Weights of one layer's experts and router: transformers keeps experts as one 3-D tensor, never quantised."""
        if not self.num_local_experts:
            return 0
        return self.num_local_experts * 3 * self.hidden_size * self.intermediate_size + (
            self.num_local_experts * self.hidden_size
        )

    @property
    def embedding_parameters(self) -> int:
        """Embeddings and head; counted once where they are tied."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    @property
    def norm_parameters(self) -> int:
        """Norms of all layers and the last one."""
        family = FAMILIES[self.model_type]
        return self.hidden_size * (family.norms_per_layer * self.num_hidden_layers + 1)

    @property
    def parameters(self) -> int:
        """All of them, biases left out."""
        layers = self.num_hidden_layers * (self.linear_parameters + self.expert_parameters)
        return layers + self.embedding_parameters + self.norm_parameters

    @property
    def attention_targets(self) -> tuple[str, ...]:
        """What `target_modules: "auto"` means here."""
        return FAMILIES[self.model_type].attention

    def resolve_targets(self, target_modules: str | Iterable[str]) -> tuple[str, ...]:
        """Return the names of the linears that get an adapter.

        Raises:
            InvalidParameter: A name is not a linear layer of this base.
        """
        names = tuple(linear.name for linear in self.linears)
        if target_modules == "auto":
            return self.attention_targets
        if target_modules == "all-linear":
            return names
        wanted = tuple(target_modules)
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise InvalidParameter(
                param="lora.target_modules",
                reason=f"{self.base_model} has no {', '.join(unknown)}; it has {', '.join(names)}",
            )
        return wanted


@dataclass(frozen=True)
class Catalogue:
    """Base models that the operator knows, by id."""

    shapes: Mapping[str, ModelShape]

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Catalogue:
        """Read the catalogue's document: families of entries that share keys; see deploy/catalogue.yaml."""
        shapes: dict[str, ModelShape] = {}
        for entry in document["models"]:
            config = {key: value for key, value in entry.items() if key not in ("ids", "revision")}
            for base_model in entry["ids"]:
                shapes[base_model] = ModelShape.from_config(
                    config, base_model=base_model, revision=entry.get("revision", "main")
                )
        return cls(shapes)

    def get(self, base_model: str) -> ModelShape | None:
        """Return the shape of a listed base, None for any other."""
        return self.shapes.get(base_model)

    def __iter__(self) -> Iterator[ModelShape]:
        return iter(self.shapes.values())

    def suggest(self, base_model: str) -> list[str]:
        """The listed ids that look most like this one."""
        return difflib.get_close_matches(base_model, self.shapes, n=3, cutoff=0.5)


def _read(config: Mapping[str, Any], family: Family, **names: str) -> ModelShape:
    hidden = int(config["hidden_size"])
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or hidden // heads)
    if names["model_type"] == "falcon":
        new = bool(config.get("new_decoder_architecture", False))
        key_values = (
            int(config.get("num_kv_heads") or heads) if new else (1 if config.get("multi_query", True) else heads)
        )
        ffn = int(config.get("ffn_hidden_size") or 4 * hidden)
    else:
        key_values = int(config.get("num_key_value_heads") or heads)
        ffn = int(config["intermediate_size"])
    sizes = {
        "hidden": hidden,
        "query": heads * head_dim,
        "key_value": key_values * head_dim,
        "ffn": ffn,
    }
    tied = config.get("tie_word_embeddings")
    return ModelShape(
        **names,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=int(config["num_hidden_layers"]),
        num_attention_heads=heads,
        num_key_value_heads=key_values,
        head_dim=head_dim,
        vocab_size=int(config["vocab_size"]),
        tie_word_embeddings=family.ties_by_default if tied is None else bool(tied),
        max_position_embeddings=int(config.get("max_position_embeddings", 2048)),
        num_local_experts=int(config.get("num_local_experts", 0)),
        num_experts_per_tok=int(config.get("num_experts_per_tok", 2)) if config.get("num_local_experts") else 0,
        linears=tuple(_linear(name, sizes) for name in (*family.attention, *family.mlp)),
    )


def _linear(name: str, sizes: Mapping[str, int]) -> Linear:
    hidden, query, key_value, ffn = sizes["hidden"], sizes["query"], sizes["key_value"], sizes["ffn"]
    widths = {
        "q_proj": (hidden, query),
        "k_proj": (hidden, key_value),
        "v_proj": (hidden, key_value),
        "o_proj": (query, hidden),
        "dense": (query, hidden),
        "qkv_proj": (hidden, query + 2 * key_value),
        "query_key_value": (hidden, query + 2 * key_value),
        "gate_proj": (hidden, ffn),
        "up_proj": (hidden, ffn),
        "gate_up_proj": (hidden, 2 * ffn),
        "down_proj": (ffn, hidden),
        "fc1": (hidden, ffn),
        "fc2": (ffn, hidden),
        "dense_h_to_4h": (hidden, ffn),
        "dense_4h_to_h": (ffn, hidden),
    }
    inputs, outputs = widths[name]
    return Linear(name=name, in_features=inputs, out_features=outputs)
