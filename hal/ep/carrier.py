"""Rows of devices between nodes by the library for such devices (NCCL, RCCL, MCCL), past the host's memory.

What ranks tell each other of a call stays on the host (`hal.ep.wire`), where a rank that is gone shows at once. The
library moves rows alone, in one exchange of all ranks for each step of a call, so that nobody waits for another's turn.
It has a device for every rank, or is not used. A rank that dies within an exchange leaves the others waiting: they give
the library up then, and name whoever does not answer on the host.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as LateError
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from hal.ep.rendezvous import agree, exchange_over, host_identity
from hal.spec.ep import EpBufferArgs
from hal.spec.errors import RankFailure, SpecError, first_line

ENV: Final = "HAL_EP_ROWS"
"""``host``: rows pass through the host's memory even where a library could carry them. On every rank alike."""

_FOREVER: Final = timedelta(days=1000)
_NAPS: Final = (0.00002, 0.002)
_PATIENCE: Final = 2.0
"""Seconds for a library to be given up in."""

_UNWATCHED: Final = {"TORCH_NCCL_BLOCKING_WAIT": "1"}
"""With it torch starts no watchdog, which would end the process where a rank is lost, or keep it for a minute first."""

_handling: Final = threading.Lock()
"""Held while the environment says something else than its owner has set."""

Maker = Callable[[Any, int, int], Any]


class Carrier:
    """One rank's end.

    Parameters
    ----------
    library : object
        A backend of torch.distributed with ``alltoall_base``, for this buffer alone.
    rank, ranks : int
    device : torch.device
    """

    def __init__(self, library: Any, rank: int, ranks: int, device: torch.device) -> None:
        self._library, self._rank, self._ranks, self._device = library, rank, ranks, device
        self._connected = False

    def trade(
        self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]], timeout: float
    ) -> bool:
        """Move rows; collective, whatever a rank has to send.

        Returns
        -------
        bool
            Whether all have come within ``timeout`` seconds. If not, the library must not be used again.
        """
        out, given = self._flat(sends)
        into = [0] * self._ranks
        for peer, rows in receives:
            into[peer] += rows.numel() * rows.itemsize
        into[self._rank] = 1
        landing = torch.empty(sum(into), dtype=torch.uint8, device=self._device)
        end, nap = time.monotonic() + timeout, _NAPS[0]
        try:
            work = self._exchanged(end, landing, out, into, given, dist.AllToAllOptions())
            if work is None:
                return False
            self._connected = True
            while not work.is_completed():
                if time.monotonic() > end:
                    return False
                time.sleep(nap)
                nap = min(2 * nap, _NAPS[1])
            # Orders the caller's stream behind the library's; and raises what went wrong.
            work.wait()
        except RuntimeError:
            # Each library has its own words, none of which says which rank it is.
            return False
        pieces = dict(enumerate(torch.split(landing, into)))
        for peer, rows in receives:
            size = rows.numel() * rows.itemsize
            rows.view(torch.uint8).view(-1).copy_(pieces[peer][:size])
            pieces[peer] = pieces[peer][size:]
        return True

    def _exchanged(self, end: float, *given: Any) -> Any:
        """What comes of an exchange; None if the first, in which a library connects all ranks, is late or fails."""
        library = self._library
        if self._connected:
            return library.alltoall_base(*given)
        module = torch.get_device_module(self._device.type)
        stream, came = module.current_stream(), Future[Any]()

        def first() -> None:
            # A thread has a stream, and with it a device, of its own.
            try:
                with module.stream(stream):
                    came.set_result(library.alltoall_base(*given))
            except BaseException as error:
                # Without its frames, which would keep the library for as long as nobody looks for such circles.
                came.set_exception(error.with_traceback(None))

        # Nobody waits for it when the process ends, as the pools of the standard library do.
        threading.Thread(target=first, name="hal-ep-connect", daemon=True).start()
        try:
            error = came.exception(max(0.0, end - time.monotonic()))
        except LateError:
            return None
        if error is not None and not isinstance(error, RuntimeError):
            raise error
        return None if error else came.result()

    def _flat(self, sends: Sequence[tuple[int, Tensor]]) -> tuple[Tensor, list[int]]:
        """All bytes by the rank they go to, and how many for each: one for itself, since nothing is no exchange."""
        pieces: list[list[Tensor]] = [[] for _ in range(self._ranks)]
        pieces[self._rank].append(torch.zeros(1, dtype=torch.uint8, device=self._device))
        for peer, rows in sends:
            pieces[peer].append(rows.contiguous().view(torch.uint8).view(-1))
        sizes = [sum(len(one) for one in parts) for parts in pieces]
        return torch.cat([one for parts in pieces for one in parts]), sizes

    def close(self) -> None:
        """Give the library up, whatever it still waits for. Idempotent."""
        if self._library is None:
            return
        # Its last reference goes in the thread: taking it apart may wait, and nobody is to wait for that.
        last = [self._library]
        self._library = None

        def abort() -> None:
            library = last.pop()
            with contextlib.suppress(RuntimeError, AttributeError):
                library.abort()

        giving_up = threading.Thread(target=abort, name="hal-ep-abort", daemon=True)
        giving_up.start()
        giving_up.join(_PATIENCE)


def carrier(args: EpBufferArgs) -> Carrier | None:
    """What carries rows of a buffer's device between all its ranks; None where the host does. Collective.

    Raises
    ------
    SpecError
        ``HAL_EP_ROWS`` is wrong, or differs between ranks.
    RankFailure
        A rank does not come.
    """
    exchange = exchange_over(args.group, args.timeout)
    wrong: dict[str, Any] = {}
    try:
        # What differs: whose device it is. What all must have: something to carry with.
        identity, maker = _asked(args), _maker(args)
    except SpecError as error:
        identity, maker, wrong = "", None, {ENV: error}
    agree(exchange, wrong or {ENV: identity})
    everyone = exchange((maker is not None, _device_of(args)))
    if not all(able for able, _ in everyone) or len({device for _, device in everyone}) < args.num_ranks:
        return None
    assert maker is not None
    failure: dict[str, Any] = {}
    library = None
    try:
        library = maker(exchange.store("rows"), args.rank, args.num_ranks)
    except RuntimeError as error:
        reason = first_line(error)
        failure["group"] = RankFailure(args.rank, "opening the buffer", f"its library for devices fails ({reason})")
    agree(exchange, failure)
    return Carrier(library, args.rank, args.num_ranks, args.device)


def _asked(args: EpBufferArgs) -> str:
    asked = os.environ.get(ENV) or "device"
    if asked not in ("host", "device"):
        raise SpecError(ENV, repr(asked), "host or device, or unset")
    return asked


def _maker(args: EpBufferArgs) -> Maker | None:
    """What makes a library for a buffer's device; None where rows are the host's, or somebody may be masked."""
    if args.device.type == "cpu" or args.mask_ranks or _asked(args) == "host":
        return None
    name = dist.get_default_backend_for_device(args.device.type)
    if name == "nccl" and dist.is_nccl_available():
        return _nccl
    plugin = getattr(dist.Backend, "_plugins", {}).get(name.upper())
    if plugin is None or plugin.extended_api:
        return None
    return lambda store, rank, ranks: plugin.creator_fn(store, rank, ranks, _FOREVER)


def _nccl(store: Any, rank: int, ranks: int) -> Any:
    """NCCL, or RCCL under the same name; neither its timeout nor a lost connection is to end the process."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = _FOREVER
    with _handling, _environment(_UNWATCHED):
        return dist.ProcessGroupNCCL(store, rank, ranks, options)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """What is made within finds these in the environment, which it asks once."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _device_of(args: EpBufferArgs) -> tuple[str, str]:
    """Which device it is, in all machines of a group."""
    if args.device.type == "cpu":
        return host_identity(), "cpu"
    properties = torch.get_device_module(args.device.type).get_device_properties(args.device)
    return host_identity(), str(getattr(properties, "uuid", args.device))
