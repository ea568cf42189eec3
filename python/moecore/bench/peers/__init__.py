"""Other libraries on the same inputs. Only called: nothing of theirs is built or kept here.

A peer is a library, found by import or as a binary in ``--peers-dir``; an adapter prepares one op of a peer
for one set of inputs and gives the call and what it writes. An adapter that fails is named, and the run goes
on.
"""

from __future__ import annotations

from moecore.bench.peers import products, rows
from moecore.bench.peers.libraries import PEERS, Adapter, Call, Peers

__all__ = ["PEERS", "Adapter", "Call", "Peers", "adapters"]

adapters: dict[str, list[Adapter]] = rows.ADAPTERS | products.ADAPTERS
"""By op."""
