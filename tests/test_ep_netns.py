"""Two nodes that are two network namespaces joined by a veth pair: one node's bits, and a cut link is named in time."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from functools import partial

import ep_cases
import pytest
import torch.distributed as dist
from ep_cases import Case
from ep_ranks import run_ranks

from hal import RankFailure, SpecError

TOKENS = (5, 0, 9, 17)
TIMEOUT = 3.0


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def nodes() -> Iterator[tuple[str, str]]:
    """Names of two joined namespaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("not applicable: network namespaces need root and the ip command")
    tag = secrets.token_hex(3)
    names = (f"hal{tag}a", f"hal{tag}b")
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"not applicable: no network namespaces here ({error.stderr.decode().strip()})")
        _ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
        for i, name in enumerate(names):
            _ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", name)
            _ip("-n", name, "link", "set", name, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def enter(nodes: tuple[str, str], rank: int) -> None:
    """Ranks 0 and 1 live in the first namespace, 2 and 3 in the second."""
    name = nodes[rank // 2]
    with open(f"/run/netns/{name}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0) != 0:
            raise OSError(ctypes.get_errno(), "setns")
    os.environ["GLOO_SOCKET_IFNAME"] = name


def one_node_refused(rank: int) -> None:
    """Ranks that cannot share windows say so instead of waiting."""
    with pytest.raises(SpecError, match="in one network namespace"):
        Case(ranks=4, tokens=TOKENS).buffer(ranks_per_node=4, modes=("normal",))


def cut(rank: int, nodes: tuple[str, str]) -> tuple[int, str, float]:
    """Work until the link goes down."""
    case = Case(ranks=4, tokens=TOKENS, per_node=2)
    mine = case.inputs()[rank]
    with case.buffer(timeout=TIMEOUT) as buffer:
        got = buffer.dispatch(mine.x, mine.topk_idx)
        buffer.combine(got.recv_x, got.handle)
        dist.barrier()
        if rank == 0:
            _ip("-n", nodes[0], "link", "set", nodes[0], "down")
        time.sleep(0.5)
        start = time.monotonic()
        with pytest.raises(RankFailure) as caught:
            buffer.dispatch(mine.x, mine.topk_idx)
        return caught.value.rank, caught.value.phase, time.monotonic() - start


def test_two_namespaces_give_the_bits_of_one_node(nodes: tuple[str, str]) -> None:
    cases = [
        Case(ranks=4, tokens=TOKENS, per_node=2),
        Case(ranks=4, tokens=TOKENS, per_node=2, expand=True, alignment=4, bias=1, hidden=512, routing="zipf"),
    ]
    run_ranks(4, ep_cases.normal, cases, before=partial(enter, nodes), limit=60)
    run_ranks(4, one_node_refused, before=partial(enter, nodes))


def test_a_cut_link_is_named_within_the_timeout(nodes: tuple[str, str]) -> None:
    for rank, outcome in enumerate(run_ranks(4, cut, nodes, before=partial(enter, nodes))):
        culprit, phase, seconds = outcome.value
        assert culprit // 2 != rank // 2
        assert "between nodes" in phase
        assert seconds < TIMEOUT + 2
