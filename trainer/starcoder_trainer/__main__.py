"""`starcoder-trainer`: one program for the Pods of a run, for preparing data, and for training on one machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence

USAGE = """usage: starcoder-trainer COMMAND …

  prepare  source files -> tokenizer and token files to train on
  local    train a StarCoderRun on this machine, without Kubernetes
  agent    in a Pod: supervises the workers and answers the operator
  worker   in a Pod: the fork server that the agent starts workers from

`starcoder-trainer COMMAND --help` says more."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code. Each command imports what it needs: an agent never loads torch."""
    command, *rest = (sys.argv[1:] if argv is None else list(argv)) or [""]
    match command:
        case "agent":
            from starcoder_trainer.agent.main import main as agent

            return agent()
        case "worker":
            from starcoder_trainer import forkserver

            forkserver.main()
        case "prepare":
            from starcoder_trainer.data import prepare

            return prepare.main(rest) or 0
        case "local":
            from starcoder_trainer import local

            return local.main(rest)
        case "-h" | "--help":
            print(USAGE)
            return 0
    print(f"starcoder-trainer: found command {command!r}, expected one of those below\n{USAGE}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
