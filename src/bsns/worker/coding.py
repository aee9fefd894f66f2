"""The wire's codecs around an executor: what came is decoded before a batch, and what goes on encoded after it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace

from bsns.compression.rows import NotFinite, decode, encode
from bsns.core.blocks import BlockRange
from bsns.core.errors import BadTensor, BsnsError, PeerFailed
from bsns.protocol.codecs import CODECS, RAW
from bsns.protocol.frames import Buffer
from bsns.worker.batching import Batch, Work
from bsns.worker.executor import Executor

Code = Callable[[str, Buffer, str, int], Buffer]
Coded = dict[int, Buffer | NotFinite]


def run_coded(executor: Executor, batch: Batch) -> list[Buffer | BsnsError]:
    """Run a batch; for each of its works the rows to send on, in its session's codec: all of them, or of a last stage
    those that are wanted.

    In a work's place stands what is wrong, where its numbers cannot be coded: the others are not concerned. Raises what
    the executor does.
    """
    works = batch.works
    came = {n: (work.session.takes, work.hidden) for n, work in enumerate(works) if work.session.takes != RAW}
    refused: set[int] = set()
    for n, decoded in _coded(decode, came, executor).items():
        if isinstance(decoded, NotFinite):
            refused.add(n)
            decoded = bytes(works[n].part.rows * _row_bytes(executor))  # computed for nobody
        works[n].hidden = decoded
    sent = [_sent(work, output, executor) for work, output in zip(works, executor.run(batch), strict=True)]
    outputs: list[Buffer | BsnsError] = [*sent]
    goes = {n: (work.session.gives, sent[n]) for n, work in enumerate(works) if work.session.gives != RAW}
    for n, encoded in _coded(encode, goes, executor).items():
        if isinstance(encoded, NotFinite):
            outputs[n] = _fault(executor, batch, works[n])
        else:
            outputs[n] = encoded
    for n in refused:
        outputs[n] = _blaming(BadTensor("a step whose scales are no numbers"), works[n])
    return outputs


def _row_bytes(executor: Executor) -> int:
    return CODECS[RAW].row_bytes(executor.hidden_size, executor.dtype)


def _sent(work: Work, output: memoryview, executor: Executor) -> memoryview:
    """The rows of an output that leave the node."""
    if work.session.next is not None:
        return output
    return output[(work.part.rows - work.part.wanted) * _row_bytes(executor) :]


def _coded(code: Code, items: Mapping[int, tuple[str, Buffer]], executor: Executor) -> Coded:
    """Each item coded, those of one codec in one go."""
    by_codec: defaultdict[str, list[int]] = defaultdict(list)
    for n, (codec, _) in items.items():
        by_codec[codec].append(n)
    found: Coded = {}
    for codec, members in by_codec.items():
        pieces = [memoryview(items[n][1]) for n in members]
        joined = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        try:
            whole = memoryview(code(codec, joined, executor.dtype, executor.hidden_size))
        except NotFinite as error:
            if len(members) == 1:
                found[members[0]] = error
            else:
                for n in members:
                    found |= _coded(code, {n: items[n]}, executor)
            continue
        given = sum(piece.nbytes for piece in pieces)
        start = 0
        for n, piece in zip(members, pieces, strict=True):
            end = start + piece.nbytes * whole.nbytes // given if given else 0
            found[n] = whole[start:end]
            start = end
    return found


def _fault(executor: Executor, batch: Batch, work: Work) -> BsnsError:
    """Who gave the numbers that are not finite: whoever sent them, or which block, found by running one after the
    other."""
    if not _is_finite(work.hidden, executor):
        return _blaming(PeerFailed("numbers that are not finite came in"), work)
    hidden: Buffer = work.hidden
    for block in range(batch.blocks.start, batch.blocks.end):
        (hidden,) = executor.run(Batch(BlockRange(block, block + 1), [replace(work, hidden=hidden)]))
        if not _is_finite(hidden, executor):
            return PeerFailed(f"block {block} gives numbers that are not finite")
    return PeerFailed(f"one of the blocks {batch.blocks} gave numbers that are not finite")


def _is_finite(hidden: Buffer, executor: Executor) -> bool:
    try:
        encode("int8", hidden, executor.dtype, executor.hidden_size)
    except NotFinite:
        return False
    return True


def _blaming(error: BsnsError, work: Work) -> BsnsError:
    """With the stage before to blame, where there is one."""
    return error.about(work.session.previous) if work.session.previous is not None else error
