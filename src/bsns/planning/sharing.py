"""Local search over teams: boundaries shifted, teams joined, nodes moved between them, in or out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bsns.core.plan import Objective
from bsns.planning.network import Network
from bsns.planning.problem import Floats
from bsns.planning.replicas import Shared, Team, Teams, add_replicas, evaluate

SEARCHED_NODES = 96
"""Beyond, a change of one node hardly matters, and weighing one takes too long."""
PATIENCE = 1500
"""Changes in a row that help nothing, after which the search ends."""
LOOKED_AHEAD = 3e-2
"""A change may cost so much of the value, less and less, before another makes it worth while."""


def refine(
    network: Network,
    shared: Shared,
    objective: Objective,
    *,
    rng: np.random.Generator,
    remaining_s: Callable[[], float],
) -> Shared:
    """Teams at least as good, from random changes; each is kept where it makes the value no worse, or hardly."""
    if network.node_count > SEARCHED_NODES or objective.bottleneck == 0:
        return shared
    hop_NN = network.ways(range(network.node_count), range(network.node_count))
    best, least = shared.teams, shared.value(objective)
    now, value = best, least
    idle = 0
    while idle < PATIENCE and remaining_s() > 0:
        idle += 1
        changed = _change(network, now, _slowest(network, hop_NN, now), rng)
        if changed is None:
            continue
        after = _value(network, hop_NN, changed, objective)
        if after < value * (1 - 1e-9) and after < least * (1 - 1e-9):
            best, least, idle = changed, after, 0
        if after <= least * (1 + LOOKED_AHEAD * (1 - idle / PATIENCE)):
            now, value = changed, after
        elif idle % 100 == 0:
            now, value = best, least
    improved = add_replicas(network, best, objective)
    return improved if improved.value(objective) < shared.value(objective) else shared


def _value(network: Network, hop_NN: Floats, teams: Teams, objective: Objective) -> float:
    stage_s, back_s = _stage_s(network, hop_NN, teams)
    bottleneck_s = max(*stage_s, back_s)
    return objective.value(bottleneck_s, evaluate(network, teams).latency_s if objective.latency else 0.0)


def _slowest(network: Network, hop_NN: Floats, teams: Teams) -> int:
    return int(np.argmax(_stage_s(network, hop_NN, teams)[0]))


def _stage_s(network: Network, hop_NN: Floats, teams: Teams) -> tuple[list[float], float]:
    """Each stage's time, and the client's turn, as `replicas.evaluate` has them."""
    seconds: list[float] = []
    before, share = np.zeros(0, dtype=np.int64), np.zeros(0)
    for team in teams:
        nodes = np.array(team.nodes)
        way = share @ hop_NN[np.ix_(before, nodes)] if len(before) else network.ends_N[nodes]
        speed = 1 / (float(network.work_L[team.start : team.end].sum()) * network.time_N[nodes] + way)
        seconds.append(float(1 / speed.sum()))
        before, share = nodes, speed / speed.sum()
    return seconds, float(share @ network.ends_N[before]) + network.client_s


def _change(network: Network, teams: Teams, slowest: int, rng: np.random.Generator) -> Teams | None:
    """A random change that gives the slowest stage more nodes or less work, or joins stages; None if it cannot be."""
    kind = int(rng.integers(6))
    stage = slowest if rng.random() < 0.7 else int(rng.integers(len(teams)))
    if kind == 0 and len(teams) > 1:
        return _shifted(network, teams, stage, rng)
    if kind == 1 and len(teams) > 1:
        return _joined(network, teams, min(stage, len(teams) - 2))
    if kind == 2:
        return _split(teams, stage, rng)
    if kind == 3 and len(teams[stage].nodes) > 1:
        node = teams[stage].nodes[int(rng.integers(len(teams[stage].nodes)))]
        return _with(teams, stage, tuple(other for other in teams[stage].nodes if other != node))
    return _taken_in(network, teams, stage, rng, exchange=kind == 4)


def _shifted(network: Network, teams: Teams, stage: int, rng: np.random.Generator) -> Teams | None:
    """A boundary of the stage moved, so that it gets shorter."""
    left = stage > 0 and (stage == len(teams) - 1 or bool(rng.integers(2)))
    other = stage - 1 if left else stage + 1
    steps = int(rng.integers(1, 3))
    if teams[stage].end - teams[stage].start <= steps:
        return None
    mine, theirs = teams[stage], teams[other]
    if left:
        mine, theirs = (
            Team(mine.start + steps, mine.end, mine.nodes),
            Team(theirs.start, theirs.end + steps, theirs.nodes),
        )
    else:
        mine, theirs = (
            Team(mine.start, mine.end - steps, mine.nodes),
            Team(theirs.start - steps, theirs.end, theirs.nodes),
        )
    fitting = _fitting(network, theirs)
    if not fitting.nodes:
        return None
    changed = list(teams)
    changed[stage], changed[other] = mine, fitting
    return tuple(changed)


def _joined(network: Network, teams: Teams, stage: int) -> Teams | None:
    one, other = teams[stage], teams[stage + 1]
    joined = _fitting(network, Team(one.start, other.end, one.nodes + other.nodes))
    return (*teams[:stage], joined, *teams[stage + 2 :]) if joined.nodes else None


def _split(teams: Teams, stage: int, rng: np.random.Generator) -> Teams | None:
    team = teams[stage]
    if team.end - team.start < 2 or len(team.nodes) < 2:
        return None
    cut = int(rng.integers(team.start + 1, team.end))
    order = rng.permutation(np.array(team.nodes)).tolist()
    at = int(rng.integers(1, len(order)))
    parts = (Team(team.start, cut, tuple(order[:at])), Team(cut, team.end, tuple(order[at:])))
    return (*teams[:stage], *parts, *teams[stage + 1 :])


def _taken_in(network: Network, teams: Teams, stage: int, rng: np.random.Generator, *, exchange: bool) -> Teams | None:
    """A node from outside or from another team joins the stage; with `exchange`, one of the stage's takes its place."""
    need = float(network.bytes_L[teams[stage].start : teams[stage].end].sum())
    able = np.flatnonzero(network.memory_N >= need)
    able = able[~np.isin(able, teams[stage].nodes)]
    if not len(able):
        return None
    node = int(rng.choice(able))
    changed = list(teams)
    back = int(rng.choice(np.array(teams[stage].nodes))) if exchange else None
    for number, team in enumerate(teams):
        if number == stage:
            kept = tuple(other for other in team.nodes if other != back)
            changed[number] = Team(team.start, team.end, (*kept, node))
        elif node in team.nodes:
            members = tuple(other for other in team.nodes if other != node) + (() if back is None else (back,))
            changed[number] = _fitting(network, Team(team.start, team.end, members))
            if not changed[number].nodes:
                return None
    return tuple(changed)


def _with(teams: Teams, stage: int, nodes: tuple[int, ...]) -> Teams:
    return (*teams[:stage], Team(teams[stage].start, teams[stage].end, nodes), *teams[stage + 1 :])


def _fitting(network: Network, team: Team) -> Team:
    """The team without those whose memory is too small."""
    need = float(network.bytes_L[team.start : team.end].sum())
    return Team(team.start, team.end, tuple(node for node in team.nodes if network.memory_N[node] >= need))
