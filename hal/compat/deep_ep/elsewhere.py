"""What the published V2 ``ElasticBuffer`` does besides expert parallelism: its place is kept, every call is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hal.compat.deep_ep.pool import unsupported

Shapes = tuple[int, ...] | torch.Size | Sequence[tuple[int, ...] | torch.Size]


def _refuse(name: str) -> Exception:
    return unsupported(name, "Engram, pipeline or all-gather communication", "expert-parallel dispatch and combine")


class Elsewhere:
    """Remote key-value fetches, pipeline send and receive, all-gather sessions: no backend declares them.

    Every method raises UnsupportedError.
    """

    @staticmethod
    def get_engram_storage_size_hint(
        num_entries: int, hidden: int, num_max_tokens_per_rank: int, dtype: torch.dtype = torch.bfloat16
    ) -> tuple[int, int]:
        """Refused."""
        raise _refuse("get_engram_storage_size_hint")

    @staticmethod
    def get_pp_buffer_size_hint(num_max_tensor_bytes: int, num_max_inflight_tensors: int) -> int:
        """Refused."""
        raise _refuse("get_pp_buffer_size_hint")

    @staticmethod
    def get_agrs_num_max_session_bytes(group: Any, shapes: Shapes, dtype: torch.dtype) -> int:
        """Refused."""
        raise _refuse("get_agrs_num_max_session_bytes")

    @staticmethod
    def get_agrs_buffer_size_hint(group: Any, num_max_session_bytes: int) -> int:
        """Refused."""
        raise _refuse("get_agrs_buffer_size_hint")

    def engram_write(self, storage: Tensor, sf: Tensor | None = None) -> None:
        """Refused."""
        raise _refuse("engram_write")

    def engram_fetch(
        self, indices: Tensor, num_qps: int = 0, use_tma_aligned_col_major_sf: bool = False
    ) -> Callable[[], Any]:
        """Refused."""
        raise _refuse("engram_fetch")

    def pp_set_config(self, num_max_tensor_bytes: int, num_max_inflight_tensors: int) -> None:
        """Refused."""
        raise _refuse("pp_set_config")

    def pp_send(self, t: Tensor, dst_rank_idx: int, num_sms: int = 0) -> None:
        """Refused."""
        raise _refuse("pp_send")

    def pp_recv(self, t: Tensor, src_rank_idx: int, num_sms: int = 0) -> None:
        """Refused."""
        raise _refuse("pp_recv")

    def create_agrs_session(self) -> None:
        """Refused."""
        raise _refuse("create_agrs_session")

    def destroy_agrs_session(self) -> None:
        """Refused."""
        raise _refuse("destroy_agrs_session")

    @contextmanager
    def agrs_new_session(self, enabled: bool = True) -> Iterator[None]:
        """Refused, unless ``enabled`` is False: then nothing happens."""
        if enabled:
            raise _refuse("agrs_new_session")
        yield

    def agrs_set_config(self, num_max_session_bytes: int, num_max_all_gathers_per_session: int) -> None:
        """Refused."""
        raise _refuse("agrs_set_config")

    def agrs_get_inplace_tensor(self, shapes: Shapes, dtype: torch.dtype) -> Any:
        """Refused."""
        raise _refuse("agrs_get_inplace_tensor")

    def all_gather(self, t: Tensor | Sequence[Tensor]) -> Any:
        """Refused."""
        raise _refuse("all_gather")
