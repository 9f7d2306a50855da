"""GpuClass and CapacityTable: where a job fits, or the refusal with its numbers and the changes that would fit."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from itertools import chain, islice
from typing import Any

from graft_shared.catalogue import Catalogue, ModelShape
from graft_shared.errors import GraftError, InvalidParameter, VramCapacityExceeded
from graft_shared.memory import GIB, HALF, MemoryEstimate, TrainingPlan, estimate
from graft_shared.planner import cheaper_plan, fastest_plan, fits, leanest_plan, plan_for_smaller_host
from graft_shared.specs import DEFAULT_REVISION, JobSpec
from graft_shared.speed import Rates

LENGTH_STEP = 256  # tokens: `max_length` is offered in whole steps of this
SHORT_LENGTHS = (128, 64)  # or, where no step fits, as one of these
CLASS_TOLERANCE = 0.93  # cards report less than their name: a "24 GB" card 22.5 to 24 GiB
FITS_HERE = 5
TABLE_MAX_LENGTH = 512  # tokens: what the table's "largest base" is trained at


@dataclass(frozen=True, kw_only=True)
class GpuClass:
    """A memory size with a name, a price and a queue (of the same name)."""

    name: str
    memory_bytes: int  # what the smallest common card of this class reports
    usable_bytes: int  # what a job may take of it
    cost_rank: int
    price_per_hour: float | None = None
    is_cpu: bool = False
    max_parameters: int | None = None  # larger bases are not put here, whatever their bytes
    cards: tuple[Rates, ...] = ()  # the slowest and the fastest of the class, for forecasts
    calibrated: bool = False  # forecasts were measured on these cards

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What a job keeps of it."""
        return asdict(self)

    def takes(self, shape: ModelShape) -> bool:
        """Whether this class is meant for bases of that size at all."""
        return self.max_parameters is None or shape.parameters <= self.max_parameters

    def held_of_host(self, needed: MemoryEstimate) -> int:
        """Bytes of the machine's own memory that a run holds here: on a CPU there is no other."""
        return needed.expected_bytes if self.is_cpu else needed.host_held_bytes


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a job goes, how it will be trained, and what it will need."""

    gpu_class: GpuClass
    plan: TrainingPlan
    estimate: MemoryEstimate
    target_modules: tuple[str, ...]
    warnings: tuple[dict[str, str], ...] = ()

    @property
    def summary(self) -> str:
        """What becomes of a job that had too little memory and is placed here, as a sentence."""
        return f"There was too little memory; the job goes on on {self.gpu_class.name}, {self.plan.summary}."


@dataclass(frozen=True)
class CapacityTable:
    """The operator's GPU classes, cheapest first."""

    classes: tuple[GpuClass, ...]
    known: tuple[GpuClass, ...] = ()
    """Classes that exist elsewhere: a refusal names the one that the job would need."""

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], *, known: tuple[GpuClass, ...] = ()) -> CapacityTable:
        """Read the table's document; see deploy/capacity.yaml."""
        read = [_class_from(name, facts, rank) for rank, (name, facts) in enumerate(document["classes"].items())]
        return cls(tuple(read), known)

    def get(self, name: str) -> GpuClass | None:
        """Return a class by its name."""
        return next((gpu for gpu in self.classes if gpu.name == name), None)

    def restricted_to(self, names: Iterable[str]) -> CapacityTable:
        """The same table with these classes only."""
        kept = set(names)
        return CapacityTable(tuple(gpu for gpu in self.classes if gpu.name in kept), self.known or self.classes)

    def class_for_memory(self, total_bytes: int) -> GpuClass | None:
        """The largest class that a card of this memory serves, None for a card below all of them."""
        served = [gpu for gpu in self.classes if not gpu.is_cpu and gpu.memory_bytes <= total_bytes / CLASS_TOLERANCE]
        return max(served, key=lambda gpu: gpu.memory_bytes, default=None)

    def place(
        self, shape: ModelShape, spec: JobSpec, catalogue: Catalogue, registered: Iterable[ModelShape] = ()
    ) -> Placement:
        """Return the cheapest GPU class on which some plan fits the spec `within_positions` of its base.

        A refusal names bases that fit; the `registered` ones, which are read only then, come before the catalogue's.

        Raises:
            InvalidParameter: An unknown class, targets that the base lacks, or a length beyond its positions.
            VramCapacityExceeded: No class is big enough; carries the numbers and the smallest changes that would fit.
        """
        fitted = within_positions(shape, spec)
        self._check(shape, fitted)
        chosen = self._chosen(shape, fitted)
        if chosen is not None:
            return self._placement(*chosen, shape, fitted)
        raise self._refusal(shape, spec, catalogue, registered)

    def after_out_of_memory(
        self, shape: ModelShape, spec: JobSpec, gpu_class: str, plan: TrainingPlan
    ) -> Placement | None:
        """Where a job goes on whose plan needed more than this class has, whatever the arithmetic says.

        To the next cheaper plan on the same class; after the last of them to the next larger class, if the job left its
        class open; None when there is neither. The same sequences make an update everywhere.
        """
        here = self.get(gpu_class)
        found = cheaper_plan(shape, spec, plan)
        if here is not None and found is not None:
            return self._placement(here, *found, shape, spec)
        size = here.usable_bytes if here is not None else 0
        for gpu in self._allowed(spec):
            chosen = fastest_plan(shape, spec, gpu.usable_bytes, gpu.cards) if gpu.usable_bytes > size else None
            if chosen is not None and gpu.takes(shape):
                return self._placement(gpu, *chosen, shape, spec)
        return None

    def after_host_out_of_memory(
        self, shape: ModelShape, spec: JobSpec, gpu_class: str, plan: TrainingPlan, free_bytes: int | None
    ) -> Placement | None:
        """How a job goes on whose plan needs more of the host than there is; None where no plan would need less."""
        here = self.get(gpu_class)
        if here is None:
            return None
        find = cheaper_plan if here.is_cpu else plan_for_smaller_host
        found = find(shape, spec, plan, free_bytes)
        return self._placement(here, *found, shape, spec) if found is not None else None

    def largest_base(self, gpu: GpuClass, catalogue: Catalogue, spec: JobSpec) -> ModelShape | None:
        """The largest listed base that this class trains with these settings."""
        here = CapacityTable((gpu,))
        return next((shape for shape in _largest_first(catalogue) if here._fits(shape, spec)), None)

    @staticmethod
    def _placement(
        gpu: GpuClass, plan: TrainingPlan, needed: MemoryEstimate, shape: ModelShape, spec: JobSpec
    ) -> Placement:
        if gpu.is_cpu:
            plan = replace(plan, cuda_graphs=False)
            needed = replace(estimate(shape, spec, plan), host={})
        return Placement(
            gpu_class=gpu,
            plan=plan,
            estimate=needed,
            target_modules=shape.resolve_targets(spec.lora.target_modules),
            warnings=_warnings(shape, spec),
        )

    def _check(self, shape: ModelShape, spec: JobSpec) -> None:
        if spec.gpu.gpu_class != "auto" and self.get(spec.gpu.gpu_class) is None:
            names = ", ".join(gpu.name for gpu in self.classes)
            raise InvalidParameter(
                param="gpu.class", reason=f"there is no class '{spec.gpu.gpu_class}'; there are {names}"
            )
        if spec.training.max_length > shape.max_position_embeddings:
            limit = shape.max_position_embeddings
            raise InvalidParameter(
                param="training.max_length",
                reason=f"{shape.base_model} has {limit} positions; {spec.training.max_length} is more",
            )
        shape.resolve_targets(spec.lora.target_modules)

    def _allowed(self, spec: JobSpec) -> Iterator[GpuClass]:
        wanted = spec.gpu.gpu_class
        yield from (gpu for gpu in self.classes if wanted in ("auto", gpu.name))

    def _chosen(self, shape: ModelShape, spec: JobSpec) -> tuple[GpuClass, TrainingPlan, MemoryEstimate] | None:
        """The cheapest class where some plan fits, and the fastest of these."""
        least = leanest_plan(shape, spec)[1].high_bytes  # so that not every plan is tried where none fits
        for gpu in self._allowed(spec):
            if gpu.takes(shape) and least <= gpu.usable_bytes:
                found = fastest_plan(shape, spec, gpu.usable_bytes, gpu.cards)
                if found is not None:
                    return gpu, *found
        return None

    def _fits(self, shape: ModelShape, spec: JobSpec) -> bool:
        """Whether `place` would accept it."""
        spec = within_positions(shape, spec)
        try:
            self._check(shape, spec)
        except GraftError:
            return False
        room = max((gpu.usable_bytes for gpu in self._allowed(spec) if gpu.takes(shape)), default=0)
        return fits(shape, spec, room)

    def _refusal(
        self, shape: ModelShape, spec: JobSpec, catalogue: Catalogue, registered: Iterable[ModelShape]
    ) -> VramCapacityExceeded:
        largest = max(self._allowed(spec), key=lambda gpu: gpu.usable_bytes)
        _, needed = leanest_plan(shape, within_positions(shape, spec))
        everywhere = sorted({*self.classes, *self.known}, key=lambda gpu: gpu.usable_bytes)
        required = next((gpu for gpu in everywhere if gpu.takes(shape) and needed.high_bytes <= gpu.usable_bytes), None)
        fits_here = cache(lambda base: self._fits(base, spec))
        own = {base.base_model: base for base in _largest_first(registered)}
        listed = [base for base in _largest_first(catalogue) if base.base_model not in own]
        bases = (list(own.values()), listed) if _is_open(spec) else ()
        changes = list(self._changes(shape, spec, bases, fits_here))
        fitting = (base.base_model for base in chain(*bases) if fits_here(base))
        which = "the largest GPU class here" if spec.gpu.gpu_class == "auto" else "the class you asked for"
        asked = f"{shape.base_model} ({shape.parameters / 1e9:.1f}B)"
        wanted, there_is = _gib_apart(needed.high_bytes, largest.usable_bytes)
        reason = (
            f"{asked} with these settings needs {wanted}; {which}, {largest.name}, has {there_is}."
            if largest.takes(shape)
            else f"{asked} has too many parameters; "
            f"{which}, {largest.name}, takes bases of up to {(largest.max_parameters or 0) / 1e9:.1f}B."
        )
        advice = (
            f"It would fit with {_sentence(changes)}." if changes else "No single change of its settings makes it fit."
        )
        return VramCapacityExceeded(
            f"{reason} {advice}",
            param=changes[0]["param"] if changes else "base_model",
            **(_memory_facts(largest, needed) if largest.takes(shape) else {}),
            largest_class=largest.name,
            required_class=required.name if required else None,
            fits_here=list(islice(fitting, FITS_HERE)),
            changes=changes,
        )

    def _changes(
        self,
        shape: ModelShape,
        spec: JobSpec,
        bases: tuple[list[ModelShape], ...],
        fits_here: Callable[[ModelShape], bool],
    ) -> Iterator[dict[str, Any]]:
        """Single changes after which the job is accepted, each tried by placing it; the gentlest first.

        Of each list of `bases`, the largest first, one may be offered instead of the job's. To a job that goes on from
        an earlier adapter no other form is offered.
        """
        yield from self._shorter(shape, spec)
        if spec.training.gradient_checkpointing is False:
            yield from self._first("training.gradient_checkpointing", False, ["auto"], shape, spec)
        if not spec.quantization.load_in_4bit:
            yield from self._first("quantization.load_in_4bit", False, [True], shape, spec)
        if not spec.quantization.bnb_4bit_use_double_quant:
            yield from self._first("quantization.bnb_4bit_use_double_quant", False, [True], shape, spec)
        if "8bit" not in spec.training.optim:
            optim = spec.training.optim.value
            yield from self._first("training.optim", optim, ["paged_adamw_8bit"], shape, spec)
        if spec.adapter is None:
            halves = [spec.lora.r >> shift for shift in range(1, 8) if spec.lora.r >> shift]
            yield from self._first("lora.r", spec.lora.r, halves, shape, spec)
            if spec.lora.target_modules != "auto":
                yield from self._first("lora.target_modules", _plain(spec.lora.target_modules), ["auto"], shape, spec)
        if spec.gpu.gpu_class != "auto":
            yield from self._first("gpu.class", spec.gpu.gpu_class, [gpu.name for gpu in self.classes], shape, spec)
        for listed in bases:
            yield from self._smaller_base(shape, spec, listed, fits_here)

    def _shorter(self, shape: ModelShape, spec: JobSpec) -> Iterator[dict[str, Any]]:
        """The longest sequences of those offered that fit: memory only grows with them, so that a few tries find it."""
        now = within_positions(shape, spec).training.max_length
        steps = range(LENGTH_STEP * ((now - 1) // LENGTH_STEP), 0, -LENGTH_STEP)
        lengths = [*steps, *(length for length in SHORT_LENGTHS if length < now)]

        def of(length: int) -> JobSpec:
            return with_change(spec, "training.max_length", length)

        longest = bisect_left(lengths, True, key=lambda length: self._fits(shape, of(length)))
        if longest < len(lengths):
            yield self._change("training.max_length", now, lengths[longest], shape, of(lengths[longest]))

    def _first(
        self, param: str, now: Any, values: Iterable[Any], shape: ModelShape, spec: JobSpec
    ) -> Iterator[dict[str, Any]]:
        for value in values:
            changed = with_change(spec, param, value)
            if self._fits(shape, changed):
                yield self._change(param, now, value, shape, changed)
                return

    def _smaller_base(
        self, shape: ModelShape, spec: JobSpec, listed: list[ModelShape], fits_here: Callable[[ModelShape], bool]
    ) -> Iterator[dict[str, Any]]:
        """The largest listed base that fits with the same settings, of the same architecture if there is one."""
        smaller = [base for base in listed if base.parameters < shape.parameters]
        smaller.sort(key=lambda base: base.model_type != shape.model_type)
        found = next(filter(fits_here, smaller), None)
        if found is not None:
            changed = with_change(spec, "base_model", found.base_model)
            yield self._change("base_model", shape.base_model, found.base_model, found, changed)

    def _change(self, param: str, now: Any, value: Any, shape: ModelShape, spec: JobSpec) -> dict[str, Any]:
        spec = within_positions(shape, spec)
        chosen = self._chosen(shape, spec)
        if chosen is not None:
            gpu, _, needed = chosen
            return {"param": param, "from": now, "to": value, "needed_bytes": needed.high_bytes, "gpu_class": gpu.name}
        raise AssertionError("a change is only described after it was seen to fit")


def within_positions(shape: ModelShape, spec: JobSpec) -> JobSpec:
    """The spec as this base can train it: a `max_length` that nobody chose is no longer than the base's positions."""
    chosen = "max_length" in spec.training.model_fields_set
    if chosen or spec.training.max_length <= shape.max_position_embeddings:
        return spec
    return with_change(spec, "training.max_length", shape.max_position_embeddings)


def with_change(spec: JobSpec, param: str, value: Any) -> JobSpec:
    """The same spec with one dotted parameter set anew; what nobody chose stays unchosen."""
    body = spec.model_dump(mode="json", by_alias=True, exclude_unset=True)
    part: dict[str, Any] = body
    *path, name = param.split(".")
    for section in path:
        part = part.setdefault(section, {})
    part[name] = value
    return JobSpec.model_validate(body)


def _warnings(shape: ModelShape, spec: JobSpec) -> tuple[dict[str, str], ...]:
    if not (shape.num_local_experts and spec.quantization.load_in_4bit):
        return ()
    experts = HALF * shape.num_hidden_layers * shape.expert_parameters
    message = f"4-bit loading leaves the experts of {shape.base_model} in 16 bits: {_gib(experts)} of them."
    return ({"code": "experts_not_quantised", "message": message},)


def _is_open(spec: JobSpec) -> bool:
    """Whether the job could have another base: not the one that its earlier adapter or its commit belongs to."""
    return spec.adapter is None and spec.revision == DEFAULT_REVISION


def _plain(targets: str | tuple[str, ...]) -> str | list[str]:
    return targets if isinstance(targets, str) else list(targets)


def _memory_facts(gpu: GpuClass, needed: MemoryEstimate) -> dict[str, Any]:
    """The numbers of a refusal that memory decides."""
    return {
        "needed_bytes": needed.high_bytes,
        "needed": needed.components,
        "available_bytes": gpu.usable_bytes,
        "available": {
            "card": gpu.memory_bytes,
            "reserved": gpu.memory_bytes - gpu.usable_bytes,
            "usable": gpu.usable_bytes,
        },
    }


def _largest_first(bases: Iterable[ModelShape]) -> list[ModelShape]:
    return sorted(bases, key=lambda shape: shape.parameters, reverse=True)


def _class_from(name: str, facts: Mapping[str, Any], rank: int) -> GpuClass:
    memory = int(facts["memory_gib"] * GIB)
    return GpuClass(
        name=name,
        memory_bytes=memory,
        usable_bytes=memory - int(facts.get("reserved_gib", 0) * GIB),
        cost_rank=rank,
        price_per_hour=facts.get("price_per_hour"),
        is_cpu=bool(facts.get("cpu", False)),
        max_parameters=facts.get("max_parameters"),
        cards=tuple(
            Rates(teraflops=teraflops, gigabytes_per_second=rate) for teraflops, rate in facts.get("cards", ())
        ),
        calibrated=bool(facts.get("calibrated", False)),
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def _gib_apart(needed: int, available: int) -> tuple[str, str]:
    """Both with as many digits as it takes to tell them apart."""
    for digits in range(1, 9):
        texts = tuple(f"{size / GIB:.{digits}f} GiB" for size in (needed, available))
        if texts[0] != texts[1]:
            break
    return texts[0], texts[1]


def _sentence(changes: list[dict[str, Any]]) -> str:
    return ", or ".join(f"{change['param']}={_as_json(change['to'])}" for change in changes[:3])


def _as_json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
