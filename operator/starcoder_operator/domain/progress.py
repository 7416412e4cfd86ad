"""Figures of the status: what the leader's report says of iterations, tokens and checkpoints."""

from __future__ import annotations

from starcoder_operator.api.v1alpha1 import CheckpointStatus, LayoutStatus, StarCoderRunStatus, WorkersStatus
from starcoder_operator.api.v1alpha1.status import loss_text, progress_text
from starcoder_trainer.contract.assignment import Assignment
from starcoder_trainer.contract.report import Report, Verified

from . import failure
from .members import MemberView
from .snapshot import Snapshot, own_assignment
from .timestamps import after
from .training_config import sequence_length


def absorbed(snapshot: Snapshot, members: tuple[MemberView, ...]) -> StarCoderRunStatus:
    """The status as last written with the news of the reports. A newer verified checkpoint is progress, so what was
    charged is refunded."""
    status = snapshot.status.model_copy(
        update={
            "observed_generation": snapshot.generation,
            "iterations": snapshot.spec.training.iterations,
            "workers": WorkersStatus.of(
                sum(m.live for m in members), snapshot.spec.workers.replicas, snapshot.status.workers.training
            ),
        }
    )
    return _with_checkpoint(snapshot, _with_iterations(snapshot, members, status))


def resized(snapshot: Snapshot, status: StarCoderRunStatus, assignment: Assignment) -> StarCoderRunStatus:
    """An attempt of so many members begins to run."""
    was, now = status.workers.training, len(assignment.members)
    whole = now >= snapshot.spec.workers.replicas
    since = status.resized_at if was == now else None
    return status.model_copy(
        update={
            "workers": status.workers.model_copy(update={"training": now}),
            "resized_at": None if whole else since or snapshot.now,
        }
    )


def resting(status: StarCoderRunStatus) -> StarCoderRunStatus:
    """No iterations pass: a rate of before would be a lie, what was reached is none."""
    return status.model_copy(update={"tokens_per_second": None, "tokens_per_second_per_gpu": None, "eta": None})


def finished(snapshot: Snapshot, status: StarCoderRunStatus) -> StarCoderRunStatus:
    """The last iteration is trained, whether or not the leader's last word came through."""
    training = snapshot.spec.training
    tokens = training.iterations * training.global_batch_size * sequence_length(snapshot.spec)
    return resting(status).model_copy(
        update={
            "iteration": training.iterations,
            "progress": progress_text(training.iterations, training.iterations),
            "consumed_tokens": max(tokens, status.consumed_tokens),
        }
    )


def leader_report(snapshot: Snapshot, members: tuple[MemberView, ...]) -> Report | None:
    """Of the leader of the attempt that runs, once its workers train."""
    current = own_assignment(snapshot)
    if current is None or current.phase == "hold":
        return None
    lease = members[current.leader.index].lease if current.leader.index < len(members) else None
    report = lease.report if lease else None
    if report is None or report.boot_id != current.leader.boot_id or report.attempt != current.attempt:
        return None
    return report if report.state in ("training", "draining", "left", "done") else None


def _with_iterations(
    snapshot: Snapshot, members: tuple[MemberView, ...], status: StarCoderRunStatus
) -> StarCoderRunStatus:
    current, report = own_assignment(snapshot), leader_report(snapshot, members)
    if current is not None:
        layout = current.layout
        status = status.model_copy(update={"layout": LayoutStatus.of(layout.tensor, layout.pipeline, layout.data)})
    if report is None or report.progress is None:
        return status.model_copy(update={"progress": progress_text(status.iteration, status.iterations)})
    said, iterations = report.progress, snapshot.spec.training.iterations
    rate, gpus = said.tokens_per_second, len(current.members) * current.gpus_per_member if current else 0
    tokens_an_iteration = snapshot.spec.training.global_batch_size * sequence_length(snapshot.spec)
    left = max(0, iterations - said.iteration) * tokens_an_iteration
    return status.model_copy(
        update={
            "iteration": said.iteration,
            "progress": progress_text(min(said.iteration, iterations), iterations),
            "consumed_tokens": said.consumed_tokens or said.iteration * tokens_an_iteration,
            "loss": status.loss if said.loss is None else loss_text(said.loss),
            "tokens_per_second": round(rate) if rate else None,
            "tokens_per_second_per_gpu": round(rate / gpus) if rate and gpus else None,
            "eta": after(snapshot.now, left / rate) if rate else None,
        }
    )


def _with_checkpoint(snapshot: Snapshot, status: StarCoderRunStatus) -> StarCoderRunStatus:
    known, newest = status.checkpoint, newest_verified(snapshot)
    if newest is None or (known is not None and known.digest == newest.checkpoint.digest):
        return status
    found = CheckpointStatus(
        iteration=newest.checkpoint.step,
        uri=newest.uri,
        digest=newest.checkpoint.digest,
        committed_at=newest.committed_at,
    )
    status = status.model_copy(update={"checkpoint": found})
    return failure.refunded(status) if known is None or found.iteration > known.iteration else status


def newest_verified(snapshot: Snapshot) -> Verified | None:
    """As the latest attempt's leader knows it: after a corrupt one it may be older than what was known before."""
    said = [(lease.report.attempt, lease.report.verified) for lease in snapshot.leases
            if lease.report is not None and lease.report.verified is not None]  # fmt: skip
    latest = max(said, key=lambda pair: (pair[0], pair[1].checkpoint.step), default=None)
    return latest[1] if latest else None
