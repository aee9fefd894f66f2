"""A trial: a short answer over the swarm as it is, to stand beside what planning predicts of it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from bsns.client.pieces import Stats
from bsns.client.sampling import SamplingOptions
from bsns.core.snapshot import ModelShape, Snapshot
from bsns.node.client import Client
from bsns.planning.network import chain_problem
from bsns.planning.problem import Stage
from bsns.routing.chain import Route

PROMPT = "Count slowly from one to one hundred, in words:"


@dataclass(frozen=True, slots=True)
class Trial:
    """What one stream over `route` did, and the client's own share of each token: head, sampling, embedding."""

    tokens_per_s: float
    client_s: float
    route: Route
    turn_s: float
    """What a token takes from the client through all stages and back, the median."""
    computing_s: float
    """Of that, spent computing."""

    def alone_tokens_per_s(self) -> float:
        """What it says of a node like these that held the whole model: as much to compute, and fewer ways."""
        way_s = max(0.0, self.turn_s - self.computing_s) / (len(self.route) + 1)
        return 1 / (self.client_s + self.computing_s + 2 * way_s)


async def try_out(client: Client, *, tokens: int = 32) -> Trial:
    """Answer a prompt with so many tokens at most. Raises as generating does."""
    stats = Stats()
    async for _ in client.stream(PROMPT, SamplingOptions(max_tokens=tokens), raw=True, stats=stats, guess=False):
        pass
    # an answer of one token, its end, has told no more than how long that took
    token_s = stats.decode_s / (stats.tokens - 1) if stats.tokens > 1 else stats.ttft_ms / 1e3
    turns_s = [total_ms / 1e3 for total_ms, _ in stats.turns_ms[1:]]
    client_s = max(0.0, token_s - statistics.fmean(turns_s)) if turns_s else 0.0
    computing_s = [sum(hop.computing_ms for hop in hops) / 1e3 for _, hops in stats.turns_ms[1:]]
    medians = (statistics.median(each) if each else token_s for each in (turns_s, computing_s))
    return Trial(stats.tokens_per_s, client_s, stats.route, *medians)


def predicted_tokens_per_s(route: Route, snapshot: Snapshot, shape: ModelShape, client_s: float) -> float | None:
    """What the planner's model of cost says of a route; None if the snapshot lacks one of its nodes."""
    numbers = {node.peer: number for number, node in enumerate(snapshot.nodes)}
    if not route or any(hop.peer not in numbers for hop in route):
        return None
    problem = chain_problem(snapshot, shape, client_s=client_s)
    chain = tuple(Stage(numbers[hop.peer], hop.blocks.start, hop.blocks.end) for hop in route)
    return 1 / problem.cost(chain)[1]
