"""Other implementations to be measured against, each an adapter behind the interface of `base`.

None is a dependency: one that is not installed is listed with its reason and the line that installs it.
"""

from __future__ import annotations

from typing import Final

from hal.bench.peers.base import Peer, Prepared, Presence
from hal.bench.peers.flash_mla import FlashMla
from hal.bench.peers.ggml_peers import GgmlPeer, IkLlama
from hal.bench.peers.torch_paths import TorchEager, TorchSdpa
from hal.bench.peers.vllm_cpu import VllmCpu

MLA_PEERS: Final[tuple[Peer, ...]] = (TorchEager(), TorchSdpa(), VllmCpu(), IkLlama(), GgmlPeer(), FlashMla())

__all__ = ["MLA_PEERS", "Peer", "Prepared", "Presence"]
