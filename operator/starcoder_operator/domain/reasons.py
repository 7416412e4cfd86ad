"""Reasons of conditions and Events, all in one place; docs/failure-modes.md explains each to people.

Causes of failures (`failure.Cause`) and the agents' problems (`contract.report.ProblemReason`) are reasons as well and
stand with their own types.
"""

# Accepted
VALID = "Valid"
INVALID_SPEC = "InvalidSpec"
POD_INVALID = "PodInvalid"
"""The API server refused a Pod as built from the spec; mostly podPatch or affinity."""

# Scheduled
ALL_PODS_SCHEDULED = "AllPodsScheduled"
WAITING_FOR_SCHEDULER = "WaitingForScheduler"
UNSCHEDULABLE = "Unschedulable"
GATED = "Gated"
"""Scheduling gates hold Pods: Kueue has not admitted their group."""
REFUSED = "Refused"
"""Quota, admission or authorization refused an object of the run."""
GANG_API_ABSENT = "GangAPIAbsent"
GANG_FIELD_DROPPED = "GangFieldDropped"

# Training
TRAINING = "Training"
WAITING_FOR_PODS = "WaitingForPods"
WAITING_FOR_AGENTS = "WaitingForAgents"
IMAGE_PULL_FAILED = "ImagePullFailed"
CONTAINER_CONFIG_ERROR = "ContainerConfigError"
"""An object that the Pod's containers name (Secret, ConfigMap, key) is missing, or a container can't be created."""
CONTAINER_CRASHING = "ContainerCrashing"
FORMING = "Forming"
BACKING_OFF = "BackingOff"
"""It failed again without a newer checkpoint: the next attempt waits until the moment that the message names."""
PEER_LOST = "PeerLost"
"""Workers lost their peers; for a moment the operator waits to learn why."""
HANGS = "Hangs"
"""Workers make no progress; for a moment the operator waits to learn which of them is to blame."""
DRAINING = "Draining"
"""The gang leaves with a checkpoint, because one of its Pods is on its way out or the run is to be placed anew."""
GRACE_EXCEEDED = "GraceExceeded"
"""The gang was to leave with a checkpoint, and did not in time. An agent whose Pod ends says the same of its part."""
AGENTS_SILENT = "AgentsSilent"
"""No agent's Lease is renewed: more likely the API than the whole gang."""

# CheckpointVerified
VERIFIED = "Verified"
NO_CHECKPOINT_YET = "NoCheckpointYet"

# Degraded
WHOLE = "AllWorkersTrain"
SHRUNK = "FewerWorkersTrain"
"""Lost Pods found no place within elasticity.patience; the run trains with those that are left."""

# Complete, and state for short
IN_PROGRESS = "InProgress"
SUSPENDED = "Suspended"
SUSPENDING = "Suspending"
SUCCEEDED = "Succeeded"
RESTARTS_EXHAUSTED = "RestartsExhausted"

# Events that are no condition's reason
RECOVERED = "Recovered"
RESUMED = "Resumed"
RESIZED = "Resized"
"""An attempt begins with another number of Pods than the one before, and not for want of them."""
NODE_AVOIDED = "NodeAvoided"
NODE_FORGIVEN = "NodeForgiven"
NEW_CHECKPOINT = "CheckpointVerified"

WARNINGS = frozenset({
    INVALID_SPEC, POD_INVALID, UNSCHEDULABLE, GATED, REFUSED, GANG_API_ABSENT, GANG_FIELD_DROPPED, IMAGE_PULL_FAILED,
    CONTAINER_CONFIG_ERROR, CONTAINER_CRASHING, AGENTS_SILENT, RESTARTS_EXHAUSTED, SHRUNK,
    "CredentialsMissing", "StorageAccessDenied", "BucketNotFound", "StorageUnreachable", "DataNotFound", "DataInvalid",
    "TokenizerMismatch", "CheckpointForeign", "CheckpointLost", "WorkerNotReady", "WorkersStuck", GRACE_EXCEEDED,
})  # fmt: skip
"""Reasons that tell of trouble: entering one makes a Warning Event."""
