"""Orders of devices as random keys (BRKGA): who comes after whom; how the blocks are cut follows from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from bsns.core.plan import Objective
from bsns.planning.problem import Chain, ChainProblem, Floats


def keys_of(chain: Chain, node_count: int) -> Floats:
    """Keys that decode to a chain's order, those left out last."""
    used = [stage.node for stage in chain]
    order = used + [node for node in range(node_count) if node not in set(used)]
    keys = np.empty(node_count)
    keys[order] = (np.arange(node_count) + 0.5) / node_count
    return keys


def search_orders(
    problem: ChainProblem,
    objective: Objective,
    *,
    rng: np.random.Generator,
    warm: Sequence[Chain] = (),
    should_stop: Callable[[], bool] = lambda: False,
    good_enough: float = 0.0,
) -> Chain | None:
    """The best chain found until `should_stop`."""
    return None
