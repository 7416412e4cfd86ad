"""Conditions: what is claimed now, laid over what was claimed before."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from starcoder_operator.api.v1alpha1 import Condition
from starcoder_operator.api.v1alpha1.status import ConditionType

ORDER: tuple[ConditionType, ...] = get_args(ConditionType)


@dataclass(frozen=True)
class Claim:
    """A condition without its times."""

    type: ConditionType
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str = ""

    @property
    def holds(self) -> bool:
        return self.status == "True"


def merged(before: Iterable[Condition], claims: Iterable[Claim], *, now: str, generation: int) -> tuple[Condition, ...]:
    """All conditions, in the API's order. lastTransitionTime moves only with the status; a type that nothing is
    claimed about stays as it is."""
    conditions = {c.type: c for c in before}
    for claim in claims:
        known = conditions.get(claim.type)
        since = known.last_transition_time if known is not None and known.status == claim.status else now
        conditions[claim.type] = Condition(
            type=claim.type,
            status=claim.status,
            reason=claim.reason,
            message=claim.message,
            last_transition_time=since,
            observed_generation=generation,
        )
    return tuple(conditions[kind] for kind in ORDER if kind in conditions)
