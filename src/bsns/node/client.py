"""The public face for those who use a swarm: generate text, look at the nodes.

async with bsns.Client(invite) as client:
    async for text in client.generate("What is the capital of France?"):
        print(text, end="")
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import torch

from bsns.client.generate import Generator
from bsns.client.pieces import Piece, Stats
from bsns.client.prompts import Prompts
from bsns.client.sampling import Constraint, SamplingOptions
from bsns.client.speculation import Guesser, Lookup
from bsns.client.tracing import Tracer
from bsns.core.blocks import BlockRange, missing_blocks
from bsns.core.errors import BadOption, MissingBlocks
from bsns.core.ids import PeerId
from bsns.model.source import SMOLLM2, ModelSource, resolve
from bsns.node.draft import Draft
from bsns.node.ends import head_weights, load_ends
from bsns.node.peer import Peer
from bsns.node.view import NodeStatus, View
from bsns.node.wires import AUTO, Wires, check_wire
from bsns.planning.selection import Weights
from bsns.protocol.records import NodeRecord
from bsns.protocol.tensors import DTYPE_BYTES
from bsns.routing.chain import Aim, Route, Wish

Prompt = str | Sequence[Mapping[str, str]]
"""A user's message, or a conversation: messages with `role` and `content`."""
T = TypeVar("T")


class Client:
    """Uses a swarm. Tokenizer, embedding and head stay in this process: nodes see activations, never text."""

    def __init__(
        self,
        invite: str,
        model: str = SMOLLM2,
        *,
        dtype: str = "auto",
        device: str = "cpu",
        threads: int = 1,
        deadline_s: float = 20.0,
        objective: Aim = "latency",
        weights: Weights | str | None = None,
        warm_spares: bool = False,
        wire: str = AUTO,
        speculate: bool = True,
        draft: str | None = None,
        keep_sessions: int = 16,
        tracer: Tracer | None = None,
    ) -> None:
        """`dtype="auto"` takes what the nodes compute in; `deadline_s` bounds every wait for the swarm.

        Routes are the fastest for one token, or with `objective="throughput"` those whose slowest stage is fastest, or
        what `weights` pick (planning.selection): "cheap", "latency=1,price=0.5".

        With `warm_spares` other nodes, where there are such, compute every stage along, so that a lost one is replaced
        at once: that takes as much computing and cache again.

        `wire`: the codec of activations on their way (node.wires): `auto` takes int8 on ways where that is faster and
        the numbers as they are on others. Raises BadOption.

        `speculate`: guesses at the next tokens are checked along with each, where that saves time (client.speculation);
        answers are the same. `draft` names a small model with the same tokens, which guesses in this process
        (node.draft). `keep_sessions`: what nodes hold of so many answers stays there, as long as there is room,
        for prompts that go on where they ended. `tracer` is told of every answer (client.tracing).
        """
        self._invite = invite
        self._model = model
        self._dtype = dtype
        self._device = device
        self._threads = threads
        self._deadline_s = deadline_s
        self._wish = Wish(objective, Weights.parse(weights) if isinstance(weights, str) else weights)
        self._warm_spares = warm_spares
        check_wire(wire)
        self._wire = wire
        if draft is not None and not speculate:
            raise BadOption("a draft model guesses: leave out either --draft or --no-speculate")
        self._speculate = speculate
        self._draft = draft
        self._keep_sessions = keep_sessions
        self._tracer = tracer
        self._measuring: asyncio.Task[None] | None = None
        self._peer: Peer | None = None
        self._owns_peer = True
        self._source: ModelSource | None = None
        self._view: View | None = None
        self._generator: Generator | None = None

    @classmethod
    def on(cls, peer: Peer, source: ModelSource, **options: Any) -> Client:
        """A client, with the options of one, in a process that is a member of the swarm already; closing it leaves the
        peer running."""
        client = cls(peer.invite, source.name, **options)
        client._peer, client._owns_peer, client._source = peer, False, source
        return client

    async def __aenter__(self) -> Client:
        """Raises InviteInvalid, InviteExpired, NoSuchSwarm, ModelNotFound, CorruptModel, MissingBlocks, …"""
        try:
            await self._connect()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def generate(self, prompt: Prompt, *, raw: bool = False, **sampling: Any) -> AsyncGenerator[str, None]:
        """The answer's text as it comes. `sampling`: the fields of SamplingOptions; `raw` skips the chat template."""
        async with contextlib.aclosing(self.stream(prompt, SamplingOptions(**sampling), raw=raw)) as pieces:
            async for piece in pieces:
                if piece.text:
                    yield piece.text

    async def stream(
        self,
        prompt: Prompt,
        options: SamplingOptions,
        *,
        raw: bool = False,
        stats: Stats | None = None,
        constraint: Constraint | None = None,
        guess: bool = True,
        tenant: str = "",
    ) -> AsyncGenerator[Piece, None]:
        """As `generate`, token by token, with why the answer ended and what it cost. `guess=False` guesses nothing;
        what nodes hold of a `tenant`'s answers serves no other's."""
        tokens = self.tokens(prompt, raw=raw)
        pieces = self.generator.stream(tokens, options, stats, constraint, guess=guess, tenant=tenant)
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                yield piece

    def tokens(self, prompt: Prompt, *, raw: bool = False) -> list[int]:
        """The prompt as the model reads it: through the chat template if there is one, unless `raw`."""
        prompts = self.generator.prompts
        if isinstance(prompt, str):
            if not prompt:
                raise BadOption("the prompt is empty; give some text")
            if raw or not prompts.has_chat_template:
                return prompts.encode(prompt)
            prompt = [{"role": "user", "content": prompt}]
        if raw:
            raise BadOption("a conversation needs the chat template; give plain text with raw")
        return prompts.encode_chat(prompt)

    def logits(self, tokens: Sequence[int], start: int = 0) -> AsyncIterator[torch.Tensor]:
        """Logits (rows, vocabulary) for every position of a text from `start` on, chunk by chunk."""
        return self.generator.logits(tokens, start)

    def forgive(self, peers: Collection[PeerId]) -> None:
        """Choose these again, whether they failed lately or not."""
        self.view.forgive(peers)

    async def status(self, deadline_s: float | None = None) -> list[NodeStatus]:
        """Every node that serves the model, as announced and as it answers now, if it does within `deadline_s`."""
        return await self.view.status(self.generator.links, deadline_s)

    @property
    def generator(self) -> Generator:
        if self._generator is None:
            raise RuntimeError("use `async with bsns.Client(…) as client`")
        return self._generator

    @property
    def view(self) -> View:
        if self._view is None:
            raise RuntimeError("use `async with bsns.Client(…) as client`")
        return self._view

    @property
    def source(self) -> ModelSource:
        if self._source is None:
            raise RuntimeError("use `async with bsns.Client(…) as client`")
        return self._source

    async def close(self) -> None:
        """Free every session on every node and leave the swarm."""
        if self._measuring is not None:
            self._measuring.cancel()
            await asyncio.gather(self._measuring, return_exceptions=True)
            self._measuring = None
        if self._generator is not None:
            await self._generator.close()
            self._generator = None
        if self._peer is not None and self._owns_peer:
            await self._peer.close()
            self._peer = None

    async def _connect(self) -> None:
        if self._source is None:
            self._source = await asyncio.to_thread(resolve, self._model)
        source = self._source
        if self._peer is None:
            self._peer = await Peer.join(self._invite, None)
        view = View(self._peer.directory, source.model_id, None, source.block_count)
        records = [record for record in await view.records() if record.state == "serving"]
        dtype = self._choose_dtype(records)
        load = partial(load_ends, source, dtype=dtype, weights=head_weights(records, dtype))
        ends, prompts = await asyncio.gather(
            asyncio.to_thread(load, device=self._device, threads=self._threads),
            asyncio.to_thread(Prompts, source.path),
        )
        guesser: Callable[[], Guesser] | None = Lookup if self._speculate else None
        if self._draft is not None:
            guesser = (await asyncio.to_thread(self._load_draft, self._draft, prompts, dtype)).guesser
        wish = replace(self._wish, hop_bytes=source.hidden_size * DTYPE_BYTES[dtype])
        self._view = view = View(self._peer.directory, source.model_id, dtype, source.block_count, wish=wish)

        wires = Wires(
            self._wire,
            view,
            self._peer.id,
            self._peer.dial,
            self._peer.clock,
            dtype=dtype,
            columns=source.hidden_size,
        )

        async def find_route(
            needed_tokens: int, avoid: Collection[PeerId], blocks: BlockRange | None, fresh: bool
        ) -> Route:
            return await view.route(self.generator.links, needed_tokens, avoid, blocks, fresh)

        self._generator = Generator(
            ends,
            prompts,
            self._peer.dial,
            find_route,
            model=source.model_id,
            dtype=dtype,
            context_tokens=source.context_tokens,
            threads=self._threads,
            deadline_s=self._deadline_s,
            choose_codec=wires.choose,
            release=view.release,
            blame=view.blame,
            warm_spares=self._warm_spares,
            guesser=guesser,
            keep_sessions=self._keep_sessions,
            claim=view.claim,
            tracer=self._tracer,
        )
        self._measuring = asyncio.create_task(wires.run())

    def _load_draft(self, name: str, prompts: Prompts, dtype: str) -> Draft:
        return Draft(resolve(name), prompts, dtype=dtype, threads=self._threads)

    def _choose_dtype(self, records: Sequence[NodeRecord]) -> str:
        """The dtype whose nodes cover the model. Raises MissingBlocks, naming what is missing."""
        gaps: tuple[BlockRange, ...] = (BlockRange(0, self.source.block_count),)
        for dtype in sorted({r.dtype for r in records} if self._dtype == "auto" else {self._dtype}):
            gaps = missing_blocks(
                (blocks for r in records if r.dtype == dtype for blocks in r.ranges), self.source.block_count
            )
            if not gaps:
                return dtype
        missing = ", ".join(map(str, gaps))
        raise MissingBlocks(
            f"nobody serves blocks {missing} of {self.source.name}; start a node with "
            f"bsns serve {self._model} --blocks {gaps[0]} --join INVITE"
        )


class SyncClient:
    """The same for programs without an event loop: it runs one in a thread of its own.

    with bsns.SyncClient(invite) as client:
        for text in client.generate("…"): …
    """

    def __init__(self, invite: str, model: str = SMOLLM2, **options: Any) -> None:
        self._client = Client(invite, model, **options)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="bsns", daemon=True)

    def __enter__(self) -> SyncClient:
        self._thread.start()
        try:
            self._run(self._client.__aenter__())
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._run(self._client.close())
        finally:
            self._stop()

    def generate(self, prompt: Prompt, *, raw: bool = False, **sampling: Any) -> Iterator[str]:
        """See Client.generate."""
        pieces = self._client.generate(prompt, raw=raw, **sampling)
        try:
            while (text := self._run(_next(pieces))) is not None:
                yield text
        finally:
            if self._thread.is_alive():
                self._run(pieces.aclose())

    def status(self) -> list[NodeStatus]:
        """See Client.status."""
        nodes: list[NodeStatus] = self._run(self._client.status())
        return nodes

    def _run(self, coroutine: Any) -> Any:
        if not self._thread.is_alive():  # nobody would ever answer
            coroutine.close()
            raise RuntimeError("use `with bsns.SyncClient(…) as client`")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _next(pieces: AsyncIterator[str]) -> str | None:
    return await anext(pieces, None)


__all__ = ["Client", "NodeStatus", "SyncClient"]
