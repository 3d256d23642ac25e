"""Posts between nodes: what is handed to the communication library, and whose connections they go over."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed import fake_pg  # noqa: F401  (registers the library "fake")

from hal.ep.posts import Posts
from hal.ep.rendezvous import exchange_over


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a device: its bytes are to be had by `cpu`, and put there by `copy_`, alone."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("meta")

    def cpu(self) -> torch.Tensor:  # type: ignore[override]
        return self.as_subclass(torch.Tensor).clone()


class Echo:
    """A library that moves tensors of the host, and gives back what it was sent."""

    def __init__(self) -> None:
        self.sent: dict[int, torch.Tensor] = {}
        self.settled: list[str] = []

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Any:
        (rows,) = tensors
        assert type(rows) is torch.Tensor and rows.device.type == "cpu"
        self.sent[peer] = rows.clone()
        return types.SimpleNamespace(wait=lambda timeout: None)

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Any:
        (room,) = tensors
        assert type(room) is torch.Tensor and room.device.type == "cpu"

        def wait(timeout: Any) -> None:
            if peer == 2:
                raise RuntimeError("connection reset")
            room.copy_(self.sent[peer])

        return types.SimpleNamespace(wait=wait)


@pytest.mark.parametrize("kind", [torch.Tensor, Elsewhere])
def test_rows_of_a_device_go_through_the_host(kind: type[torch.Tensor]) -> None:
    rows = torch.arange(12, dtype=torch.uint8).view(3, 4).as_subclass(kind)
    into, lost = (torch.full((3, 4), 7, dtype=torch.uint8).as_subclass(kind) for _ in range(2))
    posts = Posts(Echo())
    # The echo needs what was sent before it answers, whatever the order of posts.
    with torch.device("meta"):  # whatever the default is
        assert posts.trade([(1, rows)], [], 0, 5.0) == ({}, {})
        failed, waited = posts.trade([], [(1, into), (2, lost)], 1, 5.0)
    posts.close()
    assert failed == {2: "connection reset"} and list(waited) == [1]
    assert into.tolist() == rows.tolist()
    assert lost.tolist() == torch.full((3, 4), 7).tolist()


def test_a_buffer_has_connections_of_its_own_whatever_the_group_goes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device's library cannot be waited for with a time limit of ours, and two ranks that both receive first hang."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        assert isinstance(exchange_over(group, 5.0).communicator(5.0), dist.ProcessGroupGloo)
    finally:
        dist.destroy_process_group()
