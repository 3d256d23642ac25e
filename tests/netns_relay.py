"""A bad network in user space: forwards frames between two interfaces, late, slowly and not all of them.

For kernels without tc's netem. ``python netns_relay.py A B DELAY_S BYTES_PER_S LOSS SEED``, inside a network namespace
that has both interfaces; it says "ready" when it forwards, and SIGUSR1 cuts the connection for good.
"""

from __future__ import annotations

import heapq
import random
import select
import signal
import socket
import sys
import time
from typing import Any

_ALL_PROTOCOLS = 3
_SOL_PACKET, _VNET_HEADER = 263, 15  # a header says which checksums and segments the sender left to the card
_OUTGOING = 4
_MOST = 1 << 17


def _open(interface: str) -> socket.socket:
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_PROTOCOLS))
    opened.setsockopt(_SOL_PACKET, _VNET_HEADER, 1)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
    opened.bind((interface, 0))
    opened.setblocking(False)
    return opened


def relay(first: str, second: str, delay: float, rate: float, loss: float, seed: int) -> None:
    """Forward until killed."""
    ends = [_open(first), _open(second)]
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    free = dict.fromkeys(ends, 0.0)  # when the line behind an end has nothing more to send
    waiting: list[tuple[float, int, Any, bytes]] = []
    pick = random.Random(seed)
    number, cut = 0, False

    def on_cut(*_: object) -> None:
        nonlocal cut
        cut = True

    signal.signal(signal.SIGUSR1, on_cut)
    print("ready", flush=True)
    while True:
        pause = max(waiting[0][0] - time.monotonic(), 0.0) if waiting else 0.2
        readable, _, _ = select.select(ends, [], [], pause)
        for end in readable:
            frame, address = end.recvfrom(_MOST)
            if address[2] == _OUTGOING or cut or pick.random() < loss:
                continue
            out = other[end]
            free[out] = max(free[out], time.monotonic()) + len(frame) / rate
            number += 1
            heapq.heappush(waiting, (free[out] + delay, number, out, frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, out, frame = heapq.heappop(waiting)
            if not cut:
                out.send(frame)


if __name__ == "__main__":
    _, a, b, *numbers = sys.argv
    relay(a, b, float(numbers[0]), float(numbers[1]), float(numbers[2]), int(numbers[3]))
