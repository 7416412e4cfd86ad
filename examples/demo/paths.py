"""Where the demo's files are."""

from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
RUN_FILE = HERE / "run.yaml"
PREPARE_FILE = HERE / "prepare.yaml"
