"""The split-KV plan: what `hal.mla_plan` takes, and when a plan may be used.

A plan holds the schedule a backend made for certain lengths and a certain geometry. It is reusable over the layers of
one step and refused for anything else, because a stale schedule gives silently wrong results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from hal.spec.errors import SpecError
from hal.spec.mla import KV_FORMATS, QUERY_DTYPES, MlaDecodeArgs, MlaGeometry, check_cu_seqlens
from hal.spec.tensors import dtype_name, require_bool, require_choice, require_int, require_tensor, require_values
from hal.spec.validation import Level, validation_level

_INT32: Final = (torch.int32,)
_MAX_INT32: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class MlaPlanArgs:
    """One validated `hal.mla_plan` call, as a backend receives it.

    Attributes
    ----------
    cache_seqlens : Tensor
        [b] int32.
    cu_seqlens_q : Tensor or None
        [b + 1] int32 for ragged queries.
    geometry : MlaGeometry
    """

    cache_seqlens: Tensor
    cu_seqlens_q: Tensor | None
    geometry: MlaGeometry


def check_plan(
    cache_seqlens: Any,
    h_q: Any,
    h_kv: Any,
    s_q: Any,
    cu_seqlens_q: Any,
    head_dim: Any,
    head_dim_v: Any,
    page_size: Any,
    dtype: Any,
    kv_format: Any,
    causal: Any,
    batch_invariant: Any,
) -> MlaPlanArgs:
    """Check one call of `hal.mla_plan`.

    Raises
    ------
    SpecError
        An argument of the wrong type, shape, dtype or device; at level ``full`` also a negative length.
    """
    require_tensor("cache_seqlens", cache_seqlens, _INT32, 1, "[b]")
    require_int("h_kv", h_kv, 1, _MAX_INT32)
    require_int("h_q", h_q, 1, _MAX_INT32)
    if h_q % h_kv:
        raise SpecError("h_q", h_q, f"a multiple of h_kv = {h_kv}")
    require_int("s_q", s_q, 0, _MAX_INT32)
    require_int("head_dim", head_dim, 1, _MAX_INT32)
    require_int("head_dim_v", head_dim_v, 1, head_dim)
    require_int("page_size", page_size, 1, _MAX_INT32)
    if not isinstance(dtype, torch.dtype) or dtype not in QUERY_DTYPES:
        raise SpecError("dtype", dtype, " or ".join(map(dtype_name, QUERY_DTYPES)))
    require_choice("kv_format", kv_format, KV_FORMATS)
    require_bool("causal", causal)
    require_bool("batch_invariant", batch_invariant)
    batch = len(cache_seqlens)
    if cu_seqlens_q is not None:
        require_tensor("cu_seqlens_q", cu_seqlens_q, _INT32, 1, "[b + 1]")
        if len(cu_seqlens_q) != batch + 1:
            raise SpecError("cu_seqlens_q", f"shape {list(cu_seqlens_q.shape)}", f"[b + 1] = [{batch + 1}]")
        if cu_seqlens_q.device != cache_seqlens.device:
            raise SpecError("cu_seqlens_q", f"device {cu_seqlens_q.device}", f"{cache_seqlens.device}")
        s_q = 0
    if validation_level() is Level.FULL:
        require_values("cache_seqlens", cache_seqlens < 0, cache_seqlens, "0 or more")
        if cu_seqlens_q is not None:
            check_cu_seqlens(cu_seqlens_q, None)
    geometry = MlaGeometry(
        batch=batch,
        s_q=s_q,
        h_q=h_q,
        h_kv=h_kv,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        page_size=page_size,
        dtype=dtype,
        kv_format=kv_format,
        causal=causal,
        batch_invariant=batch_invariant,
        ragged_q=cu_seqlens_q is not None,
        device=cache_seqlens.device,
    )
    return MlaPlanArgs(cache_seqlens, cu_seqlens_q, geometry)


class _Stamp:
    """Remembers an index tensor so that another one, or the same one changed, is told apart.

    On the host the values are compared, which is cheap. On a device that would mean waiting, so identity of memory and
    torch's version counter stand for the values, except at level ``full``. The tensor itself is kept: its memory cannot
    be handed to another tensor while the plan lives.
    """

    __slots__ = ("name", "tensor", "values", "version")

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name = name
        self.tensor = tensor
        self.values = tensor.clone()
        self.version = _version(tensor)

    def check(self, tensor: Tensor, level: Level) -> None:
        if tensor.device.type == "cpu" or level is Level.FULL:
            same = torch.equal(tensor, self.values)
        else:
            same = tensor.data_ptr() == self.tensor.data_ptr() and _version(tensor) == self.version
        if not same:
            legal = f"one made for this {self.name}: call mla_plan again"
            raise SpecError("plan", f"a plan made for other values of {self.name}", legal)


def _version(tensor: Tensor) -> int | None:
    # Inference tensors keep no version counter.
    return None if tensor.is_inference() else tensor._version


@dataclass(frozen=True, slots=True, eq=False)
class MlaPlan:
    """A split-KV schedule for one step: made by `hal.mla_plan`, passed as ``plan=`` to every layer's `hal.mla_decode`.

    Attributes
    ----------
    backend : str
        The backend that made it, the only one that may use it.
    geometry : MlaGeometry
        The sizes it was made for.
    schedule : object
        The backend's own data.
    """

    backend: str
    geometry: MlaGeometry
    schedule: object
    _stamps: tuple[_Stamp, ...]

    @staticmethod
    def make(backend: str, args: MlaPlanArgs, schedule: object) -> MlaPlan:
        """Bind a backend's schedule to the lengths and sizes it was made for."""
        stamps = [_Stamp("cache_seqlens", args.cache_seqlens)]
        if args.cu_seqlens_q is not None:
            stamps.append(_Stamp("cu_seqlens_q", args.cu_seqlens_q))
        return MlaPlan(backend, args.geometry, schedule, tuple(stamps))

    def check(self, args: MlaDecodeArgs, geometry: MlaGeometry, backend: str) -> None:
        """Refuse to be used for a call it was not made for.

        Raises
        ------
        SpecError
            Another backend, other sizes or other lengths; names the first that differs.
        """
        if backend != self.backend:
            raise SpecError("plan", f"a plan of backend {self.backend!r}", f"one made by {backend!r}")
        if args.indices is not None or args.cache_seqlens is None:
            raise SpecError("plan", "a plan together with indices", "None for sparse decode")
        level = validation_level()
        if level is Level.OFF:
            return
        if geometry != self.geometry:
            rows = zip(geometry._fields, geometry, self.geometry, strict=True)
            name, have, want = next(row for row in rows if row[1] != row[2])
            raise SpecError(
                "plan", f"a plan made for {name} {want}", f"one made for {name} {have}: call mla_plan again"
            )
        self._stamps[0].check(args.cache_seqlens, level)
        if args.cu_seqlens_q is not None:
            self._stamps[1].check(args.cu_seqlens_q, level)
