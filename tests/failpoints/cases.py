"""The cells of the matrix, each tried some times, and what a trial of one showed."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from graft_shared.jobs import JobState
from tests.failpoints.points import Fault, Interruption, Point, Raised

MOST_TRIES = 3
BUSY_PER_CORE = 4.0  # from here on, what takes milliseconds takes a good part of a lease
MATTERS_OF_TIME = frozenset({"it_ends", "the_point_was_reached", "what_was_saved_is_kept", "gpu_time_was_counted_once"})


class Aftermath(StrEnum):
    """Who carries on."""

    BESIDE = "beside"  # another process, started when the strike is seen
    ALONE = "alone"  # the struck one: started again, thawed, or as it is; and after it a second job is done


@dataclass(frozen=True, kw_only=True)
class Case:
    """One cell of the matrix, once."""

    point: Point
    fault: Fault
    aftermath: Aftermath
    number: int

    @property
    def name(self) -> str:
        return f"{self.point.name}-{self.fault}-{self.aftermath}-{self.number}"

    @property
    def max_attempts(self) -> int:
        """A single attempt, where that attempt's loss must then fail the job."""
        return 1 if self._must_fail else 3

    @property
    def foretold(self) -> JobState:
        """How the job must end."""
        if self.point.scenario.interruption is Interruption.CANCEL:
            return JobState.CANCELLED
        return JobState.FAILED if self._must_fail else JobState.SUCCEEDED

    @property
    def _must_fail(self) -> bool:
        is_charged = self.fault is Fault.RAISE and self.point.raised is Raised.CHARGED
        return is_charged and self.aftermath is Aftermath.ALONE and not self.point.scenario.behaviour

    @property
    def steps_under_way(self) -> int:
        """Steps that may come late: one whose deadline was checked before trainer and worker were suspended."""
        return int(self.fault is Fault.SUSPEND and self.point.lies_within_a_step)


@dataclass(kw_only=True)
class Verdict:
    """What a trial showed."""

    case: str
    point: str
    actor: str
    fault: str
    aftermath: str
    struck: bool = False
    violations: list[str] = field(default_factory=list)
    outcome: str = ""
    runs: int = 0
    steps_redone: int = 0
    steps_late: int = 0
    recovery_seconds: float | None = None
    seconds: float = 0.0
    runnable_per_core: float = 0.0  # processes that wanted the processor, on average; more than one waits
    tries: int = 1

    @property
    def is_void(self) -> bool:
        """What went wrong is a matter of time alone, and the machine had none: such a trial says nothing."""
        kinds = {said.partition(":")[0] for said in self.violations}
        is_about_time = bool(kinds) and kinds <= MATTERS_OF_TIME
        return is_about_time and self.runnable_per_core > BUSY_PER_CORE and self.tries < MOST_TRIES


def verdict_on(case: Case) -> Verdict:
    """One that knows nothing yet."""
    point, fault = case.point, case.fault.value
    return Verdict(
        case=case.name, point=point.name, actor=point.actor.value, fault=fault, aftermath=case.aftermath.value
    )
