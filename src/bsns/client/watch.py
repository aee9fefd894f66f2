"""The watch: when a step is overdue, a session's stages are asked how far it has come, and who is at fault is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from bsns.client.links import Link, Links
from bsns.client.reader import Reader
from bsns.core.errors import BsnsError, PeerTimedOut
from bsns.core.ids import PeerId, SessionId
from bsns.protocol.inference import There
from bsns.transport.clock import Clock

PATIENCE_S = 0.5
"""A step that takes longer than this, and than usual, makes the client ask its stages whether they are there."""
USUAL_FACTOR = 4
OWN_NETWORK_S = 4.0
"""For so long our own network is to blame where no stage of a session answers."""
PING_S = 0.75
"""Who does not answer such a question in this time is lost."""
TOGETHER_S = 0.02
"""Those who are found silent within this time are replaced together."""

Lose = Callable[[Reader, PeerId, BsnsError], None]


class Watch:
    """Looks after the overdue steps of a client's sessions."""

    def __init__(self, links: Links, lose: Lose, clock: Clock) -> None:
        self._links = links
        self._lose = lose
        self._clock = clock

    async def look(self, reader: Reader) -> None:
        """Ask the stages of a session that is late how far it has come: who is silent, who got nothing, who is slow."""
        if reader.mending is not None or reader.due is None:
            return
        sent, route, turns = reader.sent, reader.session.route, reader.turns
        there, silent, answering = await self._ask_all(reader)
        own_network = await self._is_own_network(reader, answering)
        if own_network or reader.mending is not None or reader.session.route is not route:
            return
        if reader.due is None or reader.turns != turns or reader.through >= sent:
            return  # it goes on
        if silent:
            await self._lose_all(reader, silent)
            return
        usual_s = reader.pace.usual_s or (reader.pace.said_s if sent - reader.through == 1 else 0.0)
        found = reader.progress.fault(
            (reader.through, sent),
            reader.session.first.sent(),
            [hop.peer for hop in route],
            there,
            usual_s,
            self._clock.now_s(),
        )
        if found is not None:
            peer, error = found
            self._lose(reader, peer, error.about(peer))

    async def look_at_rest(self, reader: Reader) -> None:
        """While a stage is being replaced: ask the others whether they are there. Who is silent is lost too."""
        _, silent, answering = await self._ask_all(reader)
        if silent and not await self._is_own_network(reader, answering):
            await self._lose_all(reader, {link: e for link, e in silent.items() if link in reader.session.links})

    async def _ask_all(self, reader: Reader) -> tuple[dict[PeerId, There], dict[Link, BsnsError], int]:
        """What the stages that are not lost say, who of them says nothing, and how many are not silent. Where somebody
        is, others are not waited for to which the question is still on its way."""
        links = [link for link in reader.session.links if link.peer not in reader.lost]
        asked = {link: asyncio.create_task(self._ask(reader.session.id, link)) for link in links}
        there: dict[PeerId, There] = {}
        silent: dict[Link, BsnsError] = {}
        try:
            for answered in asyncio.as_completed(asked.values()):
                if isinstance(await answered, BsnsError):
                    await asyncio.sleep(TOGETHER_S)
                    break
        finally:
            for task in asked.values():
                task.cancel()
        for link, task in asked.items():
            if not task.done() or task.cancelled():
                continue
            answer = task.result()
            if isinstance(answer, There):
                there[link.peer] = answer
            else:
                silent[link] = PeerTimedOut(f"node {link.peer} fell silent: {answer.message}").about(link.peer)
        return there, silent, len(links) - len(silent)

    async def _lose_all(self, reader: Reader, silent: dict[Link, BsnsError]) -> None:
        for link, error in silent.items():  # all at once, so that they are replaced together
            self._lose(reader, link.peer, error)
        await asyncio.gather(*(link.give_up(error) for link, error in silent.items()))

    async def _ask(self, session: SessionId, link: Link) -> There | BsnsError:
        """How far a session has come on a stage, or why it does not say."""
        try:
            return await link.where(session, PING_S)
        except BsnsError as error:
            return error

    async def _is_own_network(self, reader: Reader, answering: int) -> bool:
        """Whether all stages are silent, and so is everybody else we know: our own network is suspected for a
        while, during which the stages keep the session."""
        others = self._links.others({hop.peer for hop in reader.session.route})
        if answering or (len(reader.session.route) == 1 and not others):
            reader.deaf_since_s = None
            return False
        heard = await asyncio.gather(*(link.ping(PING_S) for link in others), return_exceptions=True)
        now_s = self._clock.now_s()
        reader.deaf_since_s = reader.deaf_since_s or now_s
        return all(isinstance(answer, BaseException) for answer in heard) and (
            now_s - reader.deaf_since_s < OWN_NETWORK_S
        )


def patience_s(reader: Reader) -> float:
    """How long a step may take before its stages are asked."""
    return max(PATIENCE_S, USUAL_FACTOR * reader.pace.usual_s)
