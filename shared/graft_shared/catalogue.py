"""ModelShape: the numbers of a base model that decide memory, read from a config.json or the operator's catalogue.

Sources: the config classes of `transformers` (key names, defaults) and the published config.json of each model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from graft_shared.errors import InvalidParameter, UnsupportedBaseModel
from graft_shared.specs import SHORTEST_MAX_LENGTH

LARGEST_SIZE = 2**31 - 1  # of anything that a config.json counts; the largest published one has some ten million


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One linear layer that every decoder layer has; its name is the one PEFT's `target_modules` knows."""

    name: str
    in_features: int
    out_features: int

    @cached_property
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

    def __hash__(self) -> int:
        """Of its name alone: it is looked up for each plan of each base that a refusal thinks of."""
        return hash((self.base_model, self.revision))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, base_model: str, revision: str) -> ModelShape:
        """Read a config.json.

        Raises:
            UnsupportedBaseModel: No decoder-only architecture that is known here, or a size is missing or is none.
        """
        config = config.get("text_config") or config
        if not isinstance(config, Mapping):
            raise UnsupportedBaseModel(base_model=base_model, reason="the text_config of its config.json is no object")
        model_type = _shown(config.get("model_type"))
        family = FAMILIES.get(model_type)
        if family is None:
            known = ", ".join(sorted(FAMILIES))
            raise UnsupportedBaseModel(
                base_model=base_model, reason=f"its architecture '{model_type}' is not one of {known}"
            )
        if config.get("quantization_config") is not None:
            raise UnsupportedBaseModel(
                base_model=base_model, reason="it is quantised already; name its 16-bit original"
            )
        try:
            return _read(config, family, base_model=base_model, revision=revision, model_type=model_type)
        except KeyError as error:
            raise UnsupportedBaseModel(base_model=base_model, reason=f"its config.json has no {error}") from error
        except ValueError as error:
            raise UnsupportedBaseModel(base_model=base_model, reason=f"its config.json {error}") from error

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

    @cached_property
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

    @cached_property
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


def _read(config: Mapping[str, Any], family: Family, **names: str) -> ModelShape:
    hidden = _size(config, "hidden_size")
    heads = _size(config, "num_attention_heads")
    head_dim = _size(config, "head_dim", hidden // heads)
    if names["model_type"] == "falcon":
        new = bool(config.get("new_decoder_architecture", False))
        key_values = _size(config, "num_kv_heads", heads) if new else (1 if config.get("multi_query", True) else heads)
        ffn = _size(config, "ffn_hidden_size", 4 * hidden)
    else:
        key_values = _size(config, "num_key_value_heads", heads)
        ffn = _size(config, "intermediate_size")
    sizes = {
        "hidden": hidden,
        "query": heads * head_dim,
        "key_value": key_values * head_dim,
        "ffn": ffn,
    }
    tied = config.get("tie_word_embeddings")
    experts = _size(config, "num_local_experts", 0) if config.get("num_local_experts") else 0
    return ModelShape(
        **names,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=_size(config, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=key_values,
        head_dim=head_dim,
        vocab_size=_size(config, "vocab_size"),
        tie_word_embeddings=family.ties_by_default if tied is None else bool(tied),
        max_position_embeddings=_positions(config),
        num_local_experts=experts,
        num_experts_per_tok=_size(config, "num_experts_per_tok", 2) if experts else 0,
        linears=tuple(_linear(name, sizes) for name in (*family.attention, *family.mlp)),
    )


def _positions(config: Mapping[str, Any]) -> int:
    """How long a sequence may be.

    LongRoPE (Phi's long models) turns every sequence of a batch by other angles as soon as one is longer than it was
    first trained on: packed with others, a sequence would not be what it is alone.
    """
    positions = _size(config, "max_position_embeddings", 2048)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if isinstance(rope, Mapping) and rope.get("rope_type", rope.get("type")) == "longrope":
        positions = min(positions, _size({**config, **rope}, "original_max_position_embeddings", positions))
    if positions < SHORTEST_MAX_LENGTH:
        raise ValueError(f"has {positions} positions, and no sequence here is under {SHORTEST_MAX_LENGTH} tokens")
    return positions


def _size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A size that a config.json names, or the default for one that it leaves out.

    Raises:
        KeyError: It is left out, and has no default.
        ValueError: It is no size.
    """
    size = config[name] if default is None else config.get(name) or default
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= LARGEST_SIZE:
        raise ValueError(f"has {name} = {_shown(size)}, and a whole number from 1 to {LARGEST_SIZE} is wanted")
    return size


def _shown(value: Any) -> str:
    """The beginning of what a config.json says, as text that can be sent: half a surrogate pair cannot."""
    return str(value)[:50].encode("utf-8", "backslashreplace").decode()


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
