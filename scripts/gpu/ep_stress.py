"""Rounds of dispatch, combine and both low-latency calls over routes that change, every row compared bit for bit.

    ep_stress.py --ranks N [--rounds 10000] [--seconds S] [--progress FILE]
    ep_stress.py --ranks N --lose kill|stop [--timeout S]

Half of the calls are put off: a rank computes, in memory that was let go of, before it waits for them; some results are
never waited for. What a row must be follows from round, rank, position and column, so that a row that is late, torn,
from another round or from another token is seen. With --progress, runs cut off by --seconds add up to --rounds. With
--lose the last rank dies or stops in the middle, and all others must name it within --timeout.

The backend is HAL_BACKEND's. Exit codes: 0 as it must be, 1 not, 2 a wrong request.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

import hal

HIDDEN: Final = 1024
MOST: Final = 64
TOPK: Final = 4
LOCAL: Final = 4
FP8: Final = torch.float8_e4m3fn
SHOWN: Final = 10


@dataclass(frozen=True, slots=True)
class Routes:
    """Who sends what in a round, the same on every rank.

    Attributes
    ----------
    number : int
    idx, weights : list of Tensor
        Of each rank, [n, K]; weights are 1 or 2, so that sums are exact.
    """

    number: int
    idx: list[Tensor]
    weights: list[Tensor]

    @staticmethod
    def draw(seed: int, number: int, ranks: int) -> Routes:
        """Any number of tokens a rank; experts uniform, or of few ranks, or of one, and some choices of none."""
        draw = torch.Generator().manual_seed(seed * 1_000_003 + number)
        experts, idx, weights = LOCAL * ranks, [], []
        law = torch.rand(experts, generator=draw) ** (1, 4, 16)[number % 3] + 1e-6
        for _ in range(ranks):
            n = int(torch.randint(0, MOST + 1, (), generator=draw))
            chosen = torch.multinomial(law.expand(max(n, 1), -1), TOPK, generator=draw)[:n]
            idx.append(chosen.masked_fill(torch.rand(n, TOPK, generator=draw) < 0.1, -1))
            weights.append(torch.randint(1, 3, (n, TOPK), generator=draw).float())
        return Routes(number, idx, weights)

    def tokens(self, test: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Rank and position of the tokens with a choice that passes, by rank and then by position."""
        found = [test(idx).any(1).nonzero()[:, 0] for idx in self.idx]
        rank = torch.cat([torch.full_like(one, number) for number, one in enumerate(found)])
        return rank, torch.cat(found)

    def rows(self, rank: Tensor, position: Tensor) -> Tensor:
        """Any 16 bits for tokens [n]: int32 [n, H] of them."""
        head = self.number * 40503 + rank * 10007 + position * 127
        return _spread(head, 31) & 0xFFFF

    def numbers(self, rank: Tensor, position: Tensor, to: Tensor, most: int) -> Tensor:
        """Small numbers for tokens [n] as they come back from ``to``: int32 [n, H]."""
        return _spread(self.number + 5 * rank + 3 * position + 7 * to, 1) % most


def _spread(head: Tensor, step: int) -> Tensor:
    return head[:, None].int() + step * torch.arange(HIDDEN, dtype=torch.int32, device=head.device)


def bits(rows: Tensor) -> Tensor:
    """As bf16 elements."""
    return rows.to(torch.int16).view(torch.bfloat16)


def narrow(rows: Tensor) -> Tensor:
    """Numbers that are exact in FP8: each group of 128 has a 448, so that its scale is one."""
    found = rows % 16
    found[:, ::128] = 448
    return found


@dataclass(slots=True)
class Player:
    """One rank's part.

    Attributes
    ----------
    seed, rank, ranks : int
    device : torch.device
    buffer : hal.EpBuffer
    wrong : list of str
        What was not as it must be.
    before : callable
        Told of each call that is about to be made.
    """

    seed: int
    rank: int
    ranks: int
    device: torch.device
    buffer: hal.EpBuffer
    before: Callable[[], None]
    wrong: list[str] = field(default_factory=list)

    def play(self, number: int) -> None:
        """One round."""
        routes = Routes.draw(self.seed, number, self.ranks)
        self._normal(routes, number % 4 in (1, 2))
        self._low_latency(routes, "fp8" if number % 2 else "none", hook=number % 4 > 1)

    def meanwhile(self) -> None:
        """What a caller does before it waits for a call."""
        for size in (1 << 12, 1 << 16, 1 << 20):
            torch.full((size,), torch.nan, device=self.device)

    def compare(self, what: str, number: int, got: Tensor, want: Tensor) -> None:
        """Bit for bit, row by row."""
        if got.shape != want.shape:
            self.wrong.append(f"round {number}, rank {self.rank}: {what} is {list(got.shape)}, not {list(want.shape)}")
            return
        if got.dtype.itemsize < 4:
            kind = {1: torch.uint8, 2: torch.int16}[got.dtype.itemsize]
            got, want = got.view(kind), want.view(kind)
        rows = (got != want).flatten(1).any(1).nonzero()[:, 0].tolist() if got.numel() else []
        if rows:
            self.wrong.append(f"round {number}, rank {self.rank}: {what} is wrong in {len(rows)} rows, first {rows[0]}")

    def _mine(self, routes: Routes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        idx, weights = routes.idx[self.rank], routes.weights[self.rank]
        position = torch.arange(len(idx))
        return idx, weights, torch.full_like(position, self.rank), position

    def _normal(self, routes: Routes, later: bool) -> None:
        number, here = routes.number, range(self.rank * LOCAL, (self.rank + 1) * LOCAL)
        idx, weights, me, position = self._mine(routes)
        x = bits(self._on(routes.rows, me, position))
        self.before()
        got = self.buffer.dispatch(x, idx.to(self.device), weights.to(self.device), async_finish=later)
        self.meanwhile()
        got.event.wait()
        rank, at = routes.tokens(lambda idx: (idx >= here.start) & (idx < here.stop))
        assert isinstance(got.recv_x, Tensor)
        self.compare("recv_x", number, got.recv_x, bits(self._on(routes.rows, rank, at)))
        self.compare("recv_src_rank", number, self._on(got.recv_src_rank)[:, None].int(), self._on(rank)[:, None].int())
        self.compare(
            "recv_src_position", number, self._on(got.recv_src_position)[:, None].int(), self._on(at)[:, None].int()
        )
        if len(got.recv_x) != len(rank):
            return
        y = self._on(lambda r, p: routes.numbers(r, p, torch.full_like(r, self.rank), 16), rank, at)
        self.before()
        back = self.buffer.combine(y.bfloat16(), got.handle, async_finish=later)
        self.meanwhile()
        back.event.wait()
        want = torch.zeros(len(idx), HIDDEN, device=self.device)
        for peer in range(self.ranks):
            there = self._on(((idx >= 0) & (idx // LOCAL == peer)).any(1))
            row = self._on(lambda r, p, to=peer: routes.numbers(r, p, torch.full_like(r, to), 16), me, position)
            want += row * there[:, None]
        self.compare("combined_x", number, back.combined_x, want.bfloat16())

    def _low_latency(self, routes: Routes, cast: str, hook: bool) -> None:
        number = routes.number
        idx, weights, me, position = self._mine(routes)
        rows = self._on(routes.rows, me, position)
        x = narrow(rows).bfloat16() if cast == "fp8" else bits(rows)
        self.before()
        on_device = idx.to(self.device)
        low = self.buffer.low_latency_dispatch(x, on_device, use_fp8=cast == "fp8", return_recv_hook=hook)
        if low.hook is not None:
            self.buffer.low_latency_dispatch(x, on_device, use_fp8=cast == "fp8", return_recv_hook=True)
            self.meanwhile()
            low.hook()
        slots, rank, at, expert = self._arrived(routes, low)
        if slots is None:
            return
        recv = low.recv_x[0] if isinstance(low.recv_x, tuple) else low.recv_x
        want = self._on(routes.rows, rank, at)
        packed = recv.flatten(0, 1)
        taken = packed.view(torch.uint8)[slots].view(packed.dtype) if cast == "fp8" else packed[slots]
        self.compare(
            f"packed recv_x ({cast})", number, taken, narrow(want).float().to(FP8) if cast == "fp8" else bits(want)
        )
        y = torch.zeros(packed.shape, dtype=torch.bfloat16, device=self.device)
        y[slots] = self._on(lambda r, p, e: routes.numbers(r, p, e, 8), rank, at, expert).bfloat16()
        self.before()
        back = self.buffer.low_latency_combine(
            y.view(recv.shape), on_device, weights.to(self.device), low.handle, return_recv_hook=hook
        )
        if back.hook is not None:
            self.meanwhile()
            back.hook()
        total = torch.zeros(len(idx), HIDDEN, device=self.device)
        for k in range(TOPK):
            row = self._on(lambda r, p, e: routes.numbers(r, p, e, 8), me, position, idx[:, k])
            total += row * self._on(weights[:, k] * (idx[:, k] >= 0))[:, None]
        self.compare(f"low-latency combined_x ({cast})", number, back.combined_x, total.bfloat16())

    def _arrived(self, routes: Routes, low: Any) -> tuple[Any, Tensor, Tensor, Tensor]:
        """Slots of the rows that came, and of each rank, position and expert; no slots if they are not all there."""
        ranges, info, most = low.handle.layout_range.cpu(), low.handle.src_info.cpu(), self.ranks * MOST
        parts: list[list[Tensor]] = []
        for local in range(LOCAL):
            expert = self.rank * LOCAL + local
            for rank, idx in enumerate(routes.idx):
                begin, count = int(ranges[local, rank]) >> 32, int(ranges[local, rank]) & 0xFFFFFFFF
                at = info[local, begin : begin + count].long()
                want = (idx == expert).any(1).nonzero()[:, 0]
                if sorted(at.tolist()) != want.tolist():
                    text = f"expert {expert} has {at.tolist()} of rank {rank}, not {want.tolist()}"
                    self.wrong.append(f"round {routes.number}, rank {self.rank}: {text}")
                    return None, at, at, at
                slots = local * most + begin + torch.arange(count)
                parts.append([slots, torch.full_like(at, rank), at, torch.full_like(at, expert)])
        every, ranks, positions, experts = (torch.cat(part) for part in zip(*parts, strict=True))
        return every.to(self.device), ranks, positions, experts

    def _on(self, make: Any, *given: Tensor) -> Tensor:
        """A tensor on the device, or what is made there of tensors."""
        if isinstance(make, Tensor):
            return make.to(self.device)
        made: Tensor = make(*(one.to(self.device) for one in given))
        return made


@dataclass(slots=True)
class Outcome:
    """What one rank came to."""

    rounds: int = 0
    wrong: list[str] = field(default_factory=list)
    named: int | None = None
    reason: str = ""
    at: float = 0.0


def work(given: argparse.Namespace, rank: int, folder: Path) -> None:
    """One rank, from beginning to end; never returns, for peers may be gone."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    ranks, name, device = given.ranks, os.environ["HAL_BACKEND"], torch.device("cpu")
    kind = hal.capabilities(name).device_types[0]
    if kind != "cpu":
        module = torch.get_device_module(kind)
        device = torch.device(kind, rank % module.device_count())
        module.set_device(device.index)
    meeting = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    outcome, chance = Outcome(), random.Random(f"{given.seed} {rank} {given.first}")
    # Before any of four calls a round, when nobody compiles any more.
    fatal = chance.randrange(given.rounds, 2 * given.rounds) if given.lose and rank == ranks - 1 else -1
    calls = 0

    def before() -> None:
        nonlocal calls
        if calls == fatal:
            (folder / "lost").write_text(str(time.monotonic()))
            os.kill(os.getpid(), signal.SIGKILL if given.lose == "kill" else signal.SIGSTOP)
        calls += 1
        if chance.random() < 0.1:
            time.sleep(chance.random() * 1e-3)  # nobody is always first

    begin = time.monotonic()
    try:
        with hal.EpBuffer(
            num_experts=LOCAL * ranks,
            hidden=HIDDEN,
            topk=TOPK,
            max_tokens_per_rank=MOST,
            timeout=given.timeout,
            device=device,
        ) as buffer:
            player = Player(given.seed, rank, ranks, device, buffer, before, outcome.wrong)
            for number in range(given.first, given.rounds):
                try:
                    player.play(number)
                except hal.RankFailure:
                    outcome.at = time.monotonic()  # closing takes time of its own
                    raise
                outcome.rounds += 1
                late = torch.tensor(float(time.monotonic() - begin > given.seconds or len(outcome.wrong) > SHOWN))
                if outcome.rounds % 16 == 0 and not given.lose:
                    dist.all_reduce(late, dist.ReduceOp.MAX)
                    if late:
                        break
            dist.barrier()  # others may still fetch from this rank
    except hal.RankFailure as failure:
        outcome.named, outcome.reason = failure.rank, str(failure)
    except BaseException as error:
        outcome.reason = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.json").write_text(json.dumps(asdict(outcome)))
    os._exit(0)


def start(given: argparse.Namespace) -> tuple[list[Outcome | None], float]:
    """All ranks; what became of each, None where it left nothing, and when the lost one was lost."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, __file__, *sys.argv[1:], "--first", str(given.first), "--seed", str(given.seed)]
        running = [subprocess.Popen([*command, "--worker", str(rank), "--folder", name]) for rank in range(given.ranks)]
        last = given.ranks - 1 if given.lose else given.ranks
        end = time.monotonic() + (120 + 3 * given.timeout if given.lose else given.seconds + 120)
        try:
            for process in running[:last]:
                process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            print("a rank did not come to an end", flush=True)
        for process in running:
            process.kill()
            process.wait()
        files = [folder / f"{rank}.json" for rank in range(given.ranks)]
        found = [Outcome(**json.loads(file.read_text())) if file.exists() else None for file in files]
        lost = folder / "lost"
        return found, float(lost.read_text()) if lost.exists() else 0.0


def stress(given: argparse.Namespace) -> int:
    """All rounds, or as many as there is time for."""
    found, _ = start(given)
    rounds = min((one.rounds if one else 0) for one in found)
    reasons = [one.reason if one else "it left nothing" for one in found]
    bad = [f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason]
    bad += [text for one in found if one for text in one.wrong]
    for text in bad[: 2 * SHOWN]:
        print(text)
    done, wrong = given.first + rounds, given.wrong + len(bad)
    if given.progress is not None:
        given.progress.write_text(
            json.dumps({"ranks": given.ranks, "seed": given.seed, "rounds": done, "wrong": wrong})
        )
    rest = "; the rest is for another run" if done < given.rounds else ""
    rounds_done = f"rounds {given.first} to {done} of {given.rounds}"
    print(f"{given.ranks} ranks, seed {given.seed}: {rounds_done}, {wrong} mismatches{rest}")
    return 1 if wrong or done < given.rounds else 0


def lose(given: argparse.Namespace) -> int:
    """The last rank goes; everybody else names it."""
    found, lost = start(given)
    victim, right = given.ranks - 1, bool(lost)
    for rank, one in enumerate(found[:victim]):
        took = one.at - lost if one else 0.0
        ok = one is not None and one.named == victim and not one.wrong and 0 < took <= given.timeout
        right &= ok
        said = one.reason or "it noticed nothing" if one else "it left nothing"
        if one and one.at:
            said = f"named rank {one.named} after {took:.2f} s: {said}"
        print(f"{'ok   ' if ok else 'WRONG'} rank {rank}: {said}")
    verdict = "all name the lost rank" if right else "WRONG: not all name the lost rank"
    print(f"{given.ranks} ranks, {given.lose}: {verdict} within {given.timeout:g} s")
    return 0 if right else 1


def main() -> int:
    """The parent's entry and the ranks'."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, default=1e6)
    parser.add_argument("--seed", type=int, default=12)
    parser.add_argument("--timeout", type=float)
    parser.add_argument("--lose", choices=("kill", "stop"))
    parser.add_argument("--progress", type=Path)
    for name, kind in (("worker", int), ("first", int), ("folder", Path)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not 2 <= given.ranks <= 16:
        parser.error(f"--ranks {given.ranks}: 2 to 16, beyond which sums are not exact")
    given.rounds = given.rounds or (100 if given.lose else 10_000)
    given.timeout = given.timeout or (10.0 if given.lose else 60.0)
    if given.worker is not None:
        work(given, given.worker, given.folder)
    given.first, given.wrong = 0, 0
    if given.progress is not None and given.progress.exists():
        before = json.loads(given.progress.read_text())
        if before["ranks"] != given.ranks:
            parser.error(f"--progress {given.progress}: of {before['ranks']} ranks, not of {given.ranks}")
        given.first, given.seed, given.wrong = before["rounds"], before["seed"], before["wrong"]
        if given.first >= given.rounds:
            rounds_done = f"all {given.rounds} rounds are done"
            print(f"{given.ranks} ranks, seed {given.seed}: {rounds_done}, {given.wrong} mismatches")
            return 1 if given.wrong else 0
    return lose(given) if given.lose else stress(given)


if __name__ == "__main__":
    sys.exit(main())
