"""Names that both sides derive instead of telling each other: objects, labels, paths and variables in a Pod."""

GROUP = "starcoder.dev"

LABEL_RUN = f"{GROUP}/run"
"""On every object of a run: the run's name."""
LABEL_MEMBER = f"{GROUP}/member"
"""On Pods and Leases: the member's index, 0-based decimal."""
LABEL_INCARNATION = f"{GROUP}/incarnation"
"""On Pods: how many Pods this member has had, 0-based decimal. A name is never used again."""
ANNOTATION_REPORT = f"{GROUP}/report"
"""On Leases: the agent's `Report` as JSON."""

ASSIGNMENT_KEY = "assignment.json"
"""Key of the assignment ConfigMap: the `Assignment`."""
CONFIG_KEY = "config.json"
"""Key of the assignment ConfigMap: the `TrainingConfig` of this attempt."""

CONTAINER_AGENT = "agent"
CONTAINER_WORKER = "worker"

# Paths inside a Pod.
RUNTIME_DIR = "/run/starcoder"
"""emptyDir of both containers: the Unix socket between them."""
WORKER_SOCKET = f"{RUNTIME_DIR}/worker.sock"
SCRATCH_DIR = "/scratch"
"""Local checkpoints and data cache, of both containers (`spec.workers.scratch`)."""
CREDENTIALS_DIR = "/var/run/secrets/starcoder/s3"
"""The S3 Secret, mounted with `optional: true` so that a missing or wrong one can be mended while the Pod waits."""
CREDENTIALS_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
"""Keys (file names) expected in the Secret; AWS_SESSION_TOKEN may stand beside them."""

# Environment of both containers.
ENV_RUN = "STARCODER_RUN"
ENV_RUN_UID = "STARCODER_RUN_UID"
ENV_NAMESPACE = "STARCODER_NAMESPACE"
ENV_MEMBER = "STARCODER_MEMBER"
ENV_INCARNATION = "STARCODER_INCARNATION"
ENV_POD = "STARCODER_POD"
ENV_POD_IP = "STARCODER_POD_IP"
ENV_NODE = "STARCODER_NODE"

# Environment of the agent.
ENV_GRACE_SECONDS = "STARCODER_GRACE_SECONDS"
"""The Pod's terminationGracePeriodSeconds: how long it may take to leave."""
ENV_HEARTBEAT_SECONDS = "STARCODER_HEARTBEAT_SECONDS"
ENV_HEARTBEATS_MISSED = "STARCODER_HEARTBEATS_MISSED"
"""The `Rhythm` of heartbeats, the same in all Pods of a run."""

# Environment of a local run's fork server only.
ENV_WORKER_SOCKET = "STARCODER_WORKER_SOCKET"
"""Path of the Unix socket, instead of `WORKER_SOCKET`."""
ENV_ALLOW_FILE = "STARCODER_ALLOW_FILE"
"""`1`: URIs may be `file://`."""

METRICS_PORT = 9090
"""Port of `/metrics` on every Pod of a run, served by the agent."""


def assignment_name(run: str) -> str:
    """ConfigMap that holds assignment and configuration."""
    return f"{run}-assignment"


def lease_name(run: str, member: int) -> str:
    """Lease in which a member's agent answers. One a member, whatever its incarnation, so that RBAC can name it."""
    return f"{run}-w{member}"


def pod_name(run: str, member: int, incarnation: int) -> str:
    return f"{run}-w{member}-{incarnation}"


def service_account_name(run: str) -> str:
    """Also the name of its Role and RoleBinding."""
    return f"{run}-agent"
