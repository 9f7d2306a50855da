"""Bytes by component for one base, one spec and one plan: arithmetic only.

The closed form is that of compiled layers, which keep nothing for the backward pass that is elementwise. It was fitted
to runs on an H100 and an H200 (tests/bench/golden.py; docs/memory.md shows how far off it was).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import Any

from graft_shared.catalogue import FAMILIES, ModelShape
from graft_shared.specs import JobSpec, Lora, Optim, Quantization

GIB = 1024**3

# Bytes per quantised weight: 4 bits, and per 64 weights one fp32 constant, or one byte and its own constants.
BYTES_PER_4BIT_WEIGHT = 0.5625
BYTES_PER_4BIT_WEIGHT_DOUBLE_QUANTISED = 0.51587
HALF = 2
SIZE_STEP = 128  # tokens between two sizes of microbatch, at least
SIZES_PER_OCTAVE = 32  # between 4,096 and 8,192 tokens, say: so that no more than 3 % are filling
BYTES_PER_ADAPTER_WEIGHT = 4  # fp32; products are computed with 16-bit copies, see `adapter_copies`
BYTES_PER_ADAPTER_GRADIENT = 4
OPTIMIZER_BYTES = {
    Optim.PAGED_ADAMW_8BIT: 2.03,  # 8-bit moments and block constants; paged memory is resident while there is room
    Optim.ADAMW_8BIT: 2.03,
    Optim.PAGED_ADAMW_32BIT: 8.0,
    Optim.ADAMW_TORCH: 8.0,
}
PAGED = (Optim.PAGED_ADAMW_8BIT, Optim.PAGED_ADAMW_32BIT)
SHARD_BYTES = 50 * 10**9  # of 4-bit weights on their way to the disk, at most: what transformers puts into one file
# Layers that are fed the same tensor: their adapters share the columns by which it is widened.
SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
MOST_SHARED_RANK = 256  # of all that share
COLUMN_STEP = 64  # these come in so many: what one step of a GPU's product sums over
# As wide as the feed-forward part, while its backward pass runs: what it computes again, and gradients. An adapter on
# the last product, which takes the widest input, needs that input and its gradient apart from the product's own.
FEED_FORWARD_TENSORS, FEED_FORWARD_TENSORS_ADAPTED = 3.2, 6.2
STREAM_BYTES_PER_HIDDEN = 4  # the layer's input, and the attention's after its last product
LOSS_CHUNK_BYTES = 256 * 1024**2  # fp32 logits of one chunk, at most
LOSS_CHUNK_TOKENS = 512  # tokens of one chunk, at most: more make no product faster
LOSS_TILE_TOKENS = 128  # tokens are the rows of a product, which is computed in tiles
# What the allocator reserves beyond what is counted, with expandable segments: part grows with the body, part is the
# pools' own, of launches and of graphs, and the workspaces of cuBLAS.
ALLOCATOR_SHARE, ALLOCATOR_BYTES = 0.01, int(0.13 * GIB)
ROOM_USED_AGAIN, ROOM_LOST = 0.3, 2.3  # of what the loss leaves; for each byte by which an evaluation is larger
PUT_BY_SHARE = 0.4  # of gradients: the holes left by what was put by while the optimizer's moments were made
RELAID_SHARE = 0.05  # of weights in 16 bits: the holes that are left where they were before they had room
CONTEXT_BYTES = int(0.85 * GIB)  # outside the allocator: CUDA context and kernels
# Products of a layer's weights and a microbatch's tokens below which the device would wait for the host now and then. A
# compiled layer takes 1 to 2 ms to launch, each way; on an H200 a layer of 202 million weights takes as long for some
# 2,500 tokens, and at 3,500 of them the device was still idle for 15 % of the time.
HOST_BOUND = 2e12
# Beyond, no layer is so small that launching it would matter: on an H200 a 1B with microbatches of 16,384 tokens was
# 1.35 times as fast launched, as sizes have to be captured, and held 0.8 GiB less (h200-graphs.json).
MOST_GRAPH_TOKENS = 8192
LOW, HIGH = 0.93, 1.08
# Admission tries the same plans for each job: a spec asks for some 30, and 72 at most, a refusal for some of each base.
ESTIMATES_REMEMBERED = 4096


class Recompute(StrEnum):
    """What the backward pass computes again instead of keeping it."""

    NONE = "none"
    EVERY_N = "every_n_layers"
    FULL = "full"
    OFFLOAD = "offload"


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How a job is trained: what the planner decides and the trainer carries out."""

    recompute: Recompute
    recompute_every_n: int  # 0 none, 1 every layer is recomputed, n every n-th layer is
    microbatch_tokens: int  # most tokens of one packed row, or of rows × longest when they are padded
    packing: bool
    optim: Optim
    cuda_graphs: bool = False  # microbatches are captured and replayed: see `runs_as_graphs`

    @property
    def mode(self) -> str:
        """`speed` when nothing is computed twice, else `memory`."""
        return "speed" if self.recompute is Recompute.NONE else "memory"

    @property
    def summary(self) -> str:
        """The plan in a few words."""
        words = {
            Recompute.NONE: "nothing computed twice",
            Recompute.EVERY_N: f"one layer in {self.recompute_every_n} computed twice",
            Recompute.FULL: "every layer computed twice",
            Recompute.OFFLOAD: "every layer computed twice, their inputs kept in the host's memory",
        }
        replayed = " as CUDA graphs" if self.cuda_graphs else ""
        return f"with microbatches of {self.microbatch_tokens:,} tokens{replayed}, {words[self.recompute]}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, plan: dict[str, Any]) -> TrainingPlan:
        """Read what `to_dict` wrote."""
        facts = {key: plan[key] for key in ("recompute_every_n", "microbatch_tokens", "packing")}
        return cls(
            recompute=Recompute(plan["recompute"]),
            optim=Optim(plan["optim"]),
            cuda_graphs=plan.get(
                "cuda_graphs", True
            ),  # once plans had no such word, and all that was small was captured
            **facts,
        )


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on the device at the worst moment, by component; and of the host beside a GPU, beyond the process's own."""

    components: dict[str, int]
    host: dict[str, int] = field(default_factory=dict)

    @property
    def host_bytes(self) -> int:
        """What the run may need of the host."""
        return sum(self.host.values())

    @property
    def host_held_bytes(self) -> int:
        """What of it stays while it trains; nothing is loaded where an earlier run has kept the 4-bit weights."""
        return self.host_bytes - self.host.get("loading", 0)

    @property
    def expected_bytes(self) -> int:
        """What the run is expected to need."""
        return sum(self.components.values())

    @property
    def low_bytes(self) -> int:
        """Less than this would be a surprise."""
        return int(LOW * self.expected_bytes)

    @property
    def high_bytes(self) -> int:
        """What the run is given; more than this would be a surprise."""
        return int(HIGH * self.expected_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "components": self.components,
            "low_bytes": self.low_bytes,
            "expected_bytes": self.expected_bytes,
            "high_bytes": self.high_bytes,
            "host_components": self.host,
            "host_bytes": self.host_bytes,
        }


def estimate(
    shape: ModelShape, spec: JobSpec, plan: TrainingPlan, *, evaluation_tokens: int | None = None
) -> MemoryEstimate:
    """Add up what a run holds at its worst moment: while it trains, loads its base, or makes its optimizer.

    Args:
        evaluation_tokens: Of the largest microbatch that only a loss is wanted of; the plan's own if not given.
    """
    evaluated = size_for(plan.microbatch_tokens) if evaluation_tokens is None else evaluation_tokens
    return _estimate(shape, spec.lora, spec.quantization, plan, evaluated)


@lru_cache(maxsize=ESTIMATES_REMEMBERED)
def _estimate(
    shape: ModelShape, lora: Lora, quantization: Quantization, plan: TrainingPlan, evaluated: int
) -> MemoryEstimate:
    sizes = _sizes(shape, lora, quantization)
    components = _components(sizes, plan, evaluated)
    kept_on_disk = min(SHARD_BYTES, sizes.weights + sizes.rest) if sizes.in_4bit else 0
    host = host_bytes(shape, plan, optimizer=components["optimizer"], loading=kept_on_disk)
    return MemoryEstimate(components=components, host=host)


def least_bytes(shape: ModelShape, quantization: Quantization) -> int:
    """What the high end of no estimate is below, whatever the adapter and the plan: the base has to be loaded."""
    quantised = shape.num_hidden_layers * shape.linear_parameters
    weights = int(_bytes_per_weight(quantization) * quantised) + HALF * (shape.parameters - quantised)
    return int(HIGH * (weights + loading_bytes(shape) + CONTEXT_BYTES))


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """What all plans for one base and one kind of adapter have in common: bytes, if nothing else is said."""

    shape: ModelShape
    in_4bit: bool
    weights: int  # of the quantised layers
    rest: int  # of what stays in 16 bits
    adapter: int  # numbers
    copies: int  # of one layer's adapters
    activations_per_token: int  # of one layer
    backward_per_token: float
    evaluation_per_token: int
    scratch: int
    loading: int


@lru_cache(maxsize=ESTIMATES_REMEMBERED)
def _sizes(shape: ModelShape, lora: Lora, quantization: Quantization) -> _Sizes:
    targets = shape.resolve_targets(lora.target_modules)
    weights, rest = base_bytes(shape, lora, quantization, targets)
    return _Sizes(
        shape=shape,
        in_4bit=quantization.load_in_4bit,
        weights=weights,
        rest=rest,
        adapter=adapter_parameters(shape, targets, lora.r),
        copies=HALF * adapter_copies(shape, targets, lora.r),
        activations_per_token=activation_bytes_per_token(shape, targets, lora.r),
        backward_per_token=backward_bytes_per_token(shape, targets),
        evaluation_per_token=evaluation_bytes_per_token(shape),
        scratch=scratch_bytes(shape, lora, quantization, targets),
        loading=weights + rest + loading_bytes(shape),
    )


def _components(sizes: _Sizes, plan: TrainingPlan, evaluated: int) -> dict[str, int]:
    """Bytes on the device by component; `evaluated` are tokens."""
    shape, tokens = sizes.shape, size_for(plan.microbatch_tokens)
    kept, checkpoints = _layers_kept(shape, plan)
    per_layer = tokens * sizes.activations_per_token
    gradients = BYTES_PER_ADAPTER_GRADIENT * sizes.adapter
    held = {
        "base_weights": sizes.weights,
        "unquantised_weights": sizes.rest - embeddings_on_host(shape, plan),
        "adapters": BYTES_PER_ADAPTER_WEIGHT * sizes.adapter + int(sizes.copies * max(1, kept)),
        "gradients": gradients,
        "optimizer": int(OPTIMIZER_BYTES[plan.optim] * sizes.adapter),
        "dequantisation_scratch": sizes.scratch,
    }
    backward = int(tokens * sizes.backward_per_token)
    if checkpoints and not kept:  # else a layer that was kept is done with when the first is computed again
        backward += per_layer
    loss, evaluation = loss_bytes(shape, tokens), evaluated * sizes.evaluation_per_token
    if plan.cuda_graphs:
        between = loss + evaluation - room_used_again(loss, evaluation)  # and neither may use what graphs hold
    else:
        between = max(0, max(loss, evaluation) - backward)  # the one is over when the other begins
    components = {
        **held,
        "activations": int(kept * per_layer),
        "checkpoints": int(tokens * HALF * shape.hidden_size * checkpoints),
        "loss_or_evaluation": between,
        "backward_pass": backward,  # of one layer, with what it computes again
    }
    making = sum(held.values()) + 2 * gradients  # weights and gradients are put by while the moments are made
    components["loading"] = max(0, max(sizes.loading, making) - sum(components.values()))
    slack = ALLOCATOR_BYTES + int(ALLOCATOR_SHARE * sum(components.values()) + PUT_BY_SHARE * gradients)
    if not sizes.in_4bit:
        slack += int(RELAID_SHARE * sizes.weights)
    components["context_and_allocator"] = CONTEXT_BYTES + slack
    return components


def host_bytes(shape: ModelShape, plan: TrainingPlan, *, optimizer: int, loading: int) -> dict[str, int]:
    """What a run on a GPU holds of the host at its worst moment, by component.

    Args:
        optimizer: Bytes of its state; paged, it moves to the host when the GPU is full.
        loading: Bytes that are held until the base is loaded, when nothing else is yet.
    """
    held = {
        "parked_inputs": parked_bytes(shape, plan),
        "embeddings": pinned_bytes(embeddings_on_host(shape, plan)),
        "paged_optimizer": optimizer if plan.optim in PAGED else 0,
    }
    return {**held, "loading": max(0, loading - sum(held.values()))}


def parked_bytes(shape: ModelShape, plan: TrainingPlan) -> int:
    """Bytes of layer inputs that a plan parks in pinned memory, one buffer for each layer."""
    if plan.recompute is not Recompute.OFFLOAD:
        return 0
    return shape.num_hidden_layers * pinned_bytes(HALF * size_for(plan.microbatch_tokens) * shape.hidden_size)


def pinned_bytes(wanted: int) -> int:
    """What torch takes of the host for so many pinned bytes: the next power of two."""
    return 1 << (wanted - 1).bit_length() if wanted else 0


def runs_as_graphs(shape: ModelShape, microbatch_tokens: int) -> bool:
    """Whether launching a layer would take longer than computing it, so that microbatches are captured and replayed.

    Graphs have memory of their own: what runs between or beside them (the loss, an evaluation) shares none with them.
    """
    tokens = size_for(microbatch_tokens)
    return tokens <= MOST_GRAPH_TOKENS and tokens * shape.linear_parameters < HOST_BOUND


def embeddings_on_host(shape: ModelShape, plan: TrainingPlan) -> int:
    """Bytes of input embeddings that a plan leaves in the host's memory; a head that is tied to them keeps them."""
    if plan.recompute is not Recompute.OFFLOAD or shape.tie_word_embeddings:
        return 0
    return HALF * shape.vocab_size * shape.hidden_size


def size_for(tokens: int) -> int:
    """The size that a microbatch of so many tokens is filled up to: one of few, each of which is captured once."""
    step = _size_step(tokens)
    return -(-tokens // step) * step


def _size_step(tokens: int) -> int:
    return max(SIZE_STEP, (1 << (tokens - 1).bit_length()) // 2 // SIZES_PER_OCTAVE)


def shared_columns(names: Iterable[str], r: int) -> dict[tuple[str, ...], int]:
    """Which adapters of one part of a layer share their input's columns, and how many there are.

    Large adapters share none: each product would have to compute with the zeros of its siblings.

    Returns:
        The columns of each group, in the order of its first name.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        fed_alike = next((group for group in SHARED_INPUTS if name in group), (name,))
        together = len(fed_alike) * r <= MOST_SHARED_RANK
        groups.setdefault(fed_alike[0] if together else name, []).append(name)
    return {tuple(group): -(-len(group) * r // COLUMN_STEP) * COLUMN_STEP for group in groups.values()}


@lru_cache(maxsize=ESTIMATES_REMEMBERED)
def _sharing(targets: tuple[str, ...], r: int) -> list[dict[tuple[str, ...], int]]:
    """The `shared_columns` of adapters of this rank, and of the largest below it that share more.

    To share may need more than not to; a rank is promised no less than those below it.
    """
    edges = (MOST_SHARED_RANK // len(group) for group in SHARED_INPUTS)
    return [shared_columns(targets, rank) for rank in (r, *(edge for edge in edges if edge < r))]


def _columns_by_name(targets: tuple[str, ...], r: int) -> dict[str, int]:
    """The columns by which each target is widened, at most."""
    widths = [{name: columns for group, columns in shared.items() for name in group} for shared in _sharing(targets, r)]
    return {name: max(each[name] for each in widths) for name in targets}


def adapter_copies(shape: ModelShape, targets: tuple[str, ...], r: int) -> int:
    """16-bit numbers that one layer keeps of its adapters for the backward pass, as wide as products take them."""
    ends = {linear.name: linear for linear in shape.linears}

    def copies(shared: dict[tuple[str, ...], int]) -> int:
        return sum(
            columns * (ends[group[0]].in_features + sum(ends[name].out_features for name in group))
            for group, columns in shared.items()
        )

    return max(copies(shared) for shared in _sharing(targets, r))


def base_bytes(shape: ModelShape, lora: Lora, quantization: Quantization, targets: tuple[str, ...]) -> tuple[int, int]:
    """Bytes of the quantised layers, and of all that stays in 16 bits (embeddings, head, norms, experts).

    A weight that is not quantised is laid out with room for its adapter's columns.
    """
    quantised = shape.num_hidden_layers * shape.linear_parameters
    plain = shape.parameters - quantised
    if not quantization.load_in_4bit:
        columns = _columns_by_name(targets, lora.r)
        room = sum(linear.out_features * columns.get(linear.name, 0) for linear in shape.linears)
        return HALF * (quantised + shape.num_hidden_layers * room), HALF * plain
    return int(_bytes_per_weight(quantization) * quantised), HALF * plain


def _bytes_per_weight(quantization: Quantization) -> float:
    if not quantization.load_in_4bit:
        return HALF
    double = quantization.bnb_4bit_use_double_quant
    return BYTES_PER_4BIT_WEIGHT_DOUBLE_QUANTISED if double else BYTES_PER_4BIT_WEIGHT


def scratch_bytes(shape: ModelShape, lora: Lora, quantization: Quantization, targets: tuple[str, ...]) -> int:
    """The largest layer's weight in 16 bits, as wide as products take it: 4-bit weights are dequantised into it."""
    if not quantization.load_in_4bit:
        return 0
    columns = _columns_by_name(targets, lora.r)
    return HALF * max(
        linear.out_features * (linear.in_features + columns.get(linear.name, 0)) for linear in shape.linears
    )


def loading_bytes(shape: ModelShape) -> int:
    """What loading holds beside the base itself: the largest tensor in 16 bits, of which another form is made.

    A weight that is being quantised, or a layer's experts, which are put together from their parts.
    """
    largest = max(linear.parameters for linear in shape.linears)
    return HALF * max(largest, shape.expert_parameters)


def adapter_parameters(shape: ModelShape, targets: tuple[str, ...], r: int) -> int:
    """Trainable numbers: r × (in + out) for every target of every layer."""
    widths = {linear.name: linear.in_features + linear.out_features for linear in shape.linears}
    return shape.num_hidden_layers * r * sum(widths[name] for name in targets)


def activation_bytes_per_token(shape: ModelShape, targets: tuple[str, ...], r: int) -> int:
    """Bytes that one compiled layer keeps per token for its backward pass."""
    experts = shape.num_experts_per_tok if shape.num_local_experts else 1
    return (
        HALF * shape.gate_size * experts  # from which all else of the feed-forward part is elementwise
        + STREAM_BYTES_PER_HIDDEN * shape.hidden_size
        + 4 * shape.query_size
        + 4 * shape.key_value_size
        + 4 * shape.num_attention_heads
        + 2 * sum(shared_columns(targets, r).values())
    )


def backward_bytes_per_token(shape: ModelShape, targets: tuple[str, ...]) -> float:
    """Bytes per token that the backward pass of a layer needs beside what was kept for it."""
    last = FAMILIES[shape.model_type].mlp[-1:]
    tensors = FEED_FORWARD_TENSORS_ADAPTED if set(last) & set(targets) else FEED_FORWARD_TENSORS
    return tensors * HALF * shape.intermediate_size


def evaluation_bytes_per_token(shape: ModelShape) -> int:
    """Bytes per token that a layer needs without gradients: gate and up, and four of what goes in and out."""
    return HALF * shape.gate_size + 4 * HALF * shape.hidden_size


def loss_chunk_tokens(vocab_size: int, tokens: int) -> int:
    """Tokens of a microbatch of `tokens` whose logits are held at a time: whole tiles of a product, if that many fit.

    Small microbatches are chosen where memory is short: their chunks are a quarter of them.
    """
    tokens = min(LOSS_CHUNK_TOKENS, LOSS_CHUNK_BYTES // (4 * vocab_size), -(-tokens // 4))
    return max(LOSS_TILE_TOKENS, tokens - tokens % LOSS_TILE_TOKENS)


def loss_bytes(shape: ModelShape, tokens: int) -> int:
    """Cross-entropy a chunk at a time: its logits and their gradient, and all hidden states and theirs, twice.

    A vocabulary that is a little too large for a tile of tokens more has smaller chunks than one that is not; it is
    promised no less.
    """
    per_token = 2 * HALF * shape.vocab_size
    uncut = per_token * min(tokens, loss_chunk_tokens(1, tokens))  # as that of the smallest vocabulary is
    chunk = min(uncut, max(LOSS_CHUNK_BYTES, per_token * LOSS_TILE_TOKENS))
    return chunk + 4 * HALF * tokens * shape.hidden_size


def room_used_again(loss: int, evaluation: int) -> int:
    """Bytes of the room left by the loss that an evaluation fits into: none, if it is much larger."""
    fitting = min(loss, evaluation) - ROOM_LOST * max(0, evaluation - loss)
    return int(ROOM_USED_AGAIN * max(0, fitting))


def _layers_kept(shape: ModelShape, plan: TrainingPlan) -> tuple[float, float]:
    """How many layers keep their activations, and how many keep only their input."""
    layers = shape.num_hidden_layers
    match plan.recompute:
        case Recompute.NONE:
            return layers, 0
        case Recompute.EVERY_N:
            recomputed = -(-layers // plan.recompute_every_n)
            return layers - recomputed, recomputed
        case Recompute.FULL:
            return 0, layers
        case Recompute.OFFLOAD:
            return 0, min(4, layers)  # the one at work, the one on its way, and what a layer gives with its gradient
