"""What last stages bring back: checked against what was asked for, and passed on to the decoder or to who reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bsns.client.decoder import Arrived, Decoder
from bsns.client.parking import Parking
from bsns.client.reader import Reader
from bsns.client.tally import Tally
from bsns.compression.rows import NotFinite, decode
from bsns.core.errors import BadTensor, BsnsError, PeerLost
from bsns.core.ids import PeerId, SessionId
from bsns.protocol.codecs import CODECS
from bsns.protocol.inference import Part


class Intake:
    """Takes what nodes send for a client's sessions; they may send anything."""

    def __init__(
        self,
        readers: Mapping[SessionId, Reader],
        parking: Parking,
        decoder: Decoder,
        tally: Tally,
        on_failed: Callable[[SessionId, BsnsError], None],
        *,
        dtype: str,
        hidden_size: int,
    ) -> None:
        """`readers`: of the sessions that are open, as they come and go. `on_failed` is told of a session whose stages
        break the protocol."""
        self._readers = readers
        self._parking = parking
        self._decoder = decoder
        self._tally = tally
        self._on_failed = on_failed
        self._dtype = dtype
        self._hidden_size = hidden_size

    def take(self, peer: PeerId, codec: str, results: list[tuple[Part, memoryview]]) -> None:
        """What a node brings; raises BadTensor for what ends the link to it."""
        arrived: list[Arrived] = []
        self._tally.received_bytes[codec] += sum(rows.nbytes for _, rows in results)
        try:
            self._take(peer, codec, results, arrived)
        finally:  # what came before something that is wrong has come
            if arrived:
                self._decoder.submit(arrived)

    def _take(self, peer: PeerId, codec: str, results: list[tuple[Part, memoryview]], arrived: list[Arrived]) -> None:
        for part, hidden in results:
            reader = self._readers.get(part.session)
            if reader is None:  # closed meanwhile
                self._parking.came(part.session, part.turn)
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
                _trace(reader, reader.through, end, part)
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
                self._on_failed(part.session, lost.about(peer))
                continue
            try:
                rows = decode(codec, hidden, self._dtype, self._hidden_size)
            except NotFinite:
                lost = PeerLost(f"node {peer} broke the protocol: it answered with scales that are no numbers")
                self._on_failed(part.session, lost.about(peer))
                continue
            if reader.answer is None:
                reader.came_through(end)
                reader.heard.put_nowait(memoryview(rows))
            else:
                _trace(reader, due.start if reader.turns else reader.through, end, part)
                reader.trailing = None  # it would have come before this
                reader.came.append(Arrived(reader.answer, rows, part.hops))
                if len(reader.came) == 1:  # otherwise the decoder has one that comes before it
                    arrived.append(reader.came[0])


def _trace(reader: Reader, start: int, end: int, part: Part) -> None:
    """A step has come through; how many rows it had is not for others to say."""
    if reader.trace is None:
        return
    route, rows = reader.session.route, end - start
    if reader.turns:
        reader.trace.decoded(route, rows, part.hops)
    elif (sent_s := reader.sent_s.pop(end, None)) is not None:
        reader.trace.prefilled(route, rows, sent_s, part.hops)
