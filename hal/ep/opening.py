"""Opening a buffer: its arguments are checked on every rank, and all ranks go on or raise the same."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.distributed as dist

from hal import plugins
from hal.ep.faults import EpFaults
from hal.ep.launch import launched_ranks_per_node, resolved_device
from hal.ep.rendezvous import agree, exchange_over
from hal.spec.ep import (
    EpBufferArgs,
    check_buffer,
    is_timeout,
    require_ep_declared,
)
from hal.spec.errors import SpecError

TIMEOUT: Final = 30.0


def agreed_args(
    group: Any,
    *,
    num_experts: int,
    hidden: int,
    topk: int,
    max_tokens_per_rank: int,
    dtype: torch.dtype,
    modes: Sequence[str],
    max_recv_tokens: int | None,
    overflow: str,
    ranks_per_node: int | None,
    pre_reduce: bool,
    timeout: float,
    mask_ranks: bool,
    device: torch.device | str | None,
    faults: object,
    backend: str | None,
) -> tuple[EpBufferArgs, plugins.Selected]:
    """The geometry of a buffer that every rank of the group opens, and the backend that has it.

    Raises
    ------
    SpecError, UnsupportedError, BackendUnavailable, RankFailure
        As `hal.EpBuffer`.
    """
    if not dist.is_initialized():
        raise SpecError("group", "no initialised torch.distributed", "call torch.distributed.init_process_group")
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise SpecError("group", type(group).__name__, "a torch.distributed.ProcessGroup this process belongs to")
    exchange = exchange_over(group, float(timeout) if is_timeout(timeout) else TIMEOUT)
    num_ranks = dist.get_world_size(group)
    try:
        if faults is not None and not isinstance(faults, EpFaults):
            raise SpecError("faults", type(faults).__name__, "an EpFaults, or None")
        if ranks_per_node is None:
            ranks_per_node = launched_ranks_per_node(num_ranks)
        chosen = plugins.select(backend)
        args = check_buffer(
            group,
            num_ranks,
            dist.get_rank(group),
            num_experts,
            hidden,
            topk,
            max_tokens_per_rank,
            dtype,
            modes,
            max_recv_tokens,
            ranks_per_node,
            pre_reduce,
            overflow,
            timeout,
            mask_ranks,
            resolved_device(device, chosen.capabilities.device_types, chosen.name),
            faults,
        )
        require_ep_declared(args, chosen.capabilities.ep, chosen.name)
    except SpecError as error:
        agree(exchange, {error.argument: error})
        raise
    except Exception as error:
        with contextlib.suppress(SpecError):
            agree(exchange, {"backend": SpecError("backend", str(error), "one that can open this buffer")})
        raise
    agree(exchange, {"backend": chosen.name, **_agreed(args)})
    return args, chosen


def _agreed(args: EpBufferArgs) -> dict[str, Any]:
    alike = (
        "num_experts",
        "hidden",
        "topk",
        "max_tokens_per_rank",
        "dtype",
        "modes",
        "max_recv_tokens",
        "ranks_per_node",
        "pre_reduce",
        "overflow",
        "mask_ranks",
    )
    return {name: getattr(args, name) for name in alike}
