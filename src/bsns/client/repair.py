"""Repair: a stage that is lost is replaced, and only its blocks are computed again (decision 0001)."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine, Sequence
from typing import Any, Protocol

import structlog

from bsns.client.finding import Blame, FindRoute, Release
from bsns.client.links import Links
from bsns.client.reader import Reader
from bsns.client.spares import Spares
from bsns.client.watch import Watch
from bsns.core.blocks import BlockRange
from bsns.core.errors import BsnsError, CacheFull, MissingBlocks, PeerFailed, PeerLeaving, PeerSlow, Remedy, SwarmError
from bsns.core.ids import PeerId
from bsns.routing.chain import Route
from bsns.transport.clock import Clock

log = structlog.get_logger(__name__)

ATTEMPTS_S = (1.0, 2.0, 3.0)
"""What a spare may take to open a session, and its neighbours to turn to it: then another is tried, which gets more."""
WARM_S = 0.75
"""The same for a spare that is warm: it has to do no more than to answer."""
AGAIN_S = 0.1
MOST_AGAIN_S = 2.0
"""How long to wait before looking again, where nobody can take a lost stage's place: longer each time."""


class Feed(Protocol):
    """Sends what a reader's session has not been sent yet; `again_from`: what lies there and after, to a first stage
    that is new."""

    async def __call__(self, reader: Reader, *, again_from: int | None = None) -> None: ...


class Repairs:
    """Replaces the lost stages of a client's sessions."""

    def __init__(
        self,
        find_route: FindRoute,
        release: Release,
        blame: Blame,
        feed: Feed,
        spares: Spares,
        links: Links,
        clock: Clock,
    ) -> None:
        self._find_route = find_route
        self._release = release
        self._blame = blame
        self._feed = feed
        self._spares = spares
        self.watch = Watch(links, self.lose, clock)
        self.made = 0
        """How many stages have been replaced."""
        self.made_warm = 0
        """How many of them by a warm spare."""

    def lose(self, reader: Reader, peer: PeerId | None, error: BsnsError) -> None:
        """A stage has failed. The reader goes on once it is replaced, or hears of it where it cannot be."""
        if (
            peer is not None
            and any(hop.peer == peer for hop in reader.session.route)
            and error.remedy is not Remedy.TELL_USER
        ):
            self._blame(peer, error)
            reader.lost.setdefault(peer, error)
            if reader.mending is None:
                reader.mending = asyncio.create_task(self._mend(reader), context=reader.context)
        elif peer not in reader.former:
            reader.heard.put_nowait(error)

    async def _mend(self, reader: Reader) -> None:
        """Until nothing is lost any more, or the reader, which has the deadline, gives up."""
        reader.cause = cause = reader.cause or next(iter(reader.lost.values()))
        lost = ", ".join(str(hop.blocks) for hop in reader.session.route if hop.peer in reader.lost)
        reader.trouble = reader.trouble or MissingBlocks(
            f"nobody has taken over blocks {lost} in time; it is needed because {cause.message}"
        )
        unfit = reader.lost.keys() | reader.former
        try:
            while reader.lost:
                try:
                    await self._replace(reader, unfit)
                except (SwarmError, CacheFull) as error:
                    still_there = [
                        peer for peer, how in reader.lost.items() if isinstance(how, (PeerSlow, PeerLeaving))
                    ]
                    if still_there:
                        for peer in still_there:  # it is better than nobody
                            del reader.lost[peer]
                        reader.pace.rerouted(())
                        continue
                    reader.trouble = type(error)(f"{error.message}; it is needed because {cause.message}")
                    unfit.clear()  # whoever was may be back
                    await _wait_again(reader)
                except BsnsError as error:  # the directory does not answer, say
                    reader.trouble = PeerFailed(f"a stage was lost, and looking for another failed: {error.message}")
                    await _wait_again(reader)
        except Exception as error:
            log.exception("a repair failed")
            reader.heard.put_nowait(PeerFailed(f"a stage was lost, and replacing it failed: {error!r}"))
        finally:
            reader.mending = None
            self._spares.changed(reader)

    async def _replace(self, reader: Reader, unfit: set[PeerId]) -> None:
        """Replace the first stages that are lost, those that follow one another together. Raises what the search does;
        who fails on the way becomes unfit, or is lost too."""
        session = reader.session
        start, end = _first_run([hop.peer in reader.lost for hop in session.route])
        spare = self._spares.take(reader, start, end)
        if spare is not None:
            hops: Route = (spare.hop,)
        else:
            start, end, hops = await self._find_hops(reader, start, end, unfit | self._spares.unready(reader))
            self._spares.changed(reader, [hop.peer for hop in hops])
        warm = spare.link if spare is not None else None
        through, route = reader.through, session.route
        old = route[start:end]
        staying = {hop.peer for hop in (*session.route[:start], *session.route[end:])}
        blocks = BlockRange(old[0].blocks.start, old[-1].blocks.end)
        reader.early.clear()
        deadline_s = ATTEMPTS_S[min(reader.setbacks, len(ATTEMPTS_S) - 1)] if warm is None else WARM_S
        replacing = session.replace(start, end, hops, passes_from=through, deadline_s=deadline_s, warm=warm)
        try:
            await self._attempt(reader, replacing, staying)
        except BaseException as error:
            self._release(hops if session.route is route else old)
            if spare is not None:
                self._spares.give_back(reader, spare)
            if not isinstance(error, BsnsError):
                raise
            log.info("a spare could not take a lost stage's place", blocks=str(blocks), reason=error.message)
            if error.peer is not None:
                self._blame(error.peer, error)
            # a neighbour that does not turn to the spare may not reach it: once, the spare is to blame
            if error.peer is not None and error.peer in staying and reader.setbacks:
                reader.lost.setdefault(error.peer, error)
            reader.setbacks += 1
            if error.peer not in reader.lost.keys() & staying:
                asked = {hop.peer for hop in hops}
                unfit.update({error.peer} if error.peer in asked else asked)
            return
        self._release(old)
        failures = [reader.lost.pop(hop.peer, None) for hop in old]
        reader.former.update(hop.peer for hop in old)
        reader.former.difference_update(hop.peer for hop in hops)
        for hop in hops:
            if hop.peer in reader.early:
                reader.lost[hop.peer] = reader.early[hop.peer]
        reader.early.clear()
        self.made += 1
        reader.progress.clear()
        slow = any(isinstance(error, PeerSlow) for error in failures)
        reader.pace.rerouted([hop.says_ms for hop in session.route], slow=slow)
        self.made_warm += spare is not None
        by = [hop.peer for hop in hops]
        log.info("a lost stage was replaced", blocks=str(blocks), by=by, again=through, warm=spare is not None)
        if start == 0:
            await self._feed(reader, again_from=min(through, spare.sent) if spare is not None else 0)

    async def _attempt(self, reader: Reader, replacing: Coroutine[Any, Any, None], staying: Collection[PeerId]) -> None:
        """Replace stages, and look meanwhile whether those that stay are there: whoever waits for one that is not
        would wait in vain. Raises what replacing does, or how one of those is lost."""
        known = set(reader.lost)
        attempt = asyncio.create_task(replacing)
        rest = asyncio.create_task(self.watch.look_at_rest(reader))
        try:
            await asyncio.wait((attempt, rest), return_when=asyncio.FIRST_COMPLETED)
            gone = [error for peer, error in reader.lost.items() if peer in staying and peer not in known]
            if gone and not attempt.done():
                attempt.cancel()
                await asyncio.wait((attempt,))  # it takes back what it has opened, before the next opens it again
                raise gone[0]
            try:
                await attempt
            except BsnsError:
                await rest
                raise
        finally:  # without waiting: whoever is cancelled here after all would not know that the stages are replaced
            for task in (attempt, rest):
                task.cancel()
                task.add_done_callback(_ignore)

    async def _find_hops(self, reader: Reader, start: int, end: int, unfit: set[PeerId]) -> tuple[int, int, Route]:
        """Who takes the place of which stages. No node is on a route twice: where only a neighbour has the lost blocks,
        its own are computed again as well. Raises what the search does."""
        route = reader.session.route
        missing: BsnsError = MissingBlocks("")
        # asking takes seconds where one of those that would answer is frozen
        for fresh in (False, True):
            for first, last in _wider(start, end, len(route)):
                staying = {hop.peer for hop in (*route[:first], *route[last:])}
                blocks = BlockRange(route[first].blocks.start, route[last - 1].blocks.end)
                try:
                    hops = await self._find_route(reader.session.max_tokens, staying | unfit, blocks, fresh)
                except (SwarmError, CacheFull) as error:
                    if (first, last) == (start, end):
                        missing = error
                else:
                    return first, last, hops
        raise missing


async def _wait_again(reader: Reader) -> None:
    await asyncio.sleep(min(MOST_AGAIN_S, AGAIN_S * 2**reader.setbacks))
    reader.setbacks += 1


def _ignore(task: asyncio.Task[None]) -> None:
    """What became of a task that nobody waits for any more."""
    if not task.cancelled():
        task.exception()


def _wider(start: int, end: int, stages: int) -> list[tuple[int, int]]:
    """The stages [start, end), and with one or two neighbours."""
    spans = [(start, end), (start, end + 1), (start - 1, end), (start - 1, end + 1)]
    return [(first, last) for first, last in spans if first >= 0 and last <= stages]


def _first_run(lost: Sequence[bool]) -> tuple[int, int]:
    """The first stages in a row that are lost, half-open."""
    start = lost.index(True)
    end = start
    while end < len(lost) and lost[end]:
        end += 1
    return start, end
