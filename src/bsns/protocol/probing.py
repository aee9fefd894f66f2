"""The probing conversation: how long so many bytes take to another member. Round trips are Ping's.

prober → node    Probe     carries up to MAX_PROBE_BYTES of noise
node   → prober  Probed    says that they have come, or that more has come lately than the node will take
"""

from __future__ import annotations

import msgspec

from bsns.protocol.tensors import TensorSpec

MAX_PROBE_BYTES = 256 * 1024
"""The most that one probe may carry; a node takes more for a breach of the protocol."""


class Probe(msgspec.Struct, frozen=True, tag="probe"):
    """Say when this frame has come whole. What its tensors hold means nothing."""

    nonce: int
    tensors: tuple[TensorSpec, ...]


class Probed(msgspec.Struct, frozen=True, tag="probed"):
    """The probe of this nonce has come. `wait_s` above 0 refuses it: ask again after so long, not before."""

    nonce: int
    wait_s: float = 0.0
