"""Several nodes for one range: who shares which stage's work, and whether sharing beats cutting further.

A stage whose nodes would each take f_r seconds for a token takes 1 / Σ 1/f_r together, each of them a share of the
tokens in proportion to 1/f_r. The way in is the average over the nodes of the stage before, by their shares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bsns.core.plan import Objective
from bsns.planning.network import Ints, Network
from bsns.planning.problem import Chain

SLOWEST_REPLICA = 8.0
"""A node that would take more than so many times a stage's time does not share it: what it adds to the throughput is
little, and what a session that comes to it loses is much."""
LARGE_TEAM = 64
"""Of a larger team only the fastest are looked at for the one that leads."""
EVEN_CUTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
"""Into so many even ranges the model is cut to begin with; 1 is the whole model on one node."""
SURE_NODES = 24
"""Among so many, every way to begin is looked at whatever the time: all of them take about a tenth of a second."""


@dataclass(frozen=True, slots=True)
class Team:
    """The nodes (numbers in the network) that hold blocks [start, end)."""

    start: int
    end: int
    nodes: tuple[int, ...]


Teams = tuple[Team, ...]


@dataclass(frozen=True, slots=True)
class Shared:
    """What teams cost: each stage's time, the bottleneck (the client's turn included), and the chain of leaders."""

    teams: Teams
    """The node that leads first: the leaders are the fastest way through."""
    stage_s: tuple[float, ...]
    bottleneck_s: float
    latency_s: float

    def value(self, objective: Objective) -> float:
        return objective.value(self.bottleneck_s, self.latency_s)


def teams_of(chain: Chain, nodes: Sequence[int] | Ints) -> Teams:
    """A chain of a problem made of `nodes`, as teams of one."""
    return tuple(Team(stage.start, stage.end, (int(nodes[stage.node]),)) for stage in chain)


def evaluate(network: Network, teams: Teams) -> Shared:
    """Leaders chosen for the least latency, and what the teams cost."""
    stage_s: list[float] = []
    way_N = network.ends_N
    for team in teams:
        nodes = np.array(team.nodes)
        speed = 1 / (_work(network, team) * network.time_N[nodes] + way_N[nodes])
        stage_s.append(float(1 / speed.sum()))
        way_N = network.mean_way(nodes, speed / speed.sum())
        last_share, last_nodes = speed / speed.sum(), nodes
    back_s = float((last_share * network.ends_N[last_nodes]).sum()) + network.client_s
    leaders, latency_s = _leaders(network, teams)
    led = tuple(
        Team(team.start, team.end, (leader, *(node for node in team.nodes if node != leader)))
        for team, leader in zip(teams, leaders, strict=True)
    )
    return Shared(led, tuple(stage_s), max(*stage_s, back_s), latency_s)


def _work(network: Network, team: Team) -> float:
    return float(network.work_L[team.start : team.end].sum())


def _leaders(network: Network, teams: Teams) -> tuple[list[int], float]:
    """One node of each team, so that a token's way through them is shortest."""
    cost = np.zeros(1)
    choices: list[tuple[Ints, Ints]] = []
    before: Ints | None = None
    for team in teams:
        nodes = np.array(team.nodes)
        if len(nodes) > LARGE_TEAM:
            nodes = nodes[np.argsort(network.time_N[nodes], kind="stable")[:LARGE_TEAM]]
        ways = network.ends_N[None, nodes] if before is None else network.ways(before, nodes)
        through = cost[:, None] + ways
        at = through.argmin(axis=0)
        cost = through[at, np.arange(len(nodes))] + _work(network, team) * network.time_N[nodes]
        choices.append((nodes, at))
        before = nodes
    assert before is not None, "a plan has a stage"
    ends = cost + network.ends_N[before] + network.client_s
    place = int(ends.argmin())
    latency_s = float(ends[place])
    leaders: list[int] = []
    for nodes, at in reversed(choices):
        leaders.append(int(nodes[place]))
        place = int(at[place])
    return leaders[::-1], latency_s


def add_replicas(network: Network, teams: Teams, objective: Objective) -> Shared:
    """Hand the nodes that are left over, fastest first, to the stage that is slowest then and has room on them.

    Kept up to where the value is best, and those beyond that do no harm as well.
    """
    best = evaluate(network, teams)
    steps = _handed_out(network, best)
    if not steps:
        return best
    tries = sorted({len(steps), *(round(len(steps) * share) for share in np.linspace(0, 1, 17))})
    for count in tries[1:]:
        members = [list(team.nodes) for team in teams]
        for node, stage in steps[:count]:
            members[stage].append(node)
        shared = evaluate(
            network,
            tuple(Team(team.start, team.end, tuple(nodes)) for team, nodes in zip(teams, members, strict=True)),
        )
        value, least = shared.value(objective), best.value(objective)
        if value <= least * (1 + 1e-9):
            best = shared
    return best


def without_stragglers(network: Network, shared: Shared) -> Shared:
    """The same without nodes that are more than SLOWEST_REPLICA times as slow as the fastest of their team."""
    teams: list[Team] = []
    way_N = network.ends_N
    for team in shared.teams:
        nodes = np.array(team.nodes)
        seconds = _work(network, team) * network.time_N[nodes] + way_N[nodes]
        kept = nodes[seconds <= SLOWEST_REPLICA * seconds.min()]
        teams.append(Team(team.start, team.end, tuple(kept.tolist())))
        speed = 1 / (_work(network, team) * network.time_N[kept] + way_N[kept])
        way_N = network.mean_way(kept, speed / speed.sum())
    return evaluate(network, tuple(teams))


def _handed_out(network: Network, shared: Shared) -> list[tuple[int, int]]:
    """(node, stage) in the order in which nodes are handed out, one at a time, to the slowest stage."""
    used = {node for team in shared.teams for node in team.nodes}
    left = np.array([node for node in range(network.node_count) if node not in used], dtype=np.int64)
    if not len(left):
        return []
    speed_SN = np.zeros((len(shared.teams), len(left)))
    way_N = network.ends_N
    for row, team in enumerate(shared.teams):
        need = float(network.bytes_L[team.start : team.end].sum())
        speed = 1 / (_work(network, team) * network.time_N[left] + way_N[left])
        speed_SN[row] = np.where(network.memory_N[left] >= need, speed, 0.0)
        nodes = np.array(team.nodes)
        own = 1 / (_work(network, team) * network.time_N[nodes] + way_N[nodes])
        way_N = network.mean_way(nodes, own / own.sum())
    total_S = np.array([1 / seconds for seconds in shared.stage_s])
    order_SN = np.argsort(-speed_SN, axis=1, kind="stable")
    fits_S = (speed_SN > 0).sum(axis=1)
    next_S = np.zeros(len(total_S), dtype=np.int64)
    free = np.ones(len(left), dtype=bool)
    open_S = total_S.copy()
    steps: list[tuple[int, int]] = []
    while np.isfinite(open_S).any():
        stage = int(open_S.argmin())
        while next_S[stage] < fits_S[stage] and not free[order_SN[stage, next_S[stage]]]:
            next_S[stage] += 1
        if next_S[stage] >= fits_S[stage]:
            open_S[stage] = math.inf
            continue
        at = int(order_SN[stage, next_S[stage]])
        free[at] = False
        open_S[stage] += speed_SN[stage, at]
        steps.append((int(left[at]), stage))
    return steps


def even_teams(network: Network, stages: int) -> Teams | None:
    """The model in so many even ranges, each led by the fastest node left that has room for it."""
    total = network.bytes_L.sum()
    sums = np.cumsum(network.bytes_L)
    ends = np.unique(np.searchsorted(sums, total * np.arange(1, stages + 1) / stages * (1 - 1e-12)) + 1)
    if len(ends) != stages:
        return None
    starts = np.concatenate([[0], ends[:-1]])
    free = np.ones(network.node_count, dtype=bool)
    teams: list[Team] = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        fits = free & (network.memory_N >= network.bytes_L[start:end].sum())
        if not fits.any():
            return None
        node = int(np.where(fits, network.time_N + network.typical_N * (stages > 1), math.inf).argmin())
        free[node] = False
        teams.append(Team(start, end, (node,)))
    return tuple(teams)


def share_out(
    network: Network, chains: Sequence[Teams], objective: Objective, *, remaining_s: Callable[[], float]
) -> Shared:
    """The best plan in which stages are shared: from the whole model on each node that has room for it, from the given
    chains, and from even cuts.

    The first chain and the whole model are looked at even where no time is left: where the model fits single nodes, no
    search for a chain makes up for that. The others too among SURE_NODES; else while there is time.
    """
    whole, *cuts = (even_teams(network, count) for count in EVEN_CUTS if count <= len(network.work_L))
    first, *others = chains
    beginnings = [teams for teams in (first, whole) if teams is not None]
    sure = len(beginnings)
    beginnings += [*others, *(teams for teams in cuts if teams is not None)]
    best: Shared | None = None
    for number, teams in enumerate(beginnings):
        if number >= sure and network.node_count > SURE_NODES and remaining_s() <= 0:
            break
        shared = add_replicas(network, teams, objective)
        if best is None or shared.value(objective) < best.value(objective):
            best = shared
    assert best is not None, "there is at least the chain that was found"
    return best
