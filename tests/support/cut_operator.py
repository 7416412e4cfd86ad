"""The shipped operator, killed just before or after one of its writes: `python -m tests.support.cut_operator`.

$CUT_ORDER is a file with the number of the write, from 1, and `before` or `after`; every write becomes a line of
$CUT_CALLS. Whoever gives an order empties that first. 0 cuts nothing.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from starcoder_operator import __main__ as operator
from starcoder_operator.adapters.kinds import ACCESS_REVIEWS
from starcoder_operator.adapters.kube import Kube


def main() -> None:
    order, calls = Path(os.environ["CUT_ORDER"]), Path(os.environ["CUT_CALLS"])
    exchange = Kube._exchange

    def counted(what: str) -> str:
        """When to die of this write: before, after, or not at all."""
        with calls.open("a") as file:
            file.write(f"{what}\n")
        number, when = order.read_text().split()
        return when if len(calls.read_text().splitlines()) == int(number) else ""

    async def cut(self: Kube, method: str, path: str, *rest: Any) -> Any:
        writes = method != "GET" and path != ACCESS_REVIEWS.path()
        when = counted(f"{method} {path}") if writes else ""
        if when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        answer = await exchange(self, method, path, *rest)
        if when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    Kube._exchange = cut
    operator.main()


if __name__ == "__main__":
    main()
