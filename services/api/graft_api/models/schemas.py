"""How a base model looks over HTTP."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from graft_api.models.bases import Source
from graft_shared.catalogue import ModelShape


class BaseModelBody(BaseModel):
    """One base model: its shape, and what limits a job on it."""

    id: str
    object: Literal["model"] = "model"
    source: Source
    revision: str
    model_type: str
    parameters: int
    max_length: int = Field(description="The most tokens that a row may have: its positions.")
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    num_local_experts: int
    tie_word_embeddings: bool
    default_target_modules: list[str]
    target_modules: list[str] = Field(description="Every name that `lora.target_modules` may hold.")


def base_model_body(source: Source, shape: ModelShape) -> BaseModelBody:
    """One base model as users see it."""
    return BaseModelBody(
        id=shape.base_model,
        source=source,
        revision=shape.revision,
        model_type=shape.model_type,
        parameters=shape.parameters,
        max_length=shape.max_position_embeddings,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocab_size,
        num_local_experts=shape.num_local_experts,
        tie_word_embeddings=shape.tie_word_embeddings,
        default_target_modules=list(shape.resolve_targets("auto")),
        target_modules=list(shape.resolve_targets("all-linear")),
    )
