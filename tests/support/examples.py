"""The manifests that people start from."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "examples"

LOCAL = FOLDER / "local.yaml"
"""For `starcoder-trainer local`: its URIs are files."""

EXAMPLES = [*sorted(p for p in FOLDER.glob("*.yaml") if p != LOCAL), FOLDER / "demo" / "run.yaml"]
"""For a cluster."""
