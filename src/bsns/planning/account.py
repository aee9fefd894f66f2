"""A plan's account in words: how fast it will be, how far from the best possible it is, and what speaks against it."""

from __future__ import annotations

from bsns.core.plan import ONE_NODE, Alternative, Plan

PROVEN = 1e-4
"""A gap below this is a rounding of the proof's."""
OWN_WEIGHTS = "your own weights"
"""How the method of a plan begins that a user's weights chose: its gap is then not that of what was minimised."""


def speeds(plan: Plan) -> str:
    """The predicted tokens per second, with one stream and with as many as there are stages to keep busy."""
    many = max(2, len(plan.stages))
    return f"{plan.tokens_per_s():.1f} tokens/s with one stream, {plan.tokens_per_s(many):.1f} with {many}"


def proof(plan: Plan) -> str:
    """How the plan was found, and how much better any other could be."""
    bound = plan.lower_bound_s * 1e3
    if by_weights(plan):  # its bound is one on chains: weights choose no replicas
        found = f"{found_by(plan.method)}; by the objective {plan.objective.name}"
        if plan.gap < PROVEN:
            return f"{found} no chain can be better either ({bound:.4g} ms)"
        return (
            f"{found}, which your weights need not follow, it is at most {plan.gap:.1%} from the best possible chain "
            f"({plan.value * 1e3:.4g} ms, no chain is under {bound:.4g} ms)"
        )
    if plan.gap < PROVEN:
        return f"no plan can be better: {found_by(plan.method)}, and proven ({bound:.4g} ms)"
    return (
        f"{found_by(plan.method)}; at most {plan.gap:.1%} from the best possible "
        f"({plan.value * 1e3:.4g} ms, no plan is under {bound:.4g} ms)"
    )


def by_weights(plan: Plan) -> bool:
    """Whether a user's own weights chose the plan."""
    return plan.method.startswith(OWN_WEIGHTS)


def found_by(method: str) -> str:
    """How a plan was found; some rules' names begin with `by` themselves."""
    return f"found {method}" if method.startswith("by ") else f"found by {method}"


def advice(plan: Plan) -> list[str]:
    """Says so, with both numbers, if one node alone would be faster than the plan for a single stream."""
    alone = next((other for other in plan.alternatives if other.name == ONE_NODE), None)
    if alone is None or alone.latency_s is None or len(plan.stages) < 2 or alone.latency_s >= plan.latency_s:
        return []
    return [
        f"one node alone would answer a single stream faster: {1 / alone.latency_s:.1f} tokens/s against "
        f"{plan.tokens_per_s():.1f}; cut the model only if it does not fit one node, or for many streams at once"
    ]


def against(plan: Plan, other: Alternative) -> str:
    """What an alternative costs beside the plan, by what the plan was chosen by, or why it is impossible."""
    if other.bottleneck_s is None or other.latency_s is None or (by_weights(plan) and other.note):
        return other.note or "impossible"
    ratio = plan.objective.value(other.bottleneck_s, other.latency_s) / plan.value
    how = f"{ratio:.2f} × the cost" if abs(ratio - 1) > 5e-3 else "the same"
    return f"{how}; {other.note}" if other.note else how
