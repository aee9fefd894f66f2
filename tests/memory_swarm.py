"""A swarm inside one process: real workers and a real client over the memory transport, for tests of any part."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from running_time import running_s

from bsns.client.finding import ChooseCodec, FindRoute
from bsns.client.generate import Generator
from bsns.client.sampling import SamplingOptions
from bsns.client.speculation import Guesser
from bsns.client.tracing import Tracer
from bsns.core.blocks import BlockRange
from bsns.core.ids import ModelId, PeerId
from bsns.model.ends import Ends
from bsns.model.stage import Stage
from bsns.node.view import View
from bsns.protocol.codecs import RAW
from bsns.protocol.records import NodeRecord
from bsns.routing.chain import Hop, Route
from bsns.swarm.directory import MemoryDirectory
from bsns.transport.memory import MemoryNetwork, MemoryTransport
from bsns.worker.executor import Executor
from bsns.worker.service import Worker
from bsns.worker.sessions import SessionTable
from bsns.worker.torch_executor import TorchExecutor
from bsns.worker.tracing import StageTracer

MODEL = ModelId("model-under-test")


class Letters:
    """A tokenizer that says each token as one letter."""

    def decode(self, token_ids: list[int], **_: Any) -> str:
        return "".join(chr(ord("A") + token % 26) for token in token_ids)


class StubPrompts:
    """What a Generator needs of `Prompts` when prompts are tokens already and no token ends an answer."""

    tokenizer = Letters()
    has_chat_template = False

    def __init__(self, end_tokens: Collection[int] = ()) -> None:
        self.end_tokens = frozenset(end_tokens)


@dataclass
class Node:
    """A worker and its place in the network."""

    worker: Worker
    transport: MemoryTransport

    @property
    def hop(self) -> Hop:
        return Hop(self.transport.peer, self.worker.sessions.ranges[0], self.transport.addresses)


@dataclass
class MemorySwarm:
    """Workers, a directory that names them, and clients."""

    network: MemoryNetwork = field(default_factory=MemoryNetwork)
    directory: MemoryDirectory = field(default_factory=MemoryDirectory)
    nodes: dict[str, Node] = field(default_factory=dict)
    clients: list[tuple[Generator, MemoryTransport]] = field(default_factory=list)
    views: list[View] = field(default_factory=list)

    async def add_node(
        self,
        name: str,
        executor: Executor,
        *,
        block_count: int,
        cache_tokens: int = 4096,
        context_tokens: int = 256,
        block_time_s: float = 1e-3,
        kind: type[Worker] = Worker,
        tracer: StageTracer | None = None,
        **limits: Any,
    ) -> Node:
        """Start a worker and announce it."""
        transport = self.network.transport(name)
        sessions = SessionTable(
            model=MODEL,
            held=executor.blocks,
            dtype=executor.dtype,
            cache_tokens=cache_tokens,
            context_tokens=context_tokens,
            **limits,
        )
        worker = kind(executor, sessions, transport.dial, block_time_s=1e-3, rss_bytes=lambda: 1, tracer=tracer)
        await transport.listen(worker.serve)
        node = self.nodes[name] = Node(worker, transport)
        now_s = time.time()
        record = NodeRecord(
            peer=transport.peer,
            addresses=transport.addresses,
            model=MODEL,
            model_name="tiny",
            block_count=block_count,
            start=executor.blocks.start,
            end=executor.blocks.end,
            state="serving",
            device="cpu",
            dtype=executor.dtype,
            executor=executor.name,
            threads=1,
            cache_tokens=cache_tokens,
            cache_tokens_left=cache_tokens,
            block_time_s=block_time_s,
            rss_bytes=1,
            version="0",
            started_s=now_s,
            expires_s=now_s + 3600,
        )
        await self.directory.publish(record)
        return node

    async def add_stages(self, stages: Sequence[Stage], *, block_count: int, **options: Any) -> None:
        """A node for each stage, called node-0, node-1, …"""
        for stage in stages:
            executor = TorchExecutor(stage, dtype=str(stage.dtype).removeprefix("torch."))
            await self.add_node(f"node-{len(self.nodes)}", executor, block_count=block_count, **options)

    def client(
        self,
        ends: Ends,
        *,
        route: Route | None = None,
        context_tokens: int = 256,
        deadline_s: float = 20.0,
        end_tokens: Collection[int] = (),
        name: str | None = None,
        warm_spares: bool = False,
        choose_codec: ChooseCodec = lambda sender, receiver: RAW,
        guesser: Callable[[], Guesser] | None = None,
        keep_sessions: int = 0,
        tracer: Tracer | None = None,
    ) -> Generator:
        """A client that finds its routes in the directory, or always takes `route`."""
        dtype = str(ends.dtype).removeprefix("torch.")
        transport = self.network.transport(name or f"client-{len(self.clients)}")
        view = View(self.directory, MODEL, dtype)

        self.views.append(view)

        async def find_route(
            needed_tokens: int, avoid: Collection[PeerId], blocks: BlockRange | None, fresh: bool
        ) -> Route:
            if route is not None and blocks is None:
                return route
            return await view.route(generator.links, needed_tokens, avoid, blocks, fresh)

        find: FindRoute = find_route
        generator = Generator(
            ends,
            StubPrompts(end_tokens),  # type: ignore[arg-type]
            transport.dial,
            find,
            model=MODEL,
            dtype=dtype,
            context_tokens=context_tokens,
            deadline_s=deadline_s,
            choose_codec=choose_codec,
            release=view.release if route is None else lambda route: None,
            blame=view.blame,
            warm_spares=warm_spares,
            guesser=guesser,
            keep_sessions=keep_sessions,
            claim=view.claim if route is None else lambda route: None,
            tracer=tracer,
        )
        self.clients.append((generator, transport))
        return generator

    async def close(self) -> None:
        for generator, transport in self.clients:
            await generator.close()
            await transport.close()
        for node in self.nodes.values():
            await node.worker.close()
            await node.transport.close()


class StageShelf:
    """Loaded stages and ends, each loaded once."""

    def __init__(self) -> None:
        self._stages: dict[tuple[Path, BlockRange, str], Stage] = {}
        self._ends: dict[tuple[Path, str], Ends] = {}

    def stages(self, path: Path, cuts: Sequence[int], dtype: str = "float32") -> list[Stage]:
        """Stages over `cuts`: (0, 1, 3) makes 0:1 and 1:3."""
        return [self.stage(path, BlockRange(start, end), dtype) for start, end in itertools.pairwise(cuts)]

    def stage(self, path: Path, blocks: BlockRange, dtype: str = "float32") -> Stage:
        key = (path, blocks, dtype)
        if key not in self._stages:
            self._stages[key] = Stage(path, blocks, dtype=dtype)
        return self._stages[key]

    def clear(self) -> None:
        self._stages.clear()
        self._ends.clear()

    def ends(self, path: Path, dtype: str = "float32") -> Ends:
        if (path, dtype) not in self._ends:
            self._ends[path, dtype] = Ends(path, dtype=dtype)
        return self._ends[path, dtype]


async def answer(client: Generator, tokens: Sequence[int], options: SamplingOptions) -> list[int]:
    """The tokens of a streamed answer."""
    return [piece.token async for piece in client.stream(tokens, options) if piece.token is not None]


async def until(condition: Callable[[], bool], deadline_s: float = 5.0) -> None:
    """Wait for it, turn by turn of the loop; fail after the deadline."""
    give_up_s = running_s() + deadline_s
    while not condition():
        assert running_s() < give_up_s, "it did not come about"
        await asyncio.sleep(0.001)
