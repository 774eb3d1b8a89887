"""The table of contenders. `ours` is fused_rnn; every other one is a peer that `--against` can name."""

from __future__ import annotations

from collections.abc import Sequence

from fused_rnn_bench.errors import BenchError

from .base import Contender
from .engines import OnnxRuntime, OpenVino
from .flashrnn import FlashRnn
from .haste import Haste
from .modules import FusedRnn, TorchNN

OURS: type[Contender] = FusedRnn
PEERS: dict[str, type[Contender]] = {
    peer.name: peer for peer in (TorchNN, OnnxRuntime, OpenVino, Haste, FlashRnn)
}


def choose_peers(names: Sequence[str] | None, device: str, threads: int) -> list[Contender]:
    """The peers of a run, torch.nn always among them: it is the other half of the tolerance law.

    None means every peer that is installed and works on this device. A peer asked for by name must be there.
    """
    if unknown := [name for name in names or () if name not in PEERS]:
        raise BenchError(f"no peer is called {unknown[0]!r}; there are {', '.join(PEERS)}")
    chosen = []
    for name, peer_class in PEERS.items():
        peer = peer_class(device, threads)
        reason = peer.missing()
        if names is not None and name in names and reason:
            raise BenchError(f"--against {name}: {reason}")
        if reason is None and (names is None or name in names or name == TorchNN.name):
            chosen.append(peer)
    return chosen
