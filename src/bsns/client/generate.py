"""A prompt's way to a streamed answer: route, session, prompt chunks, then turn after turn until the last token."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import structlog
import torch

from bsns.client.decoder import SHORT_S, Answer, Arrived, Decoder, Turned
from bsns.client.detokenize import Detokenizer, StopMatcher
from bsns.client.finding import Blame, ChooseCodec, FindRoute, Release
from bsns.client.intake import Intake
from bsns.client.links import Link, Links
from bsns.client.opening import Opener
from bsns.client.parking import Parking
from bsns.client.pieces import Piece, Stats
from bsns.client.prompts import Prompts
from bsns.client.reader import CHUNK_ROWS, Awaited, Reader
from bsns.client.repair import Repairs
from bsns.client.sampling import Constraint, SamplingOptions
from bsns.client.spares import Spares
from bsns.client.speculation import Guesser
from bsns.client.tally import Tally
from bsns.client.tracing import Tracer
from bsns.client.watch import patience_s
from bsns.core.errors import (
    BadOption,
    BsnsError,
    PeerFailed,
    PeerLost,
    PeerSlow,
    PeerTimedOut,
    PromptTooLong,
    ProtocolError,
    Remedy,
)
from bsns.core.ids import ModelId, PeerId, SessionId
from bsns.model.ends import Ends
from bsns.protocol.codecs import RAW, coded
from bsns.protocol.frames import Buffer
from bsns.protocol.inference import Part, Step
from bsns.transport.clock import MACHINE_CLOCK, Clock
from bsns.transport.port import Dial

log = structlog.get_logger(__name__)

LEAST_S = 3.0
"""What an answer has for its first token in any case, however long opening took."""
T = TypeVar("T")


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
        self.vocab_size = ends.vocab_size
        self.tally = Tally()
        self._dtype = dtype
        self._hidden_size = ends.hidden_size
        self._release = release
        self._deadline_s = deadline_s
        self._clock = clock
        self._warm_spares = warm_spares
        self._guesser = guesser
        self._tracer = tracer
        self._readers: dict[SessionId, Reader] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._decoder = Decoder(
            ends,
            dtype=dtype,
            threads=threads,
            on_turned=self._on_turned,
            on_failed=self._on_decoder_failed,
            clock=clock,
            short_s=short_turn_s,
        )
        self._parking = Parking(keep_sessions, claim, blame, self._spawn)
        self._intake = Intake(
            self._readers,
            self._parking,
            self._decoder,
            self.tally,
            self._on_failure,
            dtype=dtype,
            hidden_size=ends.hidden_size,
        )
        self._links = Links(dial, self._intake.take, self._on_told, self._on_lost, clock)
        self._opener = Opener(
            self._links,
            find_route,
            release,
            blame,
            clock,
            model=model,
            dtype=dtype,
            choose_codec=choose_codec,
            deadline_s=deadline_s,
        )
        self._spares = Spares(find_route, release, blame, self._send_rows)
        self._repairs = Repairs(find_route, release, blame, self._feed, self._spares, self._links, clock)

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
            kept = await self._parking.resume(tokens, len(tokens) + max_tokens, tenant, parent)
            session, common = kept or (await self._opener.open(len(tokens) + max_tokens, parent), 0)
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
        session = await self._opener.open(len(tokens))
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

    def _end(self, reader: Reader, tenant: str | None = None) -> None:
        """Forget a session, and free it everywhere; in a task of its own, for whoever reads may be cancelled. A
        tenant's answer that has ended in peace is kept."""
        del self._readers[reader.session.id]
        self._decoder.forget(reader.session.id)
        if tenant is not None and self._parking.keeps and reader.through and reader.rests:
            if reader.trailing is not None:
                self._parking.trails(reader.session.id, reader.trailing)
            self._spawn(self._keep(reader, tenant))
        else:
            self._spawn(self._free(reader))

    async def _keep(self, reader: Reader, tenant: str) -> None:
        if reader.looking is not None:  # what was late has come
            reader.looking.cancel()
        self._release(reader.session.route)
        await self._spares.end(reader)
        await self._parking.keep(reader.session, tuple(reader.tokens[: reader.through]), tenant)

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
        self._parking.lose(peer)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _with_end(turned: Turned) -> Iterator[tuple[int, str | None]]:
    """A turn's tokens, the last with why the answer ended, if it did."""
    for token in turned.tokens[:-1]:
        yield token, None
    yield turned.tokens[-1], turned.finished
