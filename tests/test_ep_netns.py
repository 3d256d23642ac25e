"""Two nodes that are two network namespaces: one node's bits, and a cut link is named in time.

Joined by a veth pair, and by two with a relay between them that is late, slow and loses frames.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import ep_cases
import pytest
import torch.distributed as dist
from ep_cases import Case
from ep_ranks import Outcome, run_ranks
from seeds import SEED

from hal import RankFailure, SpecError

TOKENS = (5, 0, 9, 17)
TIMEOUT = 3.0


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextlib.contextmanager
def _namespaces(count: int) -> Iterator[tuple[str, ...]]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("not applicable: network namespaces need root and the ip command")
    tag = secrets.token_hex(3)
    names = tuple(f"hal{tag}{letter}" for letter in "abc"[:count])
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"not applicable: no network namespaces here ({error.stderr.decode().strip()})")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _join(one: str, end: str, other: str, other_end: str) -> None:
    _ip("link", "add", end, "netns", one, "type", "veth", "peer", "name", other_end, "netns", other)
    for name, device in ((one, end), (other, other_end)):
        _ip("-n", name, "link", "set", device, "up")


def _address(nodes: tuple[str, ...]) -> None:
    for i, name in enumerate(nodes):
        _ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", name)
        _ip("-n", name, "link", "set", "lo", "up")


@pytest.fixture
def nodes() -> Iterator[tuple[str, ...]]:
    """Names of two joined namespaces."""
    with _namespaces(2) as names:
        _join(names[0], names[0], names[1], names[1])
        _address(names)
        yield names


@pytest.fixture
def bad_network() -> Iterator[tuple[tuple[str, ...], int]]:
    """Two namespaces with 5 ms, 20 MB/s and one lost frame of 200 between them, and the relay's process."""
    with _namespaces(3) as (one, other, between):
        _join(one, one, between, "west")
        _join(other, other, between, "east")
        _address((one, other))
        program = str(Path(__file__).with_name("netns_relay.py"))
        command = [sys.executable, program, "west", "east", "0.005", "2e7", "0.005", str(SEED)]
        relay = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=partial(_into, between))
        try:
            assert relay.stdout is not None and relay.stdout.readline() == "ready\n"
            yield (one, other), relay.pid
        finally:
            relay.kill()
            relay.wait()


def _into(name: str) -> None:
    with open(f"/run/netns/{name}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0) != 0:
            raise OSError(ctypes.get_errno(), "setns")


def enter(nodes: tuple[str, ...], rank: int) -> None:
    """Ranks 0 and 1 live in the first namespace, 2 and 3 in the second."""
    name = nodes[rank // 2]
    _into(name)
    os.environ["GLOO_SOCKET_IFNAME"] = name


def one_node_refused(rank: int) -> None:
    """Ranks that cannot share windows say so instead of waiting."""
    with pytest.raises(SpecError, match="in one network namespace"):
        Case(ranks=4, tokens=TOKENS).buffer(ranks_per_node=4, modes=("normal",))


def cut(rank: int, link: Callable[[], object]) -> tuple[int, str, float]:
    """Work until the link goes down."""
    case = Case(ranks=4, tokens=TOKENS, per_node=2)
    mine = case.inputs()[rank]
    with case.buffer(timeout=TIMEOUT) as buffer:
        got = buffer.dispatch(mine.x, mine.topk_idx)
        buffer.combine(got.recv_x, got.handle)
        dist.barrier()
        if rank == 0:
            time.sleep(1.0)  # until the barrier has reached the others over a late and leaky link
            link()
        time.sleep(0.5 if rank == 0 else 1.5)
        start = time.monotonic()
        with pytest.raises(RankFailure) as caught:
            buffer.dispatch(mine.x, mine.topk_idx)
        return caught.value.rank, caught.value.phase, time.monotonic() - start


CASES = [
    Case(ranks=4, tokens=TOKENS, per_node=2),
    Case(ranks=4, tokens=TOKENS, per_node=2, expand=True, alignment=4, bias=1, hidden=512, routing="zipf"),
    Case(ranks=4, tokens=TOKENS, per_node=2, hidden=512, routing="distinct", room=9, overflow="drop"),
]
PACKED = [(Case(ranks=4, tokens=TOKENS, per_node=2, hidden=256), "fp8")]


def test_two_namespaces_give_the_bits_of_one_node(nodes: tuple[str, ...]) -> None:
    run_ranks(4, ep_cases.normal, CASES, before=partial(enter, nodes), limit=60)
    run_ranks(4, ep_cases.packed, PACKED, before=partial(enter, nodes), limit=60)
    run_ranks(4, one_node_refused, before=partial(enter, nodes))


def test_a_bad_network_gives_the_bits_of_one_node(bad_network: tuple[tuple[str, ...], int]) -> None:
    run_ranks(4, ep_cases.normal, CASES, before=partial(enter, bad_network[0]), limit=60)
    run_ranks(4, ep_cases.packed, PACKED, before=partial(enter, bad_network[0]), limit=60)


def test_a_cut_link_is_named_within_the_timeout(nodes: tuple[str, ...]) -> None:
    down = partial(_ip, "-n", nodes[0], "link", "set", nodes[0], "down")
    _named_in_time(run_ranks(4, cut, down, before=partial(enter, nodes)))


def test_a_bad_network_that_breaks_is_named_within_the_timeout(bad_network: tuple[tuple[str, ...], int]) -> None:
    down = partial(os.kill, bad_network[1], signal.SIGUSR1)
    _named_in_time(run_ranks(4, cut, down, before=partial(enter, bad_network[0])))


def _named_in_time(outcomes: list[Outcome]) -> None:
    for rank, outcome in enumerate(outcomes):
        culprit, phase, seconds = outcome.value
        assert culprit // 2 != rank // 2
        assert "between nodes" in phase
        assert seconds < TIMEOUT + 2
