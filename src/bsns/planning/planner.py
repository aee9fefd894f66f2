"""The planner: from a problem to a chain with a proof, and from a snapshot to a plan.

Anytime: the rivals' rules first, so that no plan is worse than theirs; then the genetic engine; then the exact solver
with the best chain as its hint; last replicas, whose first beginnings take no heed of the time. The clock stays
outside: `remaining_s()` says how many seconds are left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import scipy.optimize  # noqa: F401  the bounds' first use would load it, for a third of a second of the search's time

from bsns.core.blocks import BlockRange
from bsns.core.errors import MissingBlocks, NotEnoughMemory
from bsns.core.plan import LEAST_CACHE_TOKENS, ONE_NODE, Alternative, LeftOut, Objective, Plan, PlannedStage
from bsns.core.snapshot import ModelShape, Snapshot
from bsns.core.words import size
from bsns.planning.account import OWN_WEIGHTS
from bsns.planning.bounds import bottleneck_floor, latency_floor, lower_bound
from bsns.planning.chain_dp import best_cut, nearest_order
from bsns.planning.device_order import search_orders
from bsns.planning.exact import solve_exactly
from bsns.planning.network import Network
from bsns.planning.problem import Chain, ChainProblem, Stage
from bsns.planning.reasons import check_room, holds_all, left_out, left_out_by_weights, no_chain_fits
from bsns.planning.replicas import Shared, evaluate, share_out, teams_of, without_stragglers
from bsns.planning.rival_rules import RULES
from bsns.planning.scale import DENSE_NODES, candidates
from bsns.planning.selection import Traits, Weighed, Weights, fitting_reach, select
from bsns.planning.sharing import refine
from bsns.planning.walks import MAX_CASES, Bools, Cost, cheapest_chain
from bsns.planning.weighed_rivals import beside_chosen, numbered

Clock = Callable[[], float]
"""How many seconds are left."""

THROUGHPUT = Objective()
LATENCY = Objective(0.0, 1.0)
BEST_FOUND = "the best found in time, not proven to be the cheapest by them"
ENGINES = ("rules", "brkga", "exact")
PROVEN_GAP = 1e-6
MIXTURE_SLACK = 1e-3
"""How exactly a mixed objective is cut along one order: the engines that follow refine it."""
EXACT_NODES = 128
"""The exact solver has a variable for every two nodes: beyond, building its model takes longer than it gains."""
BRKGA_SHARE = 0.3
"""Of the time, where the exact solver follows."""

SHARING_SHARE = 0.4
"""Of the time, for dividing the work over replicas."""


@dataclass(frozen=True, slots=True)
class Solved:
    """The best chain found, and how far from the best possible it may be. `proven`: it is the best possible."""

    chain: Chain
    bottleneck_s: float
    latency_s: float
    value: float
    lower_bound_s: float
    gap: float
    method: str
    """Which engine found it."""
    proven: bool
    rules: Mapping[str, Chain | None] = field(default_factory=dict)
    """The chains of others' rules, where they were asked for."""


@dataclass(slots=True)
class Best:
    """The best chain so far, who found it, and the best bound."""

    problem: ChainProblem
    objective: Objective
    bound_s: float
    chain: Chain | None = None
    value: float = math.inf
    method: str = ""

    def offer(self, chain: Chain | None, method: str) -> None:
        if chain is None or not self.problem.fits(chain):
            return
        value = self.problem.value(chain, self.objective)
        if value < self.value:
            self.chain, self.value, self.method = chain, value, method

    @property
    def proven(self) -> bool:
        return self.chain is not None and self.value <= self.bound_s * (1 + PROVEN_GAP)


def solve_chain(
    problem: ChainProblem,
    objective: Objective,
    *,
    rng: np.random.Generator,
    remaining_s: Clock,
    warm: Sequence[Chain] = (),
    engines: Sequence[str] = ENGINES,
) -> Solved:
    """The best chain that the engines find in time. Equal generators and enough time give equal chains.

    Raises NotEnoughMemory where no chain was found that fits.
    """
    best = Best(problem, objective, lower_bound(problem, objective))
    for chain in warm:
        best.offer(chain, "warm start")
    rules: dict[str, Chain | None] = {}
    if "rules" in engines:
        for name, rule in RULES.items():
            rules[name] = rule(problem)
            best.offer(rules[name], name)
    best.offer(best_cut_nearest(problem, objective), "dynamic programming")
    exact = "exact" in engines and problem.node_count <= EXACT_NODES
    if "brkga" in engines and not best.proven and remaining_s() > 0:
        left_s = remaining_s() * (1 - BRKGA_SHARE if exact else 0.0)
        starts = [chain for chain in (best.chain, *rules.values(), *warm) if chain is not None]
        found = search_orders(
            problem,
            objective,
            rng=rng,
            warm=starts,
            should_stop=lambda: remaining_s() <= left_s,
            good_enough=best.bound_s * (1 + PROVEN_GAP),
        )
        best.offer(found, "brkga")
    if exact and not best.proven and remaining_s() > 0:
        solved = solve_exactly(
            problem,
            objective,
            remaining_s=remaining_s,
            hint=best.chain,
            bound_s=best.bound_s,
            seed=int(rng.integers(2**31)),
        )
        best.offer(solved.chain, "exact")
        best.bound_s = max(best.bound_s, solved.bound_s)
    if best.chain is None:
        raise NotEnoughMemory("no chain of these nodes has room for every block; add nodes, or lower the precision")
    bottleneck_s, latency_s = problem.cost(best.chain)
    bound_s = min(best.bound_s, best.value)
    gap = best.value / bound_s - 1 if bound_s > 0 else (0.0 if best.value == 0 else math.inf)
    return Solved(best.chain, bottleneck_s, latency_s, best.value, bound_s, gap, best.method, gap <= PROVEN_GAP, rules)


def best_cut_nearest(problem: ChainProblem, objective: Objective) -> Chain | None:
    """The best cut along the order in which each node is followed by the nearest one left."""
    return best_cut(problem, nearest_order(problem), objective, slack=MIXTURE_SLACK)


def make_plan(
    snapshot: Snapshot,
    shape: ModelShape,
    *,
    objective: Objective = THROUGHPUT,
    cache_tokens: int = LEAST_CACHE_TOKENS,
    client_s: float = 0.0,
    rng: np.random.Generator,
    remaining_s: Clock,
    warm: Sequence[Chain] = (),
    replicas: bool = True,
) -> Plan:
    """The plan for a swarm and a model. `warm`: chains to start from, nodes numbered as in `snapshot.nodes`.

    Raises BadSnapshot, or NotEnoughMemory with what is missing.
    """
    network = Network.of(snapshot, shape, cache_tokens=cache_tokens, client_s=client_s)
    check_room(network, shape, cache_tokens)
    nodes = np.union1d(candidates(network), [stage.node for chain in warm for stage in chain]).astype(int)
    place = {node: number for number, node in enumerate(nodes.tolist())}
    problem = network.problem(nodes)
    sharing = replicas and network.node_count > 1
    kept_s = remaining_s() * SHARING_SHARE if sharing and objective.bottleneck else 0.0
    try:
        solved = solve_chain(
            problem,
            objective,
            rng=rng,
            remaining_s=lambda: remaining_s() - kept_s,
            warm=[tuple(Stage(place[node], start, end) for node, start, end in chain) for chain in warm],
        )
    except NotEnoughMemory:
        raise no_chain_fits(network, shape, cache_tokens) from None
    alone = evaluate(network, teams_of(solved.chain, nodes))
    shared, method = alone, solved.method
    if sharing:
        chains = [solved.chain, *(chain for chain in solved.rules.values() if chain is not None)]
        shared = share_out(network, [teams_of(chain, nodes) for chain in chains], objective, remaining_s=remaining_s)
        shared = refine(network, shared, objective, rng=rng, remaining_s=remaining_s)
        shared = min(without_stragglers(network, shared), alone, key=lambda found: found.value(objective))
        if any(len(team.nodes) > 1 for team in shared.teams):
            method += " + replicas"
    bound_s = plan_bound(network, problem, objective, solved, replicas=sharing)
    alternatives = (*_alternatives(problem, solved.rules), _one_node(network))
    reasons = left_out(network, shared, objective, replicas=sharing)
    return _plan(network, shape, objective, shared, method, bound_s, alternatives, reasons)


def plan_by_weights(
    snapshot: Snapshot,
    shape: ModelShape,
    weights: Weights,
    *,
    objective: Objective = THROUGHPUT,
    cache_tokens: int = LEAST_CACHE_TOKENS,
    client_s: float = 0.0,
    rng: np.random.Generator,
    remaining_s: Clock,
) -> Plan:
    """The chain that a user's own weights choose (planning.selection); its gap is that of `objective`.

    With `lookahead` 1 it is the cheapest by them, or the best found in time; else nodes are picked one by one, and the
    cheapest is taken where that comes to a dead end. `method` says which, and whether it is proven. Raises BadSnapshot,
    NotEnoughMemory, and MissingBlocks where what the weights allow does not hold the model.
    """
    network = Network.of(snapshot, shape, cache_tokens=cache_tokens, client_s=client_s)
    check_room(network, shape, cache_tokens)
    few = candidates(network)
    allowed = np.flatnonzero([node.attested or not weights.attested_only for node in snapshot.nodes])
    if not holds_all(network, allowed):
        raise MissingBlocks("the nodes that these weights allow do not hold the model together; allow more of them")
    nodes = allowed if len(allowed) <= DENSE_NODES else np.intersect1d(allowed, few)
    problem = network.problem(nodes)
    traits = Traits.of([snapshot.nodes[node] for node in nodes])
    found = _chosen(problem, weights, traits, rng=rng, remaining_s=remaining_s)
    if found is None:
        raise no_chain_fits(network, shape, cache_tokens)
    rivals_problem = network.problem(few)
    rivals = {name: rule(rivals_problem) for name, rule in RULES.items()}
    bound_s = lower_bound(problem, objective)
    if objective.bottleneck == 0 and weights.only_latency:  # what bounds the cost bounds the latency
        bound_s = max(bound_s, objective.latency * (found.bound / weights.latency + client_s))
    value = problem.value(found.chain, objective)
    solved = Solved(found.chain, *problem.cost(found.chain), value, bound_s, value / bound_s - 1, "weights", False)
    bound_s = plan_bound(network, problem, objective, solved, replicas=False)
    looked_at = "" if len(nodes) == len(allowed) else f" of the {len(nodes)} nodes looked at"
    how = f"no chain{looked_at} is cheaper by them" if found.proven else found.how
    others = {name: chain and numbered(chain, few) for name, chain in rivals.items()} | {ONE_NODE: _alone(network)}
    notes = beside_chosen(network, snapshot.nodes, weights, numbered(found.chain, nodes), others)
    plain = (*_alternatives(rivals_problem, rivals), _one_node(network))
    alternatives = tuple(replace(other, note=notes.get(other.name, other.note)) for other in plain)
    shared = evaluate(network, teams_of(found.chain, nodes))
    reasons = left_out_by_weights(network, shared, allowed=allowed, looked_at=nodes)
    method = f"{OWN_WEIGHTS} ({how})" if how else OWN_WEIGHTS
    return _plan(network, shape, objective, shared, method, bound_s, alternatives, reasons)


@dataclass(frozen=True, slots=True)
class _Chosen:
    """A chain chosen by weights, and what no chain's cost by them falls below, in seconds."""

    chain: Chain
    bound: float = 0.0
    proven: bool = False
    how: str = ""


def _chosen(
    problem: ChainProblem, weights: Weights, traits: Traits, *, rng: np.random.Generator, remaining_s: Clock
) -> _Chosen | None:
    """The chain that weights choose, or None if none was found."""
    if weights.lookahead == 1:
        return _cheapest(problem, weights, traits, rng=rng, remaining_s=remaining_s)
    picked = select(problem, weights, traits=traits)
    if picked is not None:
        return _Chosen(picked)
    found = _cheapest(problem, weights, traits, rng=rng, remaining_s=remaining_s)
    how = "picked one by one, the nodes came to a dead end, so the cheapest chain by them was looked for"
    return found and replace(found, bound=0.0, proven=False, how=how)


def _cheapest(
    problem: ChainProblem, weights: Weights, traits: Traits, *, rng: np.random.Generator, remaining_s: Clock
) -> _Chosen | None:
    """The chain of least cost by weights that is found in time, or None if none is.

    A walk gains by coming back to a fast node, for its memory counts anew each time: where memory is short, splitting
    walks settles little. So what they leave open, the engines of `solve_chain` look into, with costs for times.
    """
    weighed = Weighed.of(problem, weights, traits.beside_the_best())
    rough, _ = weighed.as_times(problem, weighed.most)
    starts = [*(rule(problem) for rule in RULES.values()), best_cut_nearest(rough, LATENCY)]
    known = min((chain for chain in starts if chain and problem.fits(chain)), key=weighed.cost, default=None)
    most = weighed.most if known is None else 2 * weighed.cost(known)
    ways = weighed.clipped(most).ways(fitting_reach(problem))
    cases = 0

    def solve(allowed_NL: Bools, _least: Cost | None, _most: Cost | None) -> tuple[Cost, Chain] | None:
        nonlocal cases
        cases += 1
        return ways.table(allowed_NL).best() if cases <= MAX_CASES and remaining_s() > 0 else None

    walked = cheapest_chain(ways, solve=solve, known=known)
    best = walked[1] if walked and problem.fits(walked[1]) else known
    settled = cases <= MAX_CASES and remaining_s() > 0
    if best is not None and (settled or weighed.cost(best) == 0):
        return _Chosen(best, weighed.cost(best), proven=True)
    times, exact = weighed.as_times(problem, most)
    warm = [] if best is None else [best]
    try:  # without the genetic search: for sums of costs the exact solver is sooner done without its hint
        solved = solve_chain(times, LATENCY, rng=rng, remaining_s=remaining_s, warm=warm, engines=("rules", "exact"))
    except NotEnoughMemory:
        return None
    best = min([*warm, solved.chain], key=weighed.cost)
    if exact and known is not None:
        return _Chosen(best, solved.lower_bound_s, solved.proven, "" if solved.proven else BEST_FOUND)
    return _Chosen(best, how=BEST_FOUND)


def _plan(
    network: Network,
    shape: ModelShape,
    objective: Objective,
    shared: Shared,
    method: str,
    bound_s: float,
    alternatives: tuple[Alternative, ...],
    reasons: tuple[LeftOut, ...],
) -> Plan:
    value = shared.value(objective)
    bound_s = min(bound_s, value)
    return Plan(
        model=shape.model,
        model_name=shape.name,
        block_count=shape.block_count,
        objective=objective,
        stages=_stages(network, shared),
        left_out=reasons,
        bottleneck_s=shared.bottleneck_s,
        latency_s=shared.latency_s,
        lower_bound_s=bound_s,
        gap=value / bound_s - 1 if bound_s > 0 else 0.0,
        method=method,
        alternatives=alternatives,
        assumptions=network.assumptions,
    )


def plan_bound(
    network: Network, problem: ChainProblem, objective: Objective, solved: Solved, *, replicas: bool
) -> float:
    """What no plan over the whole network beats. Replicas change no latency, so there the chain's bound holds."""
    every_node = problem.node_count == network.node_count
    if every_node and (not replicas or objective.bottleneck == 0):
        return solved.lower_bound_s
    if every_node:
        return lower_bound(problem, objective, replicas=True)
    floors = network.floors()
    bottleneck_s = bottleneck_floor(floors, replicas=replicas) if objective.bottleneck else 0.0
    return objective.value(bottleneck_s, latency_floor(floors) if objective.latency else 0.0)


def _stages(network: Network, shared: Shared) -> tuple[PlannedStage, ...]:
    stages: list[PlannedStage] = []
    before: int | None = None
    for team in shared.teams:
        leader, *others = team.nodes
        way_s = network.ends_N[leader] if before is None else network.ways([before], [leader])[0, 0]
        compute_s = float(network.work_L[team.start : team.end].sum() * network.time_N[leader])
        peers = tuple(network.peers[node] for node in others)
        stages.append(
            PlannedStage(BlockRange(team.start, team.end), network.peers[leader], compute_s, float(way_s), peers)
        )
        before = leader
    return tuple(stages)


def _alternatives(problem: ChainProblem, rivals: Mapping[str, Chain | None]) -> list[Alternative]:
    others: list[Alternative] = []
    for name, chain in rivals.items():
        if chain is None:
            others.append(Alternative(name, None, None, "its rule asks more of a node's memory than there is"))
        else:
            others.append(Alternative(name, *problem.cost(chain)))
    return others


def _alone(network: Network) -> Chain | None:
    """The whole model on the node that answers a single stream soonest, or None where it fits none."""
    fits_N = network.memory_N >= float(network.bytes_L.sum())
    if not fits_N.any():
        return None
    latency_N = float(network.work_L.sum()) * network.time_N + 2 * network.ends_N
    return (Stage(int(np.where(fits_N, latency_N, math.inf).argmin()), 0, len(network.work_L)),)


def _one_node(network: Network) -> Alternative:
    """The whole model on the best single node."""
    chain = _alone(network)
    if chain is None:
        missing = size(float(network.bytes_L.sum()) - float(network.memory_N.max()))
        return Alternative(ONE_NODE, None, None, f"{missing} are missing on the largest node")
    node = chain[0].node
    compute_s, way_s = float(network.work_L.sum() * network.time_N[node]), float(network.ends_N[node])
    return Alternative(
        ONE_NODE, max(compute_s + way_s, way_s + network.client_s), compute_s + 2 * way_s + network.client_s
    )
