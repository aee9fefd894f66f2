"""The dashboard's page and state: who may see what, and how little work it takes however many watch."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from memory_swarm import until
from scripted_engine import ScriptedEngine, chat, client_of, node_status, show

from bsns.client.pieces import Stats
from bsns.core.blocks import BlockRange
from bsns.core.errors import PeerLost
from bsns.core.ids import PeerId
from bsns.core.snapshot import Link
from bsns.gateway import dashboard
from bsns.gateway.dashboard import MOST_OF_A_KEY, Dashboard, parts
from bsns.gateway.errors import ApiError
from bsns.gateway.grammar import Grammars
from bsns.gateway.keys import KeyRing, add_key
from bsns.gateway.limits import Allowance
from bsns.gateway.lookout import FORGET_S, LOST_S, Lookout, Sight, Viewer
from bsns.gateway.running import RunningAnswers
from bsns.gateway.settings import Settings
from bsns.routing.chain import Hop

LOW, HIGH = BlockRange(0, 2), BlockRange(2, 4)
ANN, BOB, ALL = Viewer("ann", False), Viewer("bob", False), Viewer("", True)
PUBLIC = Viewer("", False, own_routes=False)


class Watched:
    """A lookout on a scripted engine, and the time it believes in."""

    def __init__(self, engine: ScriptedEngine) -> None:
        self.engine, self.running, self.now_s = engine, RunningAnswers(), 100.0
        self.lookout = Lookout(engine, self.running, now_s=lambda: self.now_s, unix_s=lambda: 1e9 + self.now_s)
        self.show()

    def show(self, **answers: bool) -> None:
        """Two nodes, of which those that are named may not answer."""
        nodes = {"nodeA": LOW, "nodeB": HIGH, "nodeC": HIGH}
        show(
            self.engine,
            [node_status(name, held, answers=answers.get(name, True)) for name, held in nodes.items()],
            {(PeerId("nodeA"), PeerId("nodeB")): Link(0.002, 5e6, 0.0001, 3.0)},
        )

    async def look(self, later_s: float = 1.0) -> Sight:
        self.now_s += later_s
        return await self.lookout.sight()


@pytest.fixture
def watched(engine: ScriptedEngine) -> Watched:
    return Watched(engine)


def conditions(sight: Sight) -> dict[str, str]:
    return {node.name: node.condition for node in sight.swarm.nodes}


def told(sight: Sight, viewer: Viewer = ALL) -> list[str]:
    return [event.text for event in sight.events_of(viewer)]


def through(*names: str) -> tuple[Hop, ...]:
    return tuple(Hop(PeerId(name), held, ()) for name, held in zip(names, (LOW, HIGH), strict=True))


async def test_what_is_seen(watched: Watched) -> None:
    sight = await watched.look()
    swarm = sight.swarm
    assert conditions(sight) == {"nodeA": "serving", "nodeB": "serving", "nodeC": "serving"}
    (link,) = [link for link in swarm.links if "gateway" not in (link.a, link.b)]
    assert (link.a, link.b, link.round_trip_ms, link.mb_per_s, link.age_s) == ("nodeA", "nodeB", 2.0, 5.0, 3)
    assert sum(link.a == "gateway" for link in swarm.links) == 3
    node = swarm.nodes[0]
    assert (node.blocks, node.cache_tokens_left, node.sessions, node.round_trip_ms) == ([(0, 2)], 900, 1, 1.0)
    assert (swarm.missing, swarm.repairs, swarm.block_count) == ([], 3, 4)
    assert "10.1.2.3" not in sight.state(ALL).model_dump_json()


async def test_plan_and_shape_are_solved_once_for_a_swarm_that_stays(watched: Watched) -> None:
    await watched.look()
    for _ in range(2):
        await until(lambda: watched.lookout._plan.value is not None and watched.lookout._shape.value is not None)
        sight = await watched.look(60.0)
    assert watched.engine.plans == 1
    assert sight.plan is not None
    assert sight.shape is not None
    assert [stage.blocks for stage in sight.plan.stages][-1][1] == 4
    assert sight.plan.gap >= 0
    assert len(sight.shape.clusters) == 3
    watched.show(nodeC=False)
    for _ in range(3):
        await watched.look(60.0)
    await until(lambda: watched.engine.plans == 2)


async def test_no_plan_says_why(watched: Watched) -> None:
    show(watched.engine, [])
    await watched.look()
    await until(lambda: watched.lookout._plan.value is not None)
    sight = await watched.look()
    assert sight.plan is not None
    assert sight.plan.trouble
    assert sight.shape is None
    assert sight.swarm.missing == [(0, 4)]


async def test_a_node_that_does_not_answer_is_lost_and_shown_for_a_while(watched: Watched) -> None:
    await watched.look()
    watched.show(nodeB=False)
    assert conditions(await watched.look(1.0))["nodeB"] == "silent"
    sight = await watched.look(LOST_S)
    assert conditions(sight)["nodeB"] == "lost"
    assert told(sight) == ["node nodeB is lost, with blocks 2:4"]
    watched.engine.statuses = watched.engine.statuses[:1]
    sight = await watched.look(1.0)
    assert (conditions(sight)["nodeB"], conditions(sight)["nodeC"]) == ("lost", "silent")
    watched.show()
    assert told(await watched.look(1.0))[-1] == "node nodeB is back"
    watched.engine.statuses = watched.engine.statuses[:1]
    await watched.look(1.0)
    sight = await watched.look(FORGET_S)
    assert conditions(sight) == {"nodeA": "serving"}


async def test_a_node_that_leaves_is_not_lost(watched: Watched) -> None:
    await watched.look()
    watched.engine.statuses[2] = node_status("nodeC", HIGH, state="leaving")
    assert conditions(await watched.look())["nodeC"] == "leaving"
    watched.engine.statuses.pop()
    sight = await watched.look()
    assert "nodeC" not in conditions(sight)
    assert told(sight) == ["node nodeC has left"]
    watched.engine.statuses.append(node_status("nodeD", HIGH, answers=False, state="joining"))
    sight = await watched.look()
    assert conditions(sight)["nodeD"] == "joining"
    assert told(sight)[-1] == "node nodeD has joined with blocks 2:4"


async def test_a_node_that_moves_serves_what_it_held_as_well(watched: Watched) -> None:
    moving = node_status("nodeA", LOW)
    record = msgspec.structs.replace(moving.record, others=((2, 4),))
    show(watched.engine, [replace(moving, record=record)])
    swarm = (await watched.look()).swarm
    assert (swarm.nodes[0].blocks, swarm.missing) == ([(0, 2), (2, 4)], [])


async def test_rates(watched: Watched) -> None:
    stats = Stats()
    with watched.running.under_way("ann", stats):
        await watched.look()
        stats.tokens = 20
        watched.engine.statuses[0] = node_status("nodeA", LOW, rows=40, waiting=2)
        sight = await watched.look(2.0)
    assert sight.swarm.tokens_per_s == 10.0
    assert (sight.swarm.nodes[0].rows_per_s, sight.swarm.nodes[0].waiting) == (20.0, 2)
    assert watched.running.tokens == 20
    assert not watched.running.answers


@pytest.mark.parametrize("lie", [math.nan, math.inf, -1e300, 1e300])
async def test_a_node_that_lies_about_its_figures_blinds_nobody(watched: Watched, lie: float) -> None:
    await watched.look()
    told = watched.engine.statuses[0].now
    assert told is not None
    lying = msgspec.structs.replace(told, block_time_s=lie, rows=2**63 - 1, waiting=-(2**63), cache_tokens_left=-1)
    watched.engine.statuses[0] = replace(watched.engine.statuses[0], now=lying)
    sight = await watched.look(2.0)
    shown = json.loads(sight.swarm_json, parse_constant=pytest.fail)
    assert len(shown["nodes"]) == len(watched.engine.statuses)
    assert shown["missing"] == []


async def test_everybody_sees_their_own_answers_alone(watched: Watched) -> None:
    with (
        watched.running.under_way("ann", Stats(route=through("nodeA", "nodeB"), tokens=7)),
        watched.running.under_way("bob", Stats(route=through("nodeA", "nodeC"))),
    ):
        sight = await watched.look()
        for viewer, seen in ((ANN, [True, False]), (BOB, [True, False]), (ALL, [True, True]), (PUBLIC, [False, False])):
            sessions = sight.sessions_of(viewer)
            assert [session.route is not None for session in sessions] == seen
            hidden = [session for session, shown in zip(sessions, seen, strict=True) if not shown]
            assert all(session.tokens is session.tokens_per_s is session.age_s is None for session in hidden)
        own = sight.sessions_of(ANN)[0]
        assert own.route is not None
        assert ([(hop.node, hop.blocks) for hop in own.route], own.tokens) == (
            [("nodeA", (0, 2)), ("nodeB", (2, 4))],
            7,
        )
        assert sight.sessions_of(BOB)[0].id != own.id


async def test_a_repair_is_told_once_and_only_its_owner_hears_of_the_way(watched: Watched) -> None:
    stats = Stats(route=through("nodeA", "nodeB"))
    with watched.running.under_way("ann", stats):
        await watched.look()
        watched.engine.repairs = 4  # the route shows with the next token
        assert told(await watched.look()) == []
        stats.route = through("nodeA", "nodeC")
        for _ in range(6):
            sight = await watched.look()
        (session,) = sight.sessions_of(ANN)
        assert told(sight, ANN) == [f"answer {session.id} goes on: nodeC (2:4) in place of nodeB"]
        assert told(sight, BOB) == ["a lost stage of an answer was replaced"]
        watched.engine.repairs = 5  # of an answer that ended before it was seen
        for _ in range(6):
            sight = await watched.look()
        assert told(sight, ANN)[1:] == ["a lost stage of an answer was replaced"]


async def test_many_watchers_are_one_look(watched: Watched) -> None:
    sights = await asyncio.gather(*(watched.lookout.sight() for _ in range(50)))
    assert watched.engine.looks == 1
    assert len({id(sight) for sight in sights}) == 1
    assert dict(parts(sights[0], ALL))["swarm"] is dict(parts(sights[0], ANN))["swarm"]
    watched.now_s += 1.0
    later = await asyncio.gather(*(watched.lookout.sight(0) for _ in range(50)))
    assert (watched.engine.looks, later[0].number) == (2, 1)


async def test_a_large_swarm_is_looked_at_less_often_and_not_shown_whole(watched: Watched) -> None:
    show(watched.engine, [node_status(f"node{n:04}", LOW) for n in range(450)])
    sight = await watched.look()
    assert watched.lookout.every_s == 4.5
    assert len(sight.swarm.nodes) + sight.swarm.nodes_not_shown == 450
    assert len(sight.swarm.nodes) == 200


async def test_the_state_endpoint(engine: ScriptedEngine, grammars: Grammars) -> None:
    show(engine, [node_status("nodeA", BlockRange(0, 4))])
    engine.stands.clear()
    engine.route = (Hop(PeerId("nodeA"), BlockRange(0, 4), ()),)
    async with client_of(engine, grammars, Settings(local_only=True)) as http, asyncio.TaskGroup() as group:
        group.create_task(http.post("/v1/chat/completions", json=chat()))
        async with asyncio.timeout(10):
            state: dict[str, Any] = {"sessions": []}
            while not state["sessions"]:
                await asyncio.sleep(0.05)
                state = (await http.get("/dashboard/state")).json()
        engine.stands.set()
    assert set(state) == {"swarm", "sessions", "events", "plan", "shape"}
    (session,) = state["sessions"]
    assert session["route"] == [{"node": "nodeA", "blocks": [0, 4]}]


async def test_a_swarm_that_does_not_answer(http: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.fails = PeerLost("the directory at 10.1.2.3 is gone")
    said = await http.get("/dashboard/state")
    assert said.status_code == 503
    assert "10.1.2.3" not in said.text
    streamed = await http.get("/dashboard/events")
    assert "event: trouble" in streamed.text
    assert "10.1.2.3" not in streamed.text


async def test_only_this_machine(engine: ScriptedEngine, grammars: Grammars) -> None:
    async with client_of(engine, grammars, Settings(local_only=True)) as http:
        for path in ("/", "/dashboard/state", "/dashboard/events", "/dashboard/main.js"):
            assert (await http.get(path, headers={"host": "evil.example"})).status_code == 403
        assert (await http.get("/")).status_code == 200


@pytest.fixture
async def keyed(
    engine: ScriptedEngine, grammars: Grammars, tmp_path: Path
) -> AsyncIterator[tuple[Any, dict[str, str]]]:
    keys = tmp_path / "keys.json"
    words = {name: add_key(keys, name, Allowance()) for name in ("ann", "bob")}
    async with client_of(engine, grammars, Settings(KeyRing(keys))) as http:
        yield http, words


async def test_a_key_is_wanted_where_there_are_some(keyed: tuple[httpx.AsyncClient, dict[str, str]]) -> None:
    http, words = keyed
    for path in ("/dashboard/state", "/dashboard/events"):
        assert (await http.get(path)).status_code == 401
    for path in ("/", "/dashboard/main.js", "/dashboard/style.css"):
        assert (await http.get(path)).status_code == 200
    headers = {"authorization": f"Bearer {words['ann']}"}
    assert (await http.get("/dashboard/state", headers=headers)).status_code == 200


async def test_watchers_are_bounded_and_their_places_come_back(engine: ScriptedEngine, tmp_path: Path) -> None:
    add_key(tmp_path / "keys.json", "ann")
    watching = Dashboard(Lookout(engine, RunningAnswers()), Settings(KeyRing(tmp_path / "keys.json")), asyncio.Event())
    with contextlib.ExitStack() as stack:
        for _ in range(MOST_OF_A_KEY):
            stack.enter_context(watching._place("ann"))
        with pytest.raises(ApiError), watching._place("ann"):
            pass
        with watching._place("bob"):
            assert watching._streams == {"ann": MOST_OF_A_KEY, "bob": 1}
    assert not watching._streams


async def test_the_stream_tells_what_changed(engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "STREAM_LOOKS", 3)
    show(engine, [node_status("nodeA", BlockRange(0, 4))])
    lookout = Lookout(engine, RunningAnswers(), every_s=0.01, solve_every_s=60.0)
    events = [event async for event in Dashboard(lookout, Settings(), asyncio.Event())._events(ALL)]
    names = [event["event"] for event in events]
    assert names[:3] == ["swarm", "sessions", "happened"]
    assert names.count("happened") == 1
    assert json.loads(events[0]["data"])["nodes"][0]["name"] == "nodeA"


async def test_the_page_is_confined_and_complete(http: httpx.AsyncClient) -> None:
    """Everything it names is there, nothing is from elsewhere, and no script makes markup of text."""
    page = await http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for word in re.findall(r'(?:src|href)="([^"#]+)"', page.text):
        assert word.startswith("/dashboard/")
        found = await http.get(word)
        assert found.status_code == 200, word
        assert found.headers["x-content-type-options"] == "nosniff"
    scripts = [file for file in (resources.files("bsns.gateway") / "site").iterdir() if file.name.endswith(".js")]
    for file in scripts:
        text = file.read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|style=", text), file.name
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), file.name
        for name in re.findall(r'from "\./([\w.]+)"', text):
            assert (await http.get(f"/dashboard/{name}")).status_code == 200
    assert len(scripts) >= 5
