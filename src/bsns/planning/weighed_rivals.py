"""What the chains of others' rules cost by a user's own weights, beside the chain that these have chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bsns.core.snapshot import NodeView
from bsns.planning.network import Ints, Network
from bsns.planning.problem import Chain, Stage
from bsns.planning.selection import Traits, Weighed, Weights

FORBIDDEN = "it takes nodes that your weights do not allow"
SAME = 1e-9
"""Of the cost: a rounding."""
HARDLY = 5e-3
"""Of the cost: a ratio in two decimals would not show it."""
MOST_TIMES = 1000
"""Beyond, a ratio says only that a weight was made to outweigh all others."""


def numbered(chain: Chain, nodes: Sequence[int] | Ints) -> Chain:
    """A chain of a problem made of `nodes`, in the network's numbers."""
    return tuple(Stage(int(nodes[node]), start, end) for node, start, end in chain)


def beside_chosen(
    network: Network, views: Sequence[NodeView], weights: Weights, chosen: Chain, others: Mapping[str, Chain | None]
) -> dict[str, str]:
    """In words what each other chain that is possible at all costs by the weights. All in the network's numbers."""
    possible = {name: chain for name, chain in others.items() if chain is not None}
    nodes = sorted({stage.node for chain in (chosen, *possible.values()) for stage in chain})
    place = {node: number for number, node in enumerate(nodes)}
    # All of the costs: of what differs alone, which is what chains are chosen by, no share would say how much it is.
    weighed = Weighed.of(network.problem(nodes), weights, Traits.of([views[node] for node in nodes]))

    def cost(chain: Chain) -> float:
        return weighed.cost(tuple(Stage(place[node], start, end) for node, start, end in chain))

    def words(chain: Chain) -> str:
        if weights.attested_only and not all(views[stage.node].attested for stage in chain):
            return FORBIDDEN
        return compared(cost(chain), cost(chosen))

    return {name: words(chain) for name, chain in possible.items()}


def compared(cost: float, chosen: float) -> str:
    """A cost by the weights beside that of the chosen chain."""
    if abs(cost - chosen) <= SAME * chosen:
        return "the same by your weights"
    if abs(cost - chosen) <= HARDLY * chosen:
        return f"hardly {'more' if cost > chosen else 'less'} by your weights"
    if cost > MOST_TIMES * chosen:
        return f"over {MOST_TIMES} × by your weights"
    return f"{cost / chosen:.2f} × by your weights"
