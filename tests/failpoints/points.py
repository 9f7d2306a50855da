"""The named points at which a process is struck: which function, before or after it, and what a raise there costs."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from graft_shared.jobs import Stage


class Actor(enum.StrEnum):
    """Whose process is struck."""

    API = "api"
    RECONCILER = "reconciler"
    WORKER = "worker"
    CHILD = "child"  # the process that a worker starts for a job: it prepares or trains


class Moment(enum.StrEnum):
    """When a call of the function strikes."""

    BEFORE = "before"
    AMID = "amid"  # while its last argument, an iterator, is read to its end
    AFTER = "after"


class Fault(enum.StrEnum):
    """What happens there."""

    KILL = "kill"  # SIGKILL
    FREEZE = "freeze"  # SIGSTOP, and SIGCONT after two leases
    RAISE = "raise"  # an exception that nobody expects
    SUSPEND = "suspend"  # the child and its worker freeze together, as on a machine that sleeps


class Raised(enum.StrEnum):
    """What an unexpected exception does at a point."""

    CHARGED = "charged"  # the run ends as a crash, which costs an attempt
    LOST = "lost"  # the process ends, or lets go of the job: as if it had been killed
    HARMLESS = "harmless"  # logged or refused by a fence: the job goes on, or has gone on already


class Interruption(enum.StrEnum):
    """What befalls the job in mid-training, so that there is something to settle, release or take up."""

    NONE = "none"
    CANCEL = "cancel"
    DRAIN = "drain"
    KILL = "kill"


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """The life of the job around the point."""

    steps: int = 10
    save_steps: int = 3
    step_seconds: float = 0.02
    behaviour: str = ""  # of the toy trainer
    interruption: Interruption = Interruption.NONE
    looks: bool = True  # False: workers wake by bells alone, as the reconciler and the job's other stages ring them


PLAIN = Scenario()
SLOW = Scenario(step_seconds=0.1)  # long enough for heartbeats
CRASHES = Scenario(behaviour="crash once", save_steps=2)
KILLED = Scenario(behaviour="killed once", save_steps=2)
BELLS = Scenario(looks=False)
CANCELLED = Scenario(steps=200, step_seconds=0.05, interruption=Interruption.CANCEL)
DRAINED = Scenario(steps=40, step_seconds=0.05, interruption=Interruption.DRAIN)
LOST = Scenario(steps=40, step_seconds=0.05, interruption=Interruption.KILL)


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call of the function; `result` is there after it."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any = None


@dataclass(frozen=True, kw_only=True)
class Point:
    """A place in the code.

    Args:
        target: `module:Qualified.name`, as the callers look it up.
        stage: What the worker must be at for a call to count.
        matters: Which calls count.
        nth: Which of those strikes, counted within a process.
        lies_within_a_step: Between a trainer's look at its deadline and the step that it allows.
    """

    name: str
    actor: Actor
    target: str
    moment: Moment
    scenario: Scenario = PLAIN
    raised: Raised = Raised.CHARGED
    stage: Stage | None = None
    matters: Callable[[Call], bool] = field(default=lambda _: True)
    nth: int = 1
    lies_within_a_step: bool = False

    @property
    def faults(self) -> tuple[Fault, ...]:
        """Those that can happen here."""
        common = (Fault.KILL, Fault.FREEZE, Fault.RAISE)
        return (*common, Fault.SUSPEND) if self.actor is Actor.CHILD else common


def _event(type: str) -> Callable[[Call], bool]:
    return lambda call: call.args[3] == type


def _key_with(part: str) -> Callable[[Call], bool]:
    return lambda call: part in call.args[1]


def _emits(kind: str) -> Callable[[Call], bool]:
    return lambda call: type(call.args[1]).__name__ == kind


def _something(call: Call) -> bool:
    return bool(call.result)


_ADD_EVENT = "graft_shared.store.leases:add_event"
_LEASES = "graft_shared.store.leases:Leases"
_RUN = "graft_worker.supervisor.run:Run"
_PREPARATION = "graft_worker.supervisor.preparation"
_PUBLISHING = "graft_worker.supervisor.publishing"
_TRAINING = "graft_worker.supervisor.training_run"
_PUT = "graft_shared.buckets.directory:DirectoryBucket._put"
_BELL = "tests.failpoints.bells:FolderBell.ring"
_TOY = "tests.fakes.child"

_BEFORE, _AMID, _AFTER = Moment.BEFORE, Moment.AMID, Moment.AFTER


def _at(actor: Actor, stage: Stage | None = None) -> Callable[..., Point]:
    def point(name: str, moment: Moment, target: str, **more: Any) -> Point:
        return Point(name=name, actor=actor, stage=stage, target=target, moment=moment, **more)

    return point


_api, _reconciler = _at(Actor.API), _at(Actor.RECONCILER)
_preparer, _trainer = _at(Actor.WORKER, Stage.PREPARE), _at(Actor.WORKER, Stage.TRAIN)
_preparing, _training = _at(Actor.CHILD, Stage.PREPARE), _at(Actor.CHILD, Stage.TRAIN)

_SUBMIT: tuple[Point, ...] = (
    _api("before_submit", _BEFORE, "graft_shared.store.jobs:Jobs.submit", raised=Raised.HARMLESS),
    _api(
        "in_submit_transaction",
        _AFTER,
        "graft_shared.store.jobs:insert_event",
        matters=lambda call: call.args[4] == "submitted",
        raised=Raised.HARMLESS,
    ),
    _api("after_submit_commit", _AFTER, "graft_shared.store.jobs:Jobs.submit", raised=Raised.HARMLESS),
    _api("before_submit_bell", _BEFORE, _BELL, scenario=BELLS, raised=Raised.HARMLESS),
    _api("after_submit_bell", _AFTER, _BELL, scenario=BELLS, raised=Raised.HARMLESS),
    _api(
        "in_cancel_transaction",
        _AFTER,
        "graft_shared.store.jobs:add_event",
        matters=_event("cancel_requested"),
        scenario=CANCELLED,
        raised=Raised.HARMLESS,
    ),
    _api(
        "after_cancel_commit",
        _AFTER,
        "graft_shared.store.jobs:Jobs.cancel",
        scenario=CANCELLED,
        raised=Raised.HARMLESS,
    ),
)

_PREPARE: tuple[Point, ...] = (
    _preparer(
        "prepare_in_claim_transaction",
        _AFTER,
        _ADD_EVENT,
        matters=_event("claimed"),
        raised=Raised.LOST,
    ),
    _preparer(
        "prepare_after_claim_commit",
        _AFTER,
        f"{_LEASES}.claim",
        matters=_something,
        raised=Raised.LOST,
    ),
    _preparer("prepare_before_rows_fetched", _BEFORE, f"{_PREPARATION}:fetch_rows"),
    _preparer("prepare_after_rows_fetched", _AFTER, f"{_PREPARATION}:prepare_request"),
    _preparing("prepare_before_prepared_event", _BEFORE, f"{_TOY}:EventWriter.emit", matters=_emits("PreparedEvent")),
    _preparing("prepare_after_prepared_event", _AFTER, f"{_TOY}:EventWriter.emit", matters=_emits("PreparedEvent")),
    _preparer("prepare_before_tokens_stored", _BEFORE, f"{_PREPARATION}:finish_preparation"),
    _preparer("prepare_mid_upload", _AMID, _PUT, matters=_key_with("/prepared/")),
    _preparer("before_hand_to_training", _BEFORE, f"{_LEASES}.hand_to_training"),
    _preparer("in_hand_to_training_transaction", _AFTER, _ADD_EVENT, matters=_event("prepared")),
    _preparer("after_hand_to_training_commit", _AFTER, f"{_LEASES}.hand_to_training", raised=Raised.HARMLESS),
    _preparer("before_training_bell", _BEFORE, _BELL, scenario=BELLS, raised=Raised.HARMLESS),
    _preparer("after_training_bell", _AFTER, _BELL, scenario=BELLS, raised=Raised.HARMLESS),
)

_TRAIN: tuple[Point, ...] = (
    _trainer("in_claim_transaction", _AFTER, _ADD_EVENT, matters=_event("claimed"), raised=Raised.LOST),
    _trainer("after_claim_commit", _AFTER, f"{_LEASES}.claim", matters=_something, raised=Raised.LOST),
    _trainer("before_base_held", _BEFORE, "graft_worker.supervisor.bases:BaseModels.whole"),
    _trainer("before_data_fetched", _BEFORE, "graft_worker.supervisor.cache:HostCache.fetch"),
    _trainer("after_data_fetched", _AFTER, "graft_worker.supervisor.cache:HostCache.fetch"),
    _trainer("before_checkpoint_fetched", _BEFORE, f"{_TRAINING}:fetch_folder", scenario=KILLED),
    _trainer("after_checkpoint_fetched", _AFTER, f"{_TRAINING}:fetch_folder", scenario=KILLED),
    _trainer("before_request_written", _AFTER, f"{_TRAINING}:train_request"),
    _trainer("after_request_written", _BEFORE, f"{_RUN}._start_child"),
    _trainer("before_child_is_heard", _BEFORE, "graft_worker.supervisor.child:Child.__init__"),
    _trainer("after_child_started", _AFTER, "graft_worker.supervisor.child:Child.__init__"),
    _trainer("before_first_renewal", _BEFORE, f"{_LEASES}.renew", raised=Raised.LOST),
    _trainer("after_first_renewal", _AFTER, f"{_LEASES}.renew", raised=Raised.LOST),
    _trainer("before_renewal", _BEFORE, f"{_LEASES}.renew", nth=2, scenario=SLOW, raised=Raised.HARMLESS),
    _trainer("after_renewal", _AFTER, f"{_LEASES}.renew", nth=2, scenario=SLOW, raised=Raised.HARMLESS),
    _trainer("before_phase_recorded", _BEFORE, f"{_LEASES}.record_phase"),
    _trainer("after_phase_recorded", _AFTER, f"{_LEASES}.record_phase"),
    _trainer("before_progress_recorded", _BEFORE, f"{_LEASES}.record_progress", nth=2),
    _trainer("in_progress_transaction", _AFTER, _ADD_EVENT, matters=_event("metrics"), nth=2),
    _trainer("after_progress_recorded", _AFTER, f"{_LEASES}.record_progress", nth=2),
    _trainer("before_checkpoint_upload", _BEFORE, f"{_TRAINING}:store_checkpoint", nth=2, scenario=SLOW),
    _trainer("mid_checkpoint_upload", _AMID, _PUT, matters=_key_with("/checkpoints/"), nth=2, scenario=SLOW),
    _trainer("after_upload_before_commit", _BEFORE, f"{_LEASES}.commit_checkpoint", nth=2, scenario=SLOW),
    _trainer("in_checkpoint_transaction", _AFTER, _ADD_EVENT, matters=_event("checkpoint"), nth=2, scenario=SLOW),
    _trainer("after_checkpoint_commit", _AFTER, f"{_LEASES}.commit_checkpoint", nth=2, scenario=SLOW),
    _trainer("after_child_ended", _BEFORE, "graft_worker.supervisor.run:failure_of"),
    _trainer("before_publish", _BEFORE, f"{_TRAINING}:publish"),
    _trainer("mid_adapter_upload", _AMID, _PUT, matters=_key_with("/adapter/adapter_model")),
    _trainer("between_files_and_manifest", _BEFORE, f"{_PUBLISHING}:AdapterManifest.to_bytes"),
    _trainer("mid_manifest_upload", _AMID, _PUT, matters=_key_with("/adapter/manifest")),
    _trainer("after_manifest_before_settle", _BEFORE, f"{_LEASES}.settle_success"),
    _trainer("in_settle_transaction", _AFTER, _ADD_EVENT, matters=_event("succeeded")),
    _trainer("after_settle_commit", _AFTER, f"{_LEASES}.settle_success", raised=Raised.HARMLESS),
    _trainer("before_workdir_removed", _AFTER, f"{_RUN}._run_leased", raised=Raised.HARMLESS),
    _trainer("after_workdir_removed", _AFTER, f"{_RUN}.run", raised=Raised.HARMLESS),
)

_TRAINER: tuple[Point, ...] = (
    _training("trainer_request_read", _AFTER, f"{_TOY}:_resumed"),
    _training(
        "trainer_after_deadline_check",
        _AFTER,
        "graft_worker.training.guard:Guard.check",
        nth=5,
        scenario=SLOW,
        lies_within_a_step=True,
    ),
    _training("trainer_after_step", _AFTER, f"{_TOY}:_testify", nth=5, scenario=SLOW),
    _training("trainer_mid_checkpoint_write", _BEFORE, f"{_TOY}:_write_rest", nth=2),
    _training("trainer_before_checkpoint_rename", _AFTER, f"{_TOY}:_write_rest", nth=2),
    _training(
        "trainer_after_checkpoint_rename",
        _BEFORE,
        f"{_TOY}:EventWriter.emit",
        matters=_emits("CheckpointEvent"),
        nth=2,
    ),
    _training(
        "trainer_after_checkpoint_event", _AFTER, f"{_TOY}:EventWriter.emit", matters=_emits("CheckpointEvent"), nth=2
    ),
    _training("trainer_before_trained_event", _BEFORE, f"{_TOY}:EventWriter.emit", matters=_emits("TrainedEvent")),
    _training("trainer_after_trained_event", _AFTER, f"{_TOY}:EventWriter.emit", matters=_emits("TrainedEvent")),
    _training("drained_trainer_saves", _BEFORE, f"{_TOY}:_leave", scenario=DRAINED, raised=Raised.HARMLESS),
    _training("cancelled_trainer_saves", _BEFORE, f"{_TOY}:_leave", scenario=CANCELLED, raised=Raised.HARMLESS),
)

_SETTLE: tuple[Point, ...] = (
    _trainer("before_settle_failure", _BEFORE, f"{_LEASES}.settle_failure", scenario=CRASHES, raised=Raised.LOST),
    _trainer(
        "in_settle_failure_transaction",
        _AFTER,
        _ADD_EVENT,
        matters=_event("requeued"),
        scenario=CRASHES,
        raised=Raised.LOST,
    ),
    _trainer("after_settle_failure_commit", _AFTER, f"{_LEASES}.settle_failure", scenario=CRASHES, raised=Raised.LOST),
    _trainer("before_settle_lost_trainer", _BEFORE, f"{_LEASES}.settle_failure", scenario=KILLED, raised=Raised.LOST),
    _trainer("before_retry_bell", _BEFORE, _BELL, scenario=KILLED, raised=Raised.LOST),
    _trainer("before_settle_drained", _BEFORE, f"{_LEASES}.settle_failure", scenario=DRAINED, raised=Raised.LOST),
    _trainer("after_settle_drained", _AFTER, f"{_LEASES}.settle_failure", scenario=DRAINED, raised=Raised.LOST),
    _trainer("before_settle_cancelled", _BEFORE, f"{_LEASES}.settle_cancelled", scenario=CANCELLED, raised=Raised.LOST),
    _trainer(
        "in_settle_cancelled_transaction",
        _AFTER,
        _ADD_EVENT,
        matters=_event("cancelled"),
        scenario=CANCELLED,
        raised=Raised.LOST,
    ),
    _trainer(
        "after_settle_cancelled", _AFTER, f"{_LEASES}.settle_cancelled", scenario=CANCELLED, raised=Raised.HARMLESS
    ),
    _trainer("before_own_leases_released", _BEFORE, f"{_LEASES}.release_of", scenario=LOST, raised=Raised.LOST),
    _trainer(
        "in_own_leases_transaction",
        _AFTER,
        _ADD_EVENT,
        matters=_event("requeued"),
        scenario=LOST,
        raised=Raised.LOST,
    ),
    _trainer(
        "after_own_leases_released",
        _AFTER,
        f"{_LEASES}.release_of",
        matters=_something,
        scenario=LOST,
        raised=Raised.LOST,
    ),
)

_RECONCILE: tuple[Point, ...] = (
    _reconciler(
        "before_expired_released", _BEFORE, f"{_LEASES}.release_expired", scenario=LOST, nth=3, raised=Raised.LOST
    ),
    _reconciler(
        "in_expired_transaction",
        _AFTER,
        _ADD_EVENT,
        matters=_event("requeued"),
        scenario=LOST,
        raised=Raised.LOST,
    ),
    _reconciler(
        "after_expired_released",
        _AFTER,
        f"{_LEASES}.release_expired",
        matters=_something,
        scenario=LOST,
        raised=Raised.LOST,
    ),
    _reconciler(
        "before_lost_bells_taken", _BEFORE, f"{_LEASES}.take_lost_bells", nth=3, scenario=BELLS, raised=Raised.LOST
    ),
    _reconciler(
        "after_lost_bells_taken",
        _AFTER,
        f"{_LEASES}.take_lost_bells",
        matters=_something,
        scenario=BELLS,
        raised=Raised.LOST,
    ),
    _reconciler("after_lost_bell_rung", _AFTER, _BELL, scenario=BELLS, raised=Raised.LOST),
)

POINTS: tuple[Point, ...] = (*_SUBMIT, *_PREPARE, *_TRAIN, *_TRAINER, *_SETTLE, *_RECONCILE)
