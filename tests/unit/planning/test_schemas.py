"""Schemas: plans as roles, cast with other nodes, looked up by likeness, kept in a file that is checked when read."""

import json
import math
from types import MappingProxyType

import numpy as np
import pytest

from bsns.core.errors import BadOption, BadSnapshot, NotEnoughMemory
from bsns.core.ids import ModelId, PeerId
from bsns.core.plan import Objective
from bsns.core.snapshot import Link, ModelShape, NodeView, Snapshot
from bsns.planning.likeness import FEATURES, KEYS, likeness, nearest
from bsns.planning.network import chain_problem
from bsns.planning.schema_file import from_json, to_json
from bsns.planning.schemas import build, lookup, problem_of, score
from bsns.planning.transfer import cast, roles_of, transferred, with_others
from bsns.topology.synthetic import KINDS, synthetic

SHAPE = ModelShape(ModelId("m"), "m", (500_000_000,) * 16, 0, 8192)
SIZE = float(sum(SHAPE.block_bytes))
THROUGHPUT = Objective.named("throughput")


def draw(kind, nodes, seed):
    return synthetic(kind, nodes, np.random.default_rng(seed), model_bytes=SIZE)


def at_once():
    """A clock that has no time left: the rules and the exact cut only, the same on every machine."""
    return lambda: 0.0


def ticking(count):
    """A clock that has time for so many looks at it."""
    left = iter(range(count, 0, -1))
    return lambda: float(next(left, 0))


@pytest.fixture(scope="module")
def library():
    swarms = [draw(kind, nodes, seed) for seed, kind in enumerate(KINDS) for nodes in (6, 9, 14)]
    return build(SHAPE, swarms, objective=THROUGHPUT, rng=np.random.default_rng(0), clock=at_once)


def renumbered(swarm, order):
    names = {swarm.nodes[old].peer: PeerId(f"m{new:03d}") for new, old in enumerate(order)}
    nodes = [NodeView(names[n.peer], n.block_time_s, n.memory_bytes) for n in (swarm.nodes[old] for old in order)]
    links = {tuple(sorted((names[a], names[b]))): link for (a, b), link in swarm.links.items()}
    return Snapshot(0.0, tuple(nodes), MappingProxyType(links))


@pytest.mark.parametrize("kind", KINDS)
def test_in_its_own_swarm_a_plan_is_found_again_whatever_the_nodes_are_called(kind):
    swarm = draw(kind, 12, 3)
    problem = chain_problem(swarm, SHAPE)
    chain = transferred(problem, roles_of(problem, transferred(problem, (), THROUGHPUT)), THROUGHPUT)
    roles = roles_of(problem, chain)
    order = np.random.default_rng(1).permutation(12).tolist()
    again = chain_problem(renumbered(swarm, order), SHAPE)
    assert [order[node] for node in cast(again, roles)] == [stage.node for stage in chain]
    found = transferred(again, roles, THROUGHPUT)
    assert again.fits(found)
    assert again.value(found, THROUGHPUT) <= problem.value(chain, THROUGHPUT) * (1 + 1e-9)


def test_a_cast_uses_each_node_once_and_no_more_than_there_are():
    large, small = chain_problem(draw("uniform", 14, 1), SHAPE), chain_problem(draw("uniform", 3, 2), SHAPE)
    roles = roles_of(large, transferred(large, (), THROUGHPUT))
    assert len(roles) > 3
    assert sorted(cast(small, roles)) == [0, 1, 2]
    assert sorted(with_others(large, cast(large, roles))) == list(range(14))


def test_a_node_without_room_for_a_role_does_not_get_it():
    nodes = (NodeView(PeerId("a"), 0.005, 10**11), NodeView(PeerId("b"), 0.005, 10**6))
    problem = chain_problem(Snapshot(0.0, nodes), SHAPE)
    roles = roles_of(problem, transferred(problem, (), THROUGHPUT))
    assert cast(problem, roles) == [0]


def test_other_nodes_stand_where_they_lengthen_the_way_least():
    at = {"a": 0.0, "b": 10.0, "c": 4.0}
    nodes = tuple(NodeView(PeerId(name), 0.005, 10**11) for name in at)
    links = {(PeerId(x), PeerId(y)): Link(abs(at[x] - at[y])) for x, y in (("a", "b"), ("a", "c"), ("b", "c"))}
    problem = chain_problem(Snapshot(0.0, nodes, MappingProxyType(links)), SHAPE)
    assert with_others(problem, [0, 1]) == [0, 2, 1]


def test_memory_that_is_too_short_gives_no_chain():
    nodes = (NodeView(PeerId("a"), 0.005, 10**6), NodeView(PeerId("b"), 0.005, 10**6))
    problem = chain_problem(Snapshot(0.0, nodes), SHAPE)
    rich = chain_problem(draw("uniform", 9, 1), SHAPE)
    assert transferred(problem, roles_of(rich, transferred(rich, (), THROUGHPUT)), THROUGHPUT) is None


def test_building_skips_and_counts_what_cannot_hold_the_model():
    poor = Snapshot(0.0, (NodeView(PeerId("a"), 0.005, 1000),))
    made = build(
        SHAPE, [poor, draw("uniform", 6, 1)], objective=THROUGHPUT, rng=np.random.default_rng(0), clock=at_once
    )
    assert (len(made.schemas), made.skipped) == (1, 1)
    with pytest.raises(NotEnoughMemory, match="fits none of the 2 swarms"):
        build(SHAPE, [poor, poor], objective=THROUGHPUT, rng=np.random.default_rng(0), clock=at_once)


@pytest.mark.parametrize("key", KEYS)
def test_looking_up_by_every_key(library, key):
    swarm = draw("uniform", 11, 50)
    problem = problem_of(swarm, SHAPE)
    found = score(library, swarm, problem, SHAPE, THROUGHPUT, 3, np.random.default_rng(1), key=key)
    assert len(found) == 3
    assert [value for value, _, _ in found] == sorted(value for value, _, _ in found)
    for value, _, chain in found:
        assert problem.fits(chain)
        assert value == problem.value(chain, THROUGHPUT)


@pytest.mark.parametrize("key", [key for key in KEYS if key != "none"])
def test_a_swarm_is_most_like_itself(library, key):
    swarm = renumbered(draw("lan_wan", 9, 0), np.random.default_rng(2).permutation(9).tolist())
    known = [schema.like for schema in library.schemas]
    assert nearest(key, likeness(swarm, SHAPE), known, 2, np.random.default_rng(0))[0] == 1


def test_without_a_key_chance_decides(library):
    known = [schema.like for schema in library.schemas]
    drawn = {tuple(nearest("none", known[0], known, 3, np.random.default_rng(seed))) for seed in range(5)}
    assert len(drawn) > 1
    assert nearest("ph", known[0], [], 3, np.random.default_rng(0)) == []
    with pytest.raises(BadOption):
        nearest("phlogiston", known[0], known, 3, np.random.default_rng(0))


def test_a_plan_that_is_good_enough_is_taken_as_it_is(library):
    nodes = (NodeView(PeerId("a"), 0.001, 10**11), NodeView(PeerId("b"), 1.0, 10**11))
    lone = Snapshot(0.0, nodes, MappingProxyType({(PeerId("a"), PeerId("b")): Link(1.0)}))
    found = lookup(library, lone, SHAPE, THROUGHPUT, 2, np.random.default_rng(0), lambda: 1.0, 0.1)
    assert found.how == "taken"
    assert found.gap <= 0.02
    assert found.schema is not None
    assert [stage.node for stage in found.chain] == [0]


def test_a_plan_above_the_bound_is_refined_and_else_searched_for_afresh(library):
    swarm = draw("scale_free", 10, 60)
    scores = score(library, swarm, problem_of(swarm, SHAPE), SHAPE, THROUGHPUT, 3, np.random.default_rng(0))
    for max_gap, hows in ((math.inf, {"refined"}), (0.0, {"fresh", "refined"})):
        found = lookup(library, swarm, SHAPE, THROUGHPUT, 3, np.random.default_rng(0), ticking(6), max_gap)
        assert found.how in hows
        assert found.problem.fits(found.chain)
        assert found.lower_bound_s <= found.value_s <= scores[0][0]
        assert [number for number, _ in found.scored] == [number for _, number, _ in scores]


def test_an_empty_library_leaves_a_fresh_search(library):
    empty = build(SHAPE, [], objective=THROUGHPUT, rng=np.random.default_rng(0), clock=at_once)
    found = lookup(empty, draw("uniform", 8, 1), SHAPE, THROUGHPUT, 3, np.random.default_rng(0), lambda: 0.0, 0.1)
    assert (found.how, found.schema, found.scored) == ("fresh", None, ())
    poor = Snapshot(0.0, (NodeView(PeerId("a"), 0.005, 1000),))
    with pytest.raises(NotEnoughMemory):
        lookup(library, poor, SHAPE, THROUGHPUT, 3, np.random.default_rng(0), lambda: 0.0, 0.1)


def test_a_swarm_of_many_nodes_is_planned_with_the_best_of_them(library):
    swarm = draw("lan_wan", 400, 1)
    found = lookup(library, swarm, SHAPE, THROUGHPUT, 1, np.random.default_rng(0), lambda: 0.0, math.inf)
    assert found.problem.node_count < 400
    assert found.problem.fits(found.chain)
    assert 0 < found.lower_bound_s <= found.value_s


def test_what_cannot_be_looked_up(library):
    swarm, rng = draw("uniform", 6, 1), np.random.default_rng(0)
    other = ModelShape(ModelId("o"), "o", (1,) * 3, 0, 8)
    with pytest.raises(BadSnapshot, match="16 blocks"):
        lookup(library, swarm, other, THROUGHPUT, 3, rng, lambda: 0.0, 0.1)
    with pytest.raises(BadOption):
        lookup(library, swarm, SHAPE, THROUGHPUT, 0, rng, lambda: 0.0, 0.1)
    with pytest.raises(BadSnapshot):
        lookup(library, Snapshot(0.0, ()), SHAPE, THROUGHPUT, 3, rng, lambda: 0.0, 0.1)


def test_one_node_is_a_swarm():
    lone = Snapshot(0.0, (NodeView(PeerId("a"), 0.001, 10**11),))
    made = build(SHAPE, [lone], objective=THROUGHPUT, rng=np.random.default_rng(0), clock=at_once)
    assert made.schemas[0].like.features.shape == (FEATURES,)
    for key in KEYS:
        found = lookup(made, lone, SHAPE, THROUGHPUT, 1, np.random.default_rng(0), lambda: 0.0, 0.1, key=key)
        assert found.value_s == pytest.approx(0.016)


def test_a_library_survives_its_file(library):
    again = from_json(to_json(library))
    assert to_json(again) == to_json(library)
    swarm = draw("uniform", 11, 50)
    for key in KEYS:
        one, other = (
            score(
                kept,
                swarm,
                problem_of(swarm, SHAPE),
                SHAPE,
                THROUGHPUT,
                3,
                np.random.default_rng(1),
                key=key,
            )
            for kept in (library, again)
        )
        assert one == other


def without(path):
    """The library's file with what stands at `path` changed."""

    def change(value, new):
        *way, last = path
        for step in way:
            value = value[step]
        value[last] = new

    return change


@pytest.mark.parametrize(
    ("path", "new"),
    [
        (["version"], 2),
        (["version"], "1"),
        (["block_count"], 0),
        (["block_count"], 15),
        (["bottleneck"], -1.0),
        (["skipped"], -1),
        (["unknown"], 1),
        (["schemas", 0, "scale_s"], 0.0),
        (["schemas", 0, "value_s"], 1e300),
        (["schemas", 0, "sampled"], 10**6),
        (["schemas", 0, "distances"], [1.0]),
        (["schemas", 0, "features", 0], 1e300),
        (["schemas", 0, "features", 0], None),
        (["schemas", 0, "plain", "h0", 0], [2.0, 1.0]),
        (["schemas", 0, "plain", "h0", 0], [0.0, None]),
        (["schemas", 0, "plain", "h1"], [[0.0, 1.0]] * 6000),
        (["schemas", 0, "weighted", "h0"], []),
        (["schemas", 0, "roles", 0, 0], 1),
        (["schemas", 0, "roles", 0, 1], 10**12),
        (["schemas", 0, "roles", 0, 2], 0.0),
        (["schemas", 0, "roles", 0, 5], -1.0),
        (["schemas", 0, "roles"], []),
    ],
)
def test_a_file_that_cannot_be(library, path, new):
    value = json.loads(to_json(library))
    without(path)(value, new)
    with pytest.raises(BadSnapshot):
        from_json(json.dumps(value).encode())


@pytest.mark.parametrize("text", [b"", b"[]", b"\xff\xfe", b"{", b'{"version":1}', b"[" * 100_000, b"NaN"])
def test_what_is_no_library(text):
    with pytest.raises(BadSnapshot):
        from_json(text)
