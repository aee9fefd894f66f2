"""A prompt's way to a streamed answer: route, session, prompt chunks, then turn after turn until the last token."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import structlog
import torch

from bsns.client.decoder import SHORT_S, Answer, Arrived, Decoder, Turned
from bsns.client.detokenize import Detokenizer, StopMatcher
from bsns.client.finding import Blame, ChooseCodec, FindRoute, Release
from bsns.client.kept import Kept, KeptSessions
from bsns.client.links import Link, Links
from bsns.client.prompts import Prompts
from bsns.client.reader import CHUNK_ROWS, Awaited, Reader
from bsns.client.repair import Repairs
from bsns.client.sampling import Constraint, Logprobs, SamplingOptions
from bsns.client.session import Session
from bsns.client.spares import Spares
from bsns.client.speculation import Guesser
from bsns.client.tally import Tally
from bsns.client.tracing import Tracer
from bsns.client.watch import patience_s
from bsns.compression.rows import NotFinite, decode
from bsns.core.errors import (
    BadOption,
    BadTensor,
    BsnsError,
    CacheFull,
    CacheTooSmall,
    PeerError,
    PeerFailed,
    PeerLost,
    PeerSlow,
    PeerTimedOut,
    PeerUnreachable,
    PromptTooLong,
    ProtocolError,
    Remedy,
    SwarmError,
)
from bsns.core.ids import ModelId, PeerId, SessionId
from bsns.model.ends import Ends
from bsns.protocol.codecs import CODECS, RAW, coded
from bsns.protocol.frames import Buffer
from bsns.protocol.inference import Part, Passed, Step
from bsns.routing.chain import Route
from bsns.transport.clock import MACHINE_CLOCK, Clock
from bsns.transport.port import Dial

log = structlog.get_logger(__name__)

UNREACHED_S = 6.0
AGAIN_S = 0.5
"""Whom a node could not dial once, for it was just coming up, it does not dial again for 5 s (libp2p's backoff)."""

PASSING = (PeerUnreachable, PeerLost, PeerTimedOut)
"""What a node that is there may look like for a moment: coming up, or busier than it ever was."""
RESUME_S = 2.0
"""What the stages of a kept session may take to answer; then another is opened."""
OPEN_S = 5.0
"""What one attempt to open a session may take: then whoever did not answer is avoided in the next."""
LEAST_S = 3.0
"""What an answer has for its first token in any case, however long opening took."""
ROOM_S = 6.0
"""How long an answer that finds no room waits for some, before it is refused."""
FIRST_LOOK_S = 0.05
MOST_LOOK_S = 0.3
"""How long until the client asks for room again, longer each time; less than what a place in a line is kept for."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Piece:
    """What a stream yields: new text, and with the last piece why it ended (`stop` or `length`)."""

    text: str
    token: int | None
    finished: str | None = None
    logprobs: Logprobs | None = None
    """Of the token, if the options ask for them."""


@dataclass(slots=True)
class Stats:
    """What one answer cost. Times in milliseconds; per-hop lists hold one entry per stage of the route."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt's: those that its stages had from the answer before."""
    session: str = ""
    """The id under which the nodes' logs have it; empty until it is open."""
    tokens: int = 0
    ttft_ms: float = 0.0
    decode_s: float = 0.0
    """From the first token to the last."""
    route: Route = ()
    turns_ms: list[tuple[float, tuple[Passed, ...]]] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed, without the time to the first token; 0 for answers of a single token."""
        return (self.tokens - 1) / self.decode_s if self.tokens > 1 and self.decode_s > 0 else 0.0

    def own_ms_per_hop(self) -> list[float]:
        """For each decoding step our own time per hop: everything between two turns but the stages' computing."""
        return [
            (total_ms - sum(hop.computing_ms for hop in hops)) / (len(hops) + 1)
            for total_ms, hops in self.turns_ms[1:]
            if hops
        ]


class Generator:
    """Answers prompts over a swarm: many at once, each on its own session."""

    def __init__(
        self,
        ends: Ends,
        prompts: Prompts,
        dial: Dial,
        find_route: FindRoute,
        *,
        model: ModelId,
        dtype: str,
        context_tokens: int,
        threads: int = 1,
        deadline_s: float = 20.0,
        choose_codec: ChooseCodec = lambda sender, receiver: RAW,
        release: Release = lambda route: None,
        blame: Blame = lambda peer, error: None,
        clock: Clock = MACHINE_CLOCK,
        short_turn_s: float = SHORT_S,
        warm_spares: bool = False,
        guesser: Callable[[], Guesser] | None = None,
        keep_sessions: int = 0,
        claim: Release = lambda route: None,
        tracer: Tracer | None = None,
    ) -> None:
        """`warm_spares`: other nodes compute every answer's stages along, where there are such. `guesser` makes one for
        each answer, whose guesses at the next tokens are sent along (client.speculation). `keep_sessions`: so many are
        kept for prompts that go on where they ended (client.kept); `claim` is told of their routes then."""
        self.prompts = prompts
        self.context_tokens = context_tokens
        self._model = model
        self._dtype = dtype
        self._hidden_size = ends.hidden_size
        self.vocab_size = ends.vocab_size
        self._find_route = find_route
        self._choose_codec = choose_codec
        self._release = release
        self._blame = blame
        self._deadline_s = deadline_s
        self._clock = clock
        self._links = Links(dial, self._on_results, self._on_told, self._on_lost, clock)
        self._decoder = Decoder(
            ends,
            dtype=dtype,
            threads=threads,
            on_turned=self._on_turned,
            on_failed=self._on_decoder_failed,
            clock=clock,
            short_s=short_turn_s,
        )
        self._warm_spares = warm_spares
        self._guesser = guesser
        self._kept = KeptSessions(keep_sessions)
        self._keeps = keep_sessions > 0
        self._claim = claim
        self._tracer = tracer
        self._spares = Spares(find_route, release, blame, self._send_rows)
        self._repairs = Repairs(find_route, release, blame, self._feed, self._spares, self._links, clock)
        self.tally = Tally()
        self._readers: dict[SessionId, Reader] = {}
        self._trailing: dict[SessionId, tuple[int, asyncio.Event]] = {}
        """Of answers that have ended while guesses are on their way: the turn of the last of them, and that it came."""
        self._waiting = asyncio.Lock()
        """Held by the answer that asks for room again: the others come after it in their order."""
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def links(self) -> Links:
        return self._links

    @property
    def repairs(self) -> int:
        """How many times stages have been replaced."""
        return self._repairs.made

    @property
    def warm_repairs(self) -> int:
        """How many of them by a spare that had computed along."""
        return self._repairs.made_warm

    def routes(self) -> list[list[PeerId]]:
        """The stages of every session that is open now."""
        return [[hop.peer for hop in reader.session.route] for reader in self._readers.values()]

    async def stream(
        self,
        tokens: Sequence[int],
        options: SamplingOptions,
        stats: Stats | None = None,
        constraint: Constraint | None = None,
        *,
        guess: bool = True,
        tenant: str = "",
    ) -> AsyncGenerator[Piece, None]:
        """The answer to a tokenised prompt, piece by piece; `constraint`, this answer's own, says what it may hold.

        `tenant`: whose it is; what the stages hold of its answers serves no other's.

        Raises BadOption for tokens that the model does not have and PromptTooLong before anything is sent, and
        CacheFull if the swarm has no room for `ROOM_S`; afterwards whatever the swarm could not repair, as a typed
        error in the stream, at the latest one deadline after its last token.
        """
        stats = stats if stats is not None else Stats()
        if not tokens:
            raise BadOption("the prompt is empty; give at least one token")
        if (most := max((*tokens, *(token for token, _ in options.logit_bias)))) >= self.vocab_size:
            raise BadOption(f"the model has no token {most}; its ids end at {self.vocab_size - 1}")
        room = self.context_tokens - len(tokens)
        if room < 1:
            raise PromptTooLong(
                f"the prompt has {len(tokens)} tokens, the model's context holds {self.context_tokens}; shorten it"
            )
        max_tokens = min(options.max_tokens, room)
        started_s = first_s = self._clock.now_s()
        trace = self._tracer.begin() if self._tracer is not None else None
        parent = trace.parent if trace is not None else ""
        self.tally.waiting += 1
        try:
            kept = await self._resume(tokens, len(tokens) + max_tokens, tenant, parent)
            session, common = kept or (await self._open(len(tokens) + max_tokens, parent), 0)
        except BaseException as error:
            if trace is not None:
                trace.end(stats, error)
            raise
        finally:
            self.tally.waiting -= 1
        end_tokens, codec = self.prompts.end_tokens, session.takes
        guesser = self._guesser() if guess and self._guesser is not None else None
        answer = Answer(
            session.id,
            options,
            end_tokens,
            list(tokens),
            len(tokens),
            max_tokens,
            codec,
            guesser,
            sent_s=self._clock.now_s(),
            constraint=constraint,
        )
        stats.prompt_tokens, stats.route, stats.turns_ms = len(tokens), session.route, answer.turns_ms
        stats.cached_tokens, stats.session = common, str(session.id)
        reader = self._readers[session.id] = Reader(session, tokens, answer)
        reader.sent = reader.through = common
        reader.trace = trace
        failure: BaseException | None = None
        try:
            await self._feed(reader)
            if self._warm_spares:
                self._spares.keep(reader)
            detokenizer, matcher = Detokenizer(self.prompts.tokenizer), StopMatcher(options.stop)
            while True:
                turned = await self._hear(reader, Turned, 0.0 if stats.tokens else self._clock.now_s() - started_s)
                now_s, stats.route = self._clock.now_s(), session.route
                if not stats.tokens:
                    stats.ttft_ms, first_s = (now_s - started_s) * 1e3, now_s
                stats.decode_s = now_s - first_s
                for token, finished in _with_end(turned):
                    told = answer.logprobs[stats.tokens] if answer.logprobs else None
                    stats.tokens += 1
                    text = detokenizer.push(token) if token not in answer.end_tokens else ""
                    if finished:
                        text += detokenizer.flush()
                    text, stopped = matcher.push(text)
                    if stopped:
                        yield Piece(text, token, "stop", told)
                        return
                    if finished:
                        yield Piece(text + matcher.flush(), token, finished, told)
                        return
                    yield Piece(text, token, None, told)
        except BaseException as error:
            failure = error
            raise
        finally:
            stats.route = session.route
            if trace is not None:
                trace.end(stats, failure)
            self._end(reader, tenant)

    async def logits(self, tokens: Sequence[int], start: int = 0) -> AsyncIterator[torch.Tensor]:
        """Logits (rows, vocabulary) for every position of a text from `start` on, chunk by chunk. Raises as `stream`
        does."""
        if not tokens:
            raise BadOption("the text is empty; give at least one token")
        if len(tokens) > self.context_tokens:
            raise PromptTooLong(f"{len(tokens)} tokens do not fit the model's context of {self.context_tokens}")
        if not 0 <= start < len(tokens):
            raise BadOption(f"a text of {len(tokens)} tokens has no position {start}")
        session = await self._open(len(tokens))
        reader = self._readers[session.id] = Reader(session, tokens)
        try:
            for chunk in range(start // CHUNK_ROWS * CHUNK_ROWS, len(tokens), CHUNK_ROWS):
                wanted = Awaited(max(start, chunk), min(chunk + CHUNK_ROWS, len(tokens)), 0)
                reader.awaited.clear()
                reader.awaited.append(wanted)
                await self._feed(reader)
                yield await self._decoder.logits(await self._hear(reader, memoryview), wanted.rows)
        finally:
            self._end(reader)

    async def close(self) -> None:
        """Close every link, which frees every session on every stage; answers under way end with PeerLost."""
        self._links.shut()
        for reader in list(self._readers.values()):
            reader.heard.put_nowait(PeerLost("the client was closed"))
            for task in (reader.looking, reader.mending):
                if task is not None:
                    task.cancel()
            await self._spares.end(reader)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._links.close()
        await self._decoder.close()

    async def _open(self, max_tokens: int, trace: str = "") -> Session:
        """A session on the best route, as soon as there is room for it. Raises CacheFull if there is none within
        `ROOM_S`, at once where there cannot be any, and what `_open_somewhere` does."""
        give_up_s = self._clock.now_s() + self._deadline_s
        refusal: CacheFull | None = None
        if not self._waiting.locked():  # otherwise others wait, and come first
            try:
                return await self._open_somewhere(max_tokens, give_up_s, trace)
            except CacheTooSmall:
                raise
            except CacheFull as error:
                refusal = error
        try:
            async with asyncio.timeout(max(0.0, min(ROOM_S, give_up_s - self._clock.now_s()))), self._waiting:
                look_s = FIRST_LOOK_S
                while True:
                    try:
                        return await self._open_somewhere(max_tokens, give_up_s, trace, in_line=True)
                    except CacheTooSmall:
                        raise
                    except CacheFull as error:
                        refusal = error
                    await asyncio.sleep(look_s)
                    look_s = min(2 * look_s, MOST_LOOK_S)
        except TimeoutError:
            why = refusal.message if refusal is not None else "others wait for room before this answer"
            raise CacheFull(f"the swarm is full: {why}; ask again later, or add a node") from None

    async def _open_somewhere(
        self, max_tokens: int, give_up_s: float, trace: str = "", *, in_line: bool = False
    ) -> Session:
        """A session on the best route; a peer that refuses or does not answer is avoided in the next try. None begins
        after `give_up_s`. Where somebody was silent and nobody else is left, all are tried again for a while.

        `in_line`: stages that announced that they are full are asked too, for that may be over.
        """
        began_s = self._clock.now_s()
        avoid: set[PeerId] = set()
        refusal: BsnsError | None = None
        while True:
            try:
                try:
                    route = await self._find_route(max_tokens, avoid, None, bool(avoid) and not in_line)
                except CacheFull:
                    if not in_line or avoid:
                        raise
                    route = await self._find_route(0, avoid, None, False)
            except (SwarmError, PeerError) as error:
                if isinstance(refusal, PASSING) and self._clock.now_s() - began_s < UNREACHED_S:
                    avoid.clear()
                    await asyncio.sleep(AGAIN_S)
                    continue
                raise refusal or error from None  # the refusal says more than that nobody is left
            session = Session(
                self._links,
                route,
                model=self._model,
                dtype=self._dtype,
                max_tokens=max_tokens,
                choose_codec=self._choose_codec,
                trace=trace,
            )
            try:
                left_s = max(AGAIN_S, give_up_s - self._clock.now_s())
                await session.open(min(OPEN_S, left_s), in_line=in_line)
            except BsnsError as error:  # of whatever kind: it is what a peer of this route said, or how it failed
                self._release(route)
                refusal = error
                if error.peer is not None:
                    self._blame(error.peer, error)
                blamed = {error.peer} if error.peer is not None else {hop.peer for hop in route}
                if self._clock.now_s() > give_up_s or blamed <= avoid:
                    raise
                avoid |= blamed
            except BaseException:
                self._release(route)
                raise
            else:
                return session

    async def _resume(
        self, tokens: Sequence[int], max_tokens: int, tenant: str, trace: str = ""
    ) -> tuple[Session, int] | None:
        """A kept session that holds how a prompt begins, with room for its answer, and how much it holds; if its stages
        still have it and the room."""
        found = self._kept.take(tokens, tenant)
        if found is None:
            return None
        kept, common = found
        kept.session.trace = trace
        try:
            await kept.session.resume(max_tokens, common, RESUME_S)
        except BaseException as error:
            self._spawn(kept.session.close())
            if isinstance(error, PeerError) and error.peer is not None:
                self._blame(error.peer, error)
            if not isinstance(error, BsnsError):
                raise
            log.info("a kept session could not go on", session=str(kept.session.id), reason=error.message)
            return None
        self._claim(kept.session.route)
        return kept.session, common

    def _end(self, reader: Reader, tenant: str | None = None) -> None:
        """Forget a session, and free it everywhere; in a task of its own, for whoever reads may be cancelled. A
        tenant's answer that has ended in peace is kept."""
        del self._readers[reader.session.id]
        self._decoder.forget(reader.session.id)
        if tenant is not None and self._keeps and reader.through and reader.rests:
            if reader.trailing is not None:
                self._trailing[reader.session.id] = reader.trailing, asyncio.Event()
            self._spawn(self._keep(reader, tenant))
        else:
            self._spawn(self._free(reader))

    async def _keep(self, reader: Reader, tenant: str) -> None:
        self._release(reader.session.route)
        await self._spares.end(reader)
        if not await self._has_passed(reader.session.id):
            await reader.session.close()
            return
        tokens = tuple(reader.tokens[: reader.through])
        reader.session.park(len(tokens))
        for gone in self._kept.add(Kept(reader.session, tokens, tenant)):
            await gone.session.close()

    async def _has_passed(self, session: SessionId) -> bool:
        """Wait for what is still on its way through an ended answer's stages: whether it is no more."""
        if session not in self._trailing:
            return True
        try:
            async with asyncio.timeout(RESUME_S):
                return await self._trailing[session][1].wait()
        except TimeoutError:
            return False
        finally:
            del self._trailing[session]

    async def _free(self, reader: Reader) -> None:
        for task in (reader.looking, reader.mending):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._release(reader.session.route)
        await asyncio.gather(self._spares.end(reader), reader.session.close())

    async def _feed(self, reader: Reader, *, again_from: int | None = None) -> None:
        """Send a reader's tokens as far as they may be, in chunks, without waiting for what they bring: so the stages
        work on different chunks at once. `again_from`: what lies there and after once more, to a new first stage."""
        async with reader.feeding:
            if again_from is not None:
                reader.sent = again_from
            link = reader.session.first
            while (start := reader.sent) < reader.goal and reader.session.first is link:
                (end, wanted, turn), turns = reader.next_step(), reader.turns
                codec = reader.session.takes
                hidden = await self._decoder.embed(reader.line(start, end), start, codec)
                if reader.session.first is not link:
                    return  # whoever put another in its place begins again
                if reader.turns != turns:
                    continue  # some of the guesses were wrong, say
                reader.sent = end
                self._spares.fed(reader, start)
                if reader.trace is not None and not reader.turns:
                    reader.sent_s[end] = self._clock.now_s()
                try:
                    async with asyncio.timeout(self._deadline_s):
                        part = Part(reader.session.id, start, end - start, wanted, turn=turn)
                        await link.send(*self._step([(part, hidden)], codec))
                except TimeoutError:
                    late = PeerTimedOut(f"node {link.peer} took nothing for {self._deadline_s:g} s")
                    self._repairs.lose(reader, link.peer, late)
                    return
                except BsnsError as error:
                    self._repairs.lose(reader, link.peer, error)
                    return

    async def _send_rows(self, reader: Reader, link: Link, start: int, end: int) -> None:
        """Send a reader's tokens to a node that computes them along. Raises PeerLost, PeerTimedOut."""
        codec = reader.session.takes
        hidden = await self._decoder.embed(reader.line(start, end), start, codec)
        try:
            async with asyncio.timeout(self._deadline_s):
                await link.send(*self._step([(Part(reader.session.id, start, end - start, 0), hidden)], codec))
        except TimeoutError:
            late = PeerTimedOut(f"node {link.peer} took nothing for {self._deadline_s:g} s")
            raise late.about(link.peer) from None

    async def _hear(self, reader: Reader, kind: type[T], waited_s: float = 0.0) -> T:
        """What the session brings next, for which its user has waited already. While it is late, its stages are asked
        whether they are there."""
        item: Turned | memoryview | BsnsError | None = None
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + min(self._deadline_s, max(LEAST_S, self._deadline_s - waited_s))
        while item is None:
            try:
                async with asyncio.timeout(min(patience_s(reader), give_up_s - loop.time())):
                    item = await reader.heard.get()
                    give_up_s = loop.time() + self._deadline_s  # part of a prompt came through: it goes on
            except TimeoutError:
                if loop.time() < give_up_s:
                    if reader.looking is None or reader.looking.done():
                        reader.looking = asyncio.create_task(self._look(reader), context=reader.context)
                    continue
                if reader.trouble is not None:
                    raise reader.trouble from None
                peers = ", ".join(hop.peer for hop in reader.session.route)
                raise PeerTimedOut(f"no token came back within {self._deadline_s:g} s over {peers}") from None
        if isinstance(item, Exception):
            raise item
        if not isinstance(item, kind):
            raise TypeError(f"{type(item).__name__} for a reader of {kind.__name__}")
        return item

    async def _look(self, reader: Reader) -> None:
        try:
            await self._repairs.watch.look(reader)
        except Exception as error:
            log.exception("looking after an answer's stages failed")
            reader.heard.put_nowait(PeerFailed(f"looking after the stages failed: {error!r}"))

    def _step(self, steps: Sequence[tuple[Part, Buffer]], codec: str) -> tuple[Step, list[Buffer]]:
        parts, hidden = zip(*steps, strict=True)
        tensors = (coded("hidden", self._dtype, (sum(part.rows for part in parts), self._hidden_size), codec),)
        self.tally.sent_bytes[codec] += tensors[0].nbytes
        return Step(parts, tensors), list(hidden)

    def _on_results(self, peer: PeerId, codec: str, results: list[tuple[Part, memoryview]]) -> None:
        arrived: list[Arrived] = []
        self.tally.received_bytes[codec] += sum(rows.nbytes for _, rows in results)
        try:
            self._take_results(peer, codec, results, arrived)
        finally:  # what came before something that is wrong has come
            if arrived:
                self._decoder.submit(arrived)

    def _take_results(
        self, peer: PeerId, codec: str, results: list[tuple[Part, memoryview]], arrived: list[Arrived]
    ) -> None:
        """Raises BadTensor for what ends the link."""
        for part, hidden in results:
            reader = self._readers.get(part.session)
            if reader is None:  # closed meanwhile
                turn, came = self._trailing.get(part.session, (None, None))
                if came is not None and part.turn == turn:
                    came.set()
                continue
            if not reader.session.may_answer(peer):
                if peer in reader.former:
                    continue  # it was given up, and is late
                raise BadTensor(f"{peer} answered session {part.session}, of which it is not the last stage")
            if part.wanted and part.turn == reader.trailing:
                reader.trailing = None
            end, due = part.position + part.rows, reader.due
            if due is None or end <= reader.through or (part.wanted and part.turn != due.turn):
                continue  # it came twice: once before a repair, once after
            if not part.wanted and end <= reader.awaited[0].start:
                self._trace(reader, reader.through, end, part)
                reader.came_through(end)
                reader.heard.put_nowait(None)  # a chunk of the prompt has come through
                continue
            if not part.wanted and reader.former:
                continue  # who took a stage's place passes on what it was computing along; what is wanted follows
            row_bytes = CODECS[codec].row_bytes(self._hidden_size, self._dtype)
            if codec != reader.session.brings or hidden.nbytes != part.wanted * row_bytes:
                raise BadTensor(f"{peer} answered session {part.session} with rows of another codec or size")
            if part.wanted != due.rows or end != due.end:  # a stage before it may have asked for them
                problem = f"{part.wanted} rows up to {end} came back in place of {due.rows} up to {due.end}"
                lost = PeerLost(f"node {peer} broke the protocol, or a stage before it: {problem}")
                self._on_failure(part.session, lost.about(peer))
                continue
            try:
                rows = decode(codec, hidden, self._dtype, self._hidden_size)
            except NotFinite:
                lost = PeerLost(f"node {peer} broke the protocol: it answered with scales that are no numbers")
                self._on_failure(part.session, lost.about(peer))
                continue
            if reader.answer is None:
                reader.came_through(end)
                reader.heard.put_nowait(memoryview(rows))
            else:
                self._trace(reader, due.start if reader.turns else reader.through, end, part)
                reader.trailing = None  # it would have come before this
                reader.came.append(Arrived(reader.answer, rows, part.hops))
                if len(reader.came) == 1:  # otherwise the decoder has one that comes before it
                    arrived.append(reader.came[0])

    def _trace(self, reader: Reader, start: int, end: int, part: Part) -> None:
        """A step has come through; how many rows it had is not for others to say."""
        if reader.trace is None:
            return
        route, rows = reader.session.route, end - start
        if reader.turns:
            reader.trace.decoded(route, rows, part.hops)
        elif (sent_s := reader.sent_s.pop(end, None)) is not None:
            reader.trace.prefilled(route, rows, sent_s, part.hops)

    def _on_turned(self, turned: list[Turned]) -> None:
        """Send every answer's next step, those that enter at the same node in one frame, and tell the readers."""
        groups: defaultdict[tuple[Link, str], list[tuple[Part, Buffer]]] = defaultdict(list)
        arrived: list[Arrived] = []
        for item in turned:
            reader = self._reader_of(item.answer)
            if reader is None:
                continue  # it has gone
            if item.tokens:
                self.tally.right += len(item.tokens) - (not item.goes_on)
                reader.turn(item.tokens, goes_on=item.goes_on)
                reader.heard.put_nowait(item)
            if item.hidden is not None:
                step = reader.expect(item.line)
                self.tally.guesses += step.rows - (step.start == reader.through)
                # where the first stage is being replaced, whoever feeds the new one sends this as well
                if reader.sent == step.start and not reader.feeding.locked():
                    self._spares.fed(reader, step.start)
                    part = Part(item.answer.session, step.start, step.rows, step.rows, turn=step.turn)
                    groups[reader.session.first, item.answer.codec].append((part, item.hidden))
                    reader.sent = step.end
            arrived += list(reader.came)[:1] if item.tokens else []
        for (link, codec), steps in groups.items():
            try:
                link.post(*self._step(steps, codec))
            except BsnsError as error:
                for part, _ in steps:
                    self._on_failure(part.session, error.about(link.peer))
        for item in turned:
            self._look_at_pace(item)
        if arrived:  # while the decoder had what came before it
            self._decoder.submit(arrived)

    def _look_at_pace(self, item: Turned) -> None:
        """A stage that has become many times slower than it was is replaced, if others can do it."""
        reader, turns_ms = self._reader_of(item.answer), item.answer.turns_ms
        if reader is None or not item.tokens or item.finished or len(turns_ms) < 2:  # the first is the prompt's
            return
        total_ms, hops = turns_ms[-1]
        slow = reader.pace.turned(total_ms, [hop.alone_ms for hop in hops])
        if slow is None or reader.mending is not None or len(hops) != len(reader.session.route):
            return
        peer = reader.session.route[slow].peer
        error = PeerSlow(f"node {peer} has become slow: it computes {hops[slow].alone_ms:.0f} ms for a token")
        self._repairs.lose(reader, peer, error.about(peer))

    def _on_decoder_failed(self, answers: list[Answer], error: Exception) -> None:
        failure = error if isinstance(error, BsnsError) else PeerFailed(f"choosing a token failed: {error!r}")
        for answer in answers:
            if self._reader_of(answer) is not None:
                self._on_failure(answer.session, failure)

    def _reader_of(self, answer: Answer) -> Reader | None:
        """Whoever reads it still: its session may have been kept, and be another's by now."""
        reader = self._readers.get(answer.session)
        return reader if reader is not None and reader.answer is answer else None

    def _on_told(self, teller: PeerId, session: SessionId, error: BsnsError) -> None:
        """A stage says that a session cannot go on. One that is lost itself is believed no more, unless it says that
        it was sent what makes no sense: then one of the two lies, and nobody can say which."""
        reader = self._readers.get(session)
        if reader is None or self._spares.heard(reader, teller, error):
            return
        route = [hop.peer for hop in reader.session.route]
        if teller not in route:  # it is none of its business, or not any more, or not yet
            if reader.mending is not None:
                reader.early[teller] = error
            return
        if error.remedy is Remedy.TELL_USER or (error.peer not in route and error.peer not in reader.former):
            # nothing that a stage may tell an answer's user, or of somebody it knows nothing of
            error = PeerFailed(f"node {teller} failed: {error.message}").about(teller)
        doubtful = error.peer != teller and teller in reader.lost
        if not doubtful or isinstance(error, ProtocolError):
            self._repairs.lose(reader, error.peer, error)

    def _on_failure(self, session: SessionId, error: BsnsError) -> None:
        reader = self._readers.get(session)
        if reader is not None:
            self._repairs.lose(reader, error.peer, error)

    def _on_lost(self, peer: PeerId, error: BsnsError) -> None:
        for reader in list(self._readers.values()):
            if any(hop.peer == peer for hop in reader.session.route):
                self._repairs.lose(reader, peer, error)
            self._spares.lost(reader, peer, error)
        for kept in self._kept.lose(peer):
            self._spawn(kept.session.close())

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _with_end(turned: Turned) -> Iterator[tuple[int, str | None]]:
    """A turn's tokens, the last with why the answer ended, if it did."""
    for token in turned.tokens[:-1]:
        yield token, None
    yield turned.tokens[-1], turned.finished
