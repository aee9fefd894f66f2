"""A stage in conversation: takes steps from clients and neighbours, runs them in batches, passes them on."""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import structlog

from bsns.core.blocks import BlockRange
from bsns.core.errors import (
    BadFrame,
    BadTensor,
    BsnsError,
    PeerFailed,
    PeerLeaving,
    PeerLost,
    PositionGap,
    ProtocolError,
)
from bsns.core.ids import PeerId, SessionId
from bsns.core.memory import MemoryUse
from bsns.protocol.codecs import CODECS, RAW, coded
from bsns.protocol.frames import Buffer, Message
from bsns.protocol.greeting import Refusal
from bsns.protocol.inference import (
    MAX_PARTS,
    Close,
    Closed,
    Describe,
    Description,
    Failure,
    Mirror,
    Mirrored,
    Open,
    Opened,
    Part,
    Passed,
    Ping,
    Pong,
    Reroute,
    Rerouted,
    Resize,
    Resized,
    Result,
    Step,
    There,
    Where,
)
from bsns.protocol.probing import MAX_PROBE_BYTES, Probe, Probed
from bsns.swarm.allowances import ProbeLimiter
from bsns.transport.clock import MACHINE_CLOCK, Clock
from bsns.transport.port import Dial, Stream
from bsns.worker.batching import Batch, Batcher, Work
from bsns.worker.calibration import time_blocks
from bsns.worker.clients import Clients, post, report
from bsns.worker.coding import run_coded
from bsns.worker.executor import Executor
from bsns.worker.journal import Journal
from bsns.worker.relay import Relay
from bsns.worker.replays import Answer, Replays
from bsns.worker.sessions import Session, SessionTable
from bsns.worker.speed import Speed
from bsns.worker.tally import Tally
from bsns.worker.tracing import StageTrace, StageTracer

log = structlog.get_logger(__name__)

Outputs = list[Buffer | BsnsError]
SHORT_S = 0.05
"""Such batches are run on the event loop: handing them to the thread and back costs 0.13 ms a hop."""
BUSY_S = 1.0
SWEEP_S = 5.0
"""How often idle sessions are looked for."""
REST_S = 60.0
"""A node that has computed nothing for so long measures how fast it is: nobody comes to one that says it is slow."""


class Worker:
    """A node's ranges: their sessions, their waiting steps, and what computes them.

    A node that moves takes on its new range, and drops the old one when its last session has ended.

    One batch runs at a time: a short one on the event loop itself, a long one on a thread, so that the node goes on
    answering its peers meanwhile.
    """

    def __init__(
        self,
        executor: Executor,
        sessions: SessionTable,
        dial: Dial,
        *,
        block_time_s: float,
        rss_bytes: Callable[[], int],
        memory: Callable[[SessionTable], MemoryUse] = lambda _: MemoryUse(),
        clock: Clock = MACHINE_CLOCK,
        short_s: float = SHORT_S,
        tracer: StageTracer | None = None,
    ) -> None:
        """`memory` reckons what the weights and caches take; batches expected to take less than `short_s` are run on
        the event loop."""
        self._executors = {executor.blocks: executor}
        self._hidden_size, self._dtype = executor.hidden_size, executor.dtype
        self._blocks = executor.blocks
        self.sessions = sessions
        sessions.evicted = self._free
        self._relay = Relay(dial, self._on_next_failure, self._on_next_lost)
        self._batcher = Batcher()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._busy = self._closed = False
        self._clients = Clients(sessions)
        self._tasks: dict[asyncio.Task[None], None] = {}  # in order, so that they end in order
        self._reaching: dict[SessionId, asyncio.Task[None]] = {}
        self.tally = Tally()
        self._replays = Replays(
            self._relay,
            self._spawn,
            self._clients.report,
            dtype=self._dtype,
            hidden_size=self._hidden_size,
            tally=self.tally,
        )
        self._rss_bytes, self._memory = rss_bytes, memory
        self._now_s = clock.now_s
        self._short_s = short_s
        self._tracer = tracer
        self._traces: dict[SessionId, StageTrace] = {}
        self._probes = ProbeLimiter()
        self._worked_s = -math.inf
        self._measured_s = self._now_s()
        self._speed = Speed(block_time_s)
        self._loop = asyncio.get_running_loop()
        self._spawn(self._sweep())

    async def serve(self, stream: Stream) -> None:
        """Talk with one admitted peer until its stream ends; then free whatever it had opened."""
        try:
            await stream.each(lambda message, buffers: self._answer(stream, message, buffers))
        except PeerLost:
            return
        except ProtocolError as error:
            log.warning("peer broke the protocol", peer=stream.peer, error=error.message)
            post(stream, Refusal(error.code, error.message))
            for held in self.sessions.onward_from(stream.peer):  # its client has to know which of us it was
                self._clients.report(held, error.about(stream.peer))
        finally:
            for session in self._clients.left(stream):
                self._free(session)

    @property
    def block_time_s(self) -> float:
        """What a block takes for a single token: the median of what it took lately."""
        return self._speed.block_time_s

    @block_time_s.setter
    def block_time_s(self, seconds: float) -> None:
        self._speed.set(seconds)

    @property
    def steps(self) -> int:
        return self.tally.steps

    @property
    def rows(self) -> int:
        return self.tally.rows

    @property
    def waiting_steps(self) -> int:
        return len(self._batcher)

    @property
    def replays(self) -> int:
        """Replays and mirrors that are under way."""
        return len(self._replays)

    @property
    def memory(self) -> MemoryUse:
        return self._memory(self.sessions)

    def description(self) -> Description:
        return Description(
            start=self._blocks.start,
            end=self._blocks.end,
            sessions=len(self.sessions),
            cache_tokens=self.sessions.cache_tokens,
            cache_tokens_left=self.sessions.cache_tokens_left,
            block_time_s=self.block_time_s,
            rss_bytes=self._rss_bytes(),
            steps=self.steps,
            rows=self.rows,
            memory=self.memory,
            waiting=len(self._batcher),
        )

    def take_on(self, executor: Executor) -> None:
        """Serve a further range, of the same model in the same dtype; new sessions prefer it."""
        assert (executor.hidden_size, executor.dtype) == (self._hidden_size, self._dtype)
        assert executor.blocks not in self._executors
        self._executors[executor.blocks] = executor
        self.prefer(executor.blocks)

    def prefer(self, blocks: BlockRange) -> None:
        """Let new sessions run on this of our ranges where they can, whether it drained before or not."""
        self.sessions.hold(blocks)
        self._blocks = blocks

    def drop(self, blocks: BlockRange) -> bool:
        """Give up a range and its memory; False, and nothing happens, while sessions run on it."""
        if not self.sessions.release(blocks):
            return False
        del self._executors[blocks]
        return True

    def leave(self) -> None:
        """Take no new sessions, and tell the clients of those there are that they have to go elsewhere."""
        for blocks in self.sessions.ranges:
            self.sessions.drain(blocks)
        error = PeerLeaving("this node is about to leave")
        for session in self.sessions.all():
            self._clients.report(session, error)

    def busy(self) -> bool:
        """Whether it computes, or did within the last second: a stage between two steps of a stream is not idle."""
        return self._busy or self._now_s() - self._worked_s < BUSY_S

    async def close(self) -> None:
        """Stop computing and close every stream to neighbours."""
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        for session in list(self._traces):
            self._end_trace(session)
        await self._relay.close()
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)

    def _answer(self, stream: Stream, message: Message, buffers: Sequence[memoryview]) -> None:
        match message:
            case Step():
                self._accept(stream, message, buffers)
            case Open():
                self._open(stream, message)
            case Reroute():
                self._reroute(stream, message)
            case Mirror():
                self._mirror(stream, message)
            case Resize():
                self._resize(stream, message)
            case Where():
                session = self.sessions.get(message.session)
                ours = session is not None and session.client == stream.peer
                if session is None or not ours:
                    there = There(message.session, -1, -1)
                else:
                    onward = self._relay.sent(session.next)
                    there = There(message.session, session.end, session.done, onward, self.steps)
                post(stream, there)
            case Close():
                if self.sessions.close(message.session, stream.peer):
                    self._free(message.session)
                post(stream, Closed(message.session, self.sessions.cache_tokens_left))
            case Ping():
                post(stream, Pong(message.nonce))
            case Describe():
                post(stream, self.description())
            case Probe():
                post(stream, Probed(message.nonce, self._probe_wait_s(stream.peer, buffers)))
            case _:
                raise BadFrame(f"a stage does not take {type(message).__name__}")

    def _probe_wait_s(self, peer: PeerId, buffers: Sequence[memoryview]) -> float:
        """How long a peer must wait before we take its probe; 0 if it was taken. Raises BadFrame for a flood."""
        size = sum(buffer.nbytes for buffer in buffers)
        if size > MAX_PROBE_BYTES:
            raise BadFrame(f"a probe of {size} bytes; the limit is {MAX_PROBE_BYTES}")
        return self._probes.wait_s(peer, size, self._now_s())

    def _open(self, stream: Stream, message: Open) -> None:
        """Admit a session before the stream's next message or end, so that whoever leaves now has it freed."""
        held = self.sessions.get(message.session)
        if held is not None and held.client == stream.peer and self._clients.opened_elsewhere(held, stream):
            # its client has lost the stream on which it opened this; that we have not heard so yet is nothing to it
            self.sessions.close(held.id, held.client)
            self._free(held.id)
        try:
            session = self.sessions.open(message, stream.peer, self._now_s())
        except BsnsError as error:
            self.tally.refused[error.code] += 1
            report(stream, message.session, error)
            return
        log.info(
            "opened a session",
            session=str(session.id),
            client=stream.peer,
            blocks=str(session.blocks),
            tokens=session.max_tokens,
            next=session.next,
        )
        self._clients.opened(session, stream)
        self._trace(session, message.trace)
        assert session.held is not None
        executor = self._executors[session.held]
        if executor.device != "cpu":
            session.room = session.max_tokens  # there it is taken at once
        executor.open(session.id, session.room)
        if session.next is not None:
            session.journal = Journal(CODECS[session.gives].row_bytes(self._hidden_size, self._dtype))
        self._reach(session, self._connect(stream, session))

    def _reach(self, session: Session, reaching: Coroutine[Any, Any, None]) -> None:
        """Another node for a session; whoever was being dialled for it before is wanted no more."""
        if (before := self._reaching.get(session.id)) is not None:
            before.cancel()
        task = self._reaching[session.id] = self._spawn(reaching)

        def ended(_: asyncio.Task[None]) -> None:
            if self._reaching.get(session.id) is task:
                del self._reaching[session.id]

        task.add_done_callback(ended)

    async def _connect(self, stream: Stream, session: Session) -> None:
        try:
            if session.next is not None:
                await self._relay.connect(session.next, session.next_addresses, session.client)
            post(stream, Opened(session.id, self.sessions.cache_tokens_left))
        except BsnsError as error:
            if self.sessions.get(session.id) is session:
                self.sessions.close(session.id, session.client)
                self._free(session.id)
            report(stream, session.id, error)

    def _resize(self, stream: Stream, message: Resize) -> None:
        """Give a session another reservation."""
        resized = Resized(message.session)
        try:
            self.sessions.change(message, stream.peer, self._now_s())
        except BsnsError as error:
            resized = Resized(message.session, error.code, error.message, error.peer)
        else:
            session = self.sessions.get(message.session)
            self._batcher.drop(message.session)
            if session is not None and session.journal is not None:
                session.journal.cut(message.keep)
            self._end_trace(message.session)
            if message.parked:
                self._replays.end(message.session)
            elif session is not None:
                self._trace(session, message.trace)
        post(stream, resized)

    def _reroute(self, stream: Stream, message: Reroute) -> None:
        """Give a session other neighbours; the next stage may be sent again what it lacks."""
        try:
            session = self.sessions.reroute(message, stream.peer)
        except BsnsError as error:
            post(stream, Rerouted(message.session, error.code, error.message, error.peer))
            return

        def answer(error: BsnsError | None) -> None:
            code, text, about = (error.code, error.message, error.peer) if error is not None else ("", "", None)
            post(stream, Rerouted(session.id, code, text, about))

        onward = message.next_peer
        if message.again and onward is not None:
            session.previous = message.previous_peer
            self._replays.lead(session, onward, message.next_addresses, message.position, answer)
        elif onward != session.next:
            self._reach(session, self._turn(session, message, answer))
        else:
            self._set_neighbours(session, message)
            answer(None)

    async def _turn(self, session: Session, message: Reroute, answer: Answer) -> None:
        """Give a spare another next stage, which it is to know before it is needed."""
        assert message.next_peer is not None
        try:
            await self._relay.connect(message.next_peer, message.next_addresses, session.client)
        except BsnsError as error:
            answer(error.about(message.next_peer))
            return
        session.next, session.next_addresses = message.next_peer, message.next_addresses
        self._set_neighbours(session, message)
        answer(None)

    def _set_neighbours(self, session: Session, message: Reroute) -> None:
        session.previous = message.previous_peer
        if message.passes_from is not None:
            session.passes_from = message.passes_from

    def _mirror(self, stream: Stream, message: Mirror) -> None:
        """Send a spare what the next stage gets, or no longer."""

        def answer(error: BsnsError | None) -> None:
            code, text, about = (error.code, error.message, error.peer) if error is not None else ("", "", None)
            post(stream, Mirrored(message.session, message.peer, code, text, about))

        try:
            session = self.sessions.mirror(message, stream.peer)
        except BsnsError as error:
            answer(error)
            return
        if message.peer is not None:
            self._replays.mirror(session, message.peer, message.addresses, message.position, answer)
        else:
            self._replays.end_mirror(session.id)
            answer(None)

    def _accept(self, stream: Stream, message: Step, buffers: Sequence[memoryview]) -> None:
        """Check every part of a step and let it wait for its batch. Raises BadTensor or BadFrame for a whole frame."""
        if not 1 <= len(message.parts) <= MAX_PARTS or any(part.rows < 1 for part in message.parts):
            raise BadFrame(f"a step of {len(message.parts)} parts; 1 to {MAX_PARTS} of at least a row each are allowed")
        rows = sum(part.rows for part in message.parts)
        hidden, dtype = self._hidden_size, self._dtype
        codec = message.tensors[0].codec if message.tensors else RAW
        if message.tensors != (coded("hidden", dtype, (rows, hidden), codec),):
            raise BadTensor(f"a step carries one tensor 'hidden' of shape ({rows}, {hidden}) in {dtype}")
        row_bytes = CODECS[codec].row_bytes(hidden, dtype)
        now_s = self._now_s()
        offset = 0
        accepted: list[Work] = []
        for part in message.parts:
            try:
                session = self.sessions.step(part, codec, stream.peer, now_s, self._batcher.overwritten(part))
            except BsnsError as error:
                report(self._clients.of_step(part.session, stream), part.session, error)
            else:
                body = buffers[0][offset * row_bytes : (offset + part.rows) * row_bytes]
                accepted.append(Work(session, part, body, now_s))
            offset += part.rows
        for work in accepted:
            if len(accepted) < len(message.parts):  # what was refused shall not stay in memory with what was not
                work.hidden = bytes(work.hidden)
            self._batcher.add(work)
        self.tally.received_bytes[codec] += message.tensors[0].nbytes
        self._loop.call_soon(self._compute)  # not now: frames that lie ready beside this one join its batch

    def _compute(self) -> None:
        """Run the next batch, if none runs and one waits."""
        if self._busy or self._closed or (batch := self._batcher.next_batch(self._now_s())) is None:
            return
        self._busy = True
        held = batch.works[0].session.held
        assert held is not None
        executor = self._executors[held]
        if self._speed.expected_s(len(batch.blocks), batch.rows) < self._short_s:  # otherwise it would be deaf
            self._finish(batch, self._run(executor, batch), self._now_s())
            return

        def run() -> tuple[Outputs | Exception, float]:
            return self._run(executor, batch), self._now_s()

        def finish(running: asyncio.Future[tuple[Outputs | Exception, float]]) -> None:
            if not running.cancelled():
                self._finish(batch, *running.result())

        self._loop.run_in_executor(self._thread, run).add_done_callback(finish)

    def _run(self, executor: Executor, batch: Batch) -> Outputs | Exception:
        try:
            return run_coded(executor, batch)
        except Exception as error:
            sessions = [str(work.part.session) for work in batch.works]
            log.exception("a batch failed", rows=batch.rows, sessions=sessions)
            return error

    def _finish(self, batch: Batch, outputs: Outputs | Exception, finished_s: float) -> None:
        """Hand a batch's outputs on, and let the next one run once the loop has heard what arrived meanwhile."""
        self._busy = False
        self._worked_s = finished_s
        if isinstance(outputs, Exception):
            error = PeerFailed(f"computing blocks {batch.blocks} failed: {type(outputs).__name__}")
            for work in batch.works:
                self._give_up(work.session, error)
        else:
            self._deliver(batch, outputs, finished_s)
        self._loop.call_soon(self._compute)

    def _give_up(self, session: Session, error: BsnsError) -> None:
        """Nobody knows what a session's cache holds now: it has to be opened and replayed."""
        if self.sessions.get(session.id) is not session:
            return  # closed meanwhile: nobody waits for it
        self._clients.report(session, error)
        self.sessions.close(session.id, session.client)
        self._free(session.id)

    def _deliver(self, batch: Batch, outputs: Outputs, finished_s: float) -> None:
        """Send each work's output on: to the next stage, or back to the client that asked."""
        started_s = batch.works[0].started_s
        computed = (finished_s - started_s) * 1e3, batch.rows
        groups: defaultdict[tuple[bool, PeerId, str], list[tuple[Work, Buffer]]] = defaultdict(list)
        for work, output in zip(batch.works, outputs, strict=True):
            if isinstance(output, BsnsError):
                if output.peer is None:
                    self._give_up(work.session, output)
                else:  # what came was wrong: what it left in the cache is overwritten when it comes again
                    self._clients.report(work.session, output)
                continue
            if self.sessions.get(work.part.session) is not work.session:
                continue  # closed meanwhile: nobody waits for it
            onward, part, journal = work.session.next, work.part, work.session.journal
            if journal is not None:
                try:
                    journal.write(part.position, output, part.wanted, part.turn)
                except PositionGap as error:  # it follows a step that was refused, or has been cut off meanwhile
                    log.info("an output is dropped", session=str(part.session), reason=error.message)
                    continue
            work.session.done = part.position + part.rows
            if journal is not None and self._replays.written(work.session, part.position):
                continue
            if part.position + part.rows <= work.session.passes_from:
                continue  # a replay: whoever comes after has it
            groups[(onward is not None, onward or work.session.client, work.session.gives)].append((work, output))
        for (forward, peer, codec), members in groups.items():
            self._pass_on(forward, peer, codec, members, computed)
        # now that the step is on its way
        self.tally.computed(batch, finished_s - started_s)
        if self._traces:
            for work in batch.works:
                if (trace := self._traces.get(work.part.session)) is not None:
                    trace.step(batch, work, finished_s)
        if batch.rows == len(batch.works) == 1:
            self._speed.note([(finished_s - started_s) / len(batch.blocks)])

    def _pass_on(
        self, forward: bool, peer: PeerId, codec: str, members: list[tuple[Work, Buffer]], computed: tuple[float, int]
    ) -> None:
        """`computed`: how many milliseconds the batch took, and its rows."""
        hidden, dtype = self._hidden_size, self._dtype
        row_bytes = CODECS[codec].row_bytes(hidden, dtype)
        sent_s = self._now_s()
        parts: list[Part] = []
        buffers: list[Buffer] = []
        rows = 0
        for work, output in members:
            part = work.part
            hops = (*part.hops, Passed((sent_s - work.arrived_s) * 1e3, *computed))
            known = max(0, work.session.passes_from - part.position)  # rows that whoever comes after has
            wanted = min(part.wanted, part.rows - known)
            parts.append(Part(part.session, part.position + known, part.rows - known, wanted, hops, part.turn))
            keep = part.rows - known if forward else wanted
            rows += keep
            if keep:
                there = part.rows if forward else part.wanted
                buffers.append(output[(there - keep) * row_bytes :])
        tensors = (coded("hidden", dtype, (rows, hidden), codec),)
        sessions = [work.session for work, _ in members]
        try:
            if forward:
                self._relay.post(peer, Step(tuple(parts), tensors), buffers)
            else:
                self._clients.post(peer, Result(tuple(parts), tensors), buffers)
        except BsnsError as error:
            for session in sessions:
                self._clients.report(session, error)
        else:
            self.tally.sent_bytes[codec] += tensors[0].nbytes
        for work, _ in members:
            self.tally.hop_s.add(sent_s - work.arrived_s)

    def _on_next_failure(self, peer: PeerId, failure: Failure) -> None:
        """Tell a session's client that the next stage, or the spare for it, no longer has it; the stream's other
        sessions go on."""
        session = self.sessions.get(failure.session)
        if session is None:
            return
        about = failure.about or peer
        if session.next != peer:
            if session not in self._replays.mirrored_to(peer):
                return
            self._replays.end_mirror(session.id)
            about = peer  # it is alone in what it does
        told = Failure(failure.session, failure.code, failure.message, about)
        self._clients.post(session.client, told)

    def _on_next_lost(self, peer: PeerId) -> None:
        """Tell the clients of every session that went on through a next stage, or a spare for it, that is gone."""
        error = PeerLost(f"the next stage {peer} is gone").about(peer)
        mirrored = self._replays.mirrored_to(peer)
        for session in mirrored:
            self._replays.end_mirror(session.id)
        for session in (*self.sessions.onward_to(peer), *mirrored):
            self._clients.report(session, error)

    def _free(self, session: SessionId) -> None:
        log.info("a session has ended", session=str(session))
        self._clients.free(session)
        if (reaching := self._reaching.pop(session, None)) is not None and reaching is not asyncio.current_task():
            reaching.cancel()
        self._end_trace(session)
        self._replays.end(session)
        self._batcher.drop(session)
        for executor in self._executors.values():
            executor.close(session)

    def _trace(self, session: Session, parent: str) -> None:
        if self._tracer is not None:
            self._traces[session.id] = self._tracer.begin(session, session.client, parent)

    def _end_trace(self, session: SessionId) -> None:
        if (trace := self._traces.pop(session, None)) is not None:
            trace.end()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            for session in self.sessions.expire(self._now_s(), self._reaching):  # who waits for those hears in the end
                self._free(session)
            if not self._busy and self._now_s() - max(self._worked_s, self._measured_s) >= REST_S:
                self._measure()

    def _measure(self) -> None:
        """Time a few steps of nobody's; steps that come meanwhile wait for them."""
        executor = self._executors.get(self._blocks)
        if executor is None:
            return
        self._busy = True

        def finish(measuring: asyncio.Future[list[float]]) -> None:
            if measuring.cancelled():
                return
            self._busy, self._measured_s = False, self._now_s()
            if (error := measuring.exception()) is not None:
                log.warning("a node could not measure itself", reason=repr(error))
            else:
                self._speed.measured(measuring.result())
            self._compute()

        measuring = self._loop.run_in_executor(self._thread, time_blocks, executor, self._now_s)
        measuring.add_done_callback(finish)

    def _spawn(self, coroutine: object) -> asyncio.Task[None]:
        task: asyncio.Task[None] = self._loop.create_task(coroutine)  # type: ignore[arg-type]
        self._tasks[task] = None
        task.add_done_callback(lambda done: self._tasks.pop(done, None))
        return task
