"""Messages between the ranks of a node."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from pathlib import Path

import pytest

from hal import RankFailure
from hal.ep.lines import Lines


def pair() -> list[Lines]:
    """Two ends in one process; the second believes the first to be a process of its own."""
    given: list[int] = []
    first = Lines(0, lambda file: given.append(os.dup(file)) or {})  # type: ignore[func-returns-value]
    ends: list[int] = []
    second = Lines(1, lambda file: ends.append(os.dup(file)) or {0: (given[0], -1)})  # type: ignore[func-returns-value]
    first._ends[1] = socket.socket(fileno=ends[0])
    first._ends[1].setblocking(False)
    return [first, second]


def test_messages_come_whole_in_order_and_with_their_files(tmp_path: Path) -> None:
    first, second = pair()
    (tmp_path / "file").write_text("content")
    with open(tmp_path / "file") as file:
        second.tell(0, {"n": 1, "long": "x" * 50_000})
        second.tell(0, {"n": 2}, [file.fileno()])
    (one, long, none), (two, short, files) = first.listen(1)
    assert (one, two, long["n"], none) == (1, 1, 1, []) and len(long["long"]) == 50_000 and short == {"n": 2}
    with os.fdopen(files[0]) as there:
        assert there.read() == "content"
    assert first.listen(0) == []
    first.close()
    second.tell(0, {"n": 3})  # nobody's loss
    second.close()
    second.close()


def test_who_does_not_read_is_named_within_the_time() -> None:
    first, second = pair()
    begin = time.monotonic()

    def tell() -> None:
        for _ in range(1000):
            second.tell(0, {"long": "x" * 50_000}, timeout=0.3)

    with pytest.raises(RankFailure, match=r"rank 0 .* does not read"):
        tell()
    assert time.monotonic() - begin < 5
    first.close()
    second.close()


def test_a_message_too_long_to_send_is_an_error() -> None:
    first, second = pair()
    with pytest.raises(RankFailure, match="cannot be sent"):
        second.tell(0, {"long": "x" * (64 << 20)})
    first.close()
    second.close()


def test_a_process_that_ends_is_gone() -> None:
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    mine, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    held: list[int] = []

    def trade(file: int) -> dict[int, tuple[int, int]]:
        held.append(os.dup(file))
        return {1: (other.detach(), os.pidfd_open(process.pid))}

    lines = Lines(0, trade)
    lines.listen(0)
    assert lines.gone == {}
    process.kill()
    lines.listen(10)
    assert lines.gone == {1: "its process ended"}
    process.wait()
    os.close(held[0])
    mine.close()
    lines.close()


def test_who_hangs_up_is_gone() -> None:
    mine, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    lines = Lines(0, lambda file: {1: (other.detach(), -1)})  # keeps no end to write to
    assert lines.listen(10) == []
    assert lines.gone == {1: "it hung up"}
    assert lines.listen(0) == []
    mine.close()
    lines.close()
