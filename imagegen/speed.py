"""Plans: what may be done to make a model faster, and what was done.

This version has one plan, `exact`: nothing is done, and the pictures are the stock pipeline's own.
"""

from dataclasses import dataclass

from imagegen.request import PlanError


@dataclass(frozen=True)
class Plan:
    """An ordered list of levers, by name."""

    name: str
    levers: tuple[str, ...] = ()


PLANS = {"exact": Plan("exact")}


def find_plan(plan: str | Plan) -> Plan:
    """Return the plan of that name.

    Raises:
        PlanError: there is no such plan.
    """
    if isinstance(plan, Plan):
        return plan
    if plan not in PLANS:
        raise PlanError(f"unknown plan {plan!r}: this version has {', '.join(PLANS)}")
    return PLANS[plan]
