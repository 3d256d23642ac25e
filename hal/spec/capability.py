"""What a backend can do, as data.

`Capabilities` is the single source of what may be asked of a backend: the front refuses every call outside it with
`UnsupportedError`, and conformance tests every value inside it. No field has a default, so nothing is declared or left
out by accident.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from hal.spec.errors import SpecError

MAX_HEAD_DIM: Final = 576
"""Of the published interface: 512 columns without position and 64 with it."""

MAX_PAGE_SIZE: Final = 256
"""Of the published interface."""


@dataclass(frozen=True, slots=True)
class Ints:
    """A set of legal integers: an explicit list, or a range with a step.

    Parameters
    ----------
    low, high : int
        Inclusive bounds; ``high=None`` is unbounded.
    multiple_of : int
        Every member is a multiple of it.
    only : tuple of int
        When not empty, exactly these values; the bounds are then ignored.
    """

    low: int = 1
    high: int | None = None
    multiple_of: int = 1
    only: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.multiple_of < 1:
            raise SpecError("multiple_of", self.multiple_of, "an integer of 1 or more")
        if not self.only and self.high is not None and self.high < self.low:
            raise SpecError("high", self.high, f"at least low = {self.low}")

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int):
            return False
        if self.only:
            return value in self.only
        return value >= self.low and (self.high is None or value <= self.high) and value % self.multiple_of == 0

    def __str__(self) -> str:
        if self.only:
            return " or ".join(map(str, self.only))
        step = "" if self.multiple_of == 1 else f", multiples of {self.multiple_of}"
        if self.high is None:
            return f"{self.low} or more{step}"
        return f"{self.low}…{self.high}{step}"


def only(*values: int) -> Ints:
    """Exactly these integers."""
    return Ints(only=values)


def _strings(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, str) for item in value)


def _require_types(section: Any) -> None:
    """Refuse a declaration whose fields are not what their annotations say: it comes from outside, as data."""
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if not _KINDS[str(item.type)](value):
            raise SpecError(f"{type(section).__name__}.{item.name}", repr(value), item.type)


@dataclass(frozen=True, slots=True)
class MlaCapabilities:
    """What one kind of MLA decode (dense or sparse) accepts.

    Parameters
    ----------
    dtypes : tuple of str
        Element types of q, of out, and of a plain cache: ``"bfloat16"``, ``"float16"``, ``"float32"``.
    kv_formats : tuple of str
        Members of `hal.spec.mla.KV_FORMATS`: ``"plain"`` (as q), ``"v32"``, ``"model1"``.
    head_dim, head_dim_v : Ints
        Legal d and legal head_dim_v (which never exceeds d).
    h_q, h_kv, s_q, page_size : Ints
        Query heads, KV heads, queries a sequence, tokens a page.
    causal, ragged_q, batch_invariant, attn_sink, extra_kv_cache : bool
        Whether ``causal=True``, ``cu_seqlens_q``, ``batch_invariant=True``, ``attn_sink`` and the extra cache work.
    lse_bases : tuple of str
        ``"e"``, ``"2"``.
    topk : Ints or None
        For the sparse kind the legal widths of ``indices``; None for the dense kind.
    """

    dtypes: tuple[str, ...]
    kv_formats: tuple[str, ...]
    head_dim: Ints
    head_dim_v: Ints
    h_q: Ints
    h_kv: Ints
    s_q: Ints
    page_size: Ints
    causal: bool
    ragged_q: bool
    batch_invariant: bool
    lse_bases: tuple[str, ...]
    attn_sink: bool
    extra_kv_cache: bool
    topk: Ints | None

    def __post_init__(self) -> None:
        _require_types(self)


def plain_dense(dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32")) -> MlaCapabilities:
    """All of dense decode on plain caches; packed caches, sinks and chosen tokens left out."""
    return MlaCapabilities(
        dtypes=dtypes,
        kv_formats=("plain",),
        head_dim=Ints(1, MAX_HEAD_DIM),
        head_dim_v=Ints(1, MAX_HEAD_DIM),
        h_q=Ints(1),
        h_kv=Ints(1),
        s_q=Ints(1),
        page_size=Ints(1, MAX_PAGE_SIZE),
        causal=True,
        ragged_q=True,
        batch_invariant=True,
        lse_bases=("e", "2"),
        attn_sink=False,
        extra_kv_cache=False,
        topk=None,
    )


@dataclass(frozen=True, slots=True)
class EpCapabilities:
    """What expert-parallel communication accepts.

    Parameters
    ----------
    modes : tuple of str
        ``"normal"``, ``"low_latency"``.
    layouts : tuple of str
        Row layouts of the normal mode: ``"rank"`` (a row per token and rank), which is what a dispatch gives by default
        and belongs to every normal mode, and ``"expand"`` (a row per token and local expert). May be empty without a
        normal mode.
    dtypes : tuple of str
        What may travel: ``"bfloat16"``, ``"float16"``, ``"float32"``, of which a buffer has one and combine makes sums,
        and ``"float8_e4m3fn"`` (a scale per 128 columns).
    casts : tuple of str
        What low-latency dispatch may turn rows into on the way, members of `hal.spec.ep.CASTS`: ``"none"``, ``"fp8"``,
        ``"fp8_pow2"`` (power-of-two scales), ``"fp8_ue8m0"`` (the same, packed). May be empty without a low-latency
        mode.
    transports : tuple of str
        Inside a node and between nodes, for instance ``"shm"``, ``"ipc"``, ``"torch.distributed"``.
    overflow : tuple of str
        Policies for more rows than a window holds, members of `hal.spec.ep.OVERFLOW`; ``"error"``, a buffer's default,
        is one of them always.
    ranks, nodes, topk, num_experts : Ints
        Group size, nodes the group may span (1, the default, always), experts a token, experts in all.
    row_bytes : Ints
        Legal sizes of one token row, in bytes; of them only multiples of 16 are ever asked for.
    recv_hook, async_finish, cached_handle, mask_ranks, zero_copy_combine, pre_reduce : bool
        Whether those features work.
    across_nodes : tuple of str
        Which modes, which overflow policies, and whether ``"mask_ranks"``, work in a group of several nodes too.
    """

    modes: tuple[str, ...]
    layouts: tuple[str, ...]
    dtypes: tuple[str, ...]
    casts: tuple[str, ...]
    transports: tuple[str, ...]
    overflow: tuple[str, ...]
    ranks: Ints
    nodes: Ints
    topk: Ints
    num_experts: Ints
    row_bytes: Ints
    recv_hook: bool
    async_finish: bool
    cached_handle: bool
    mask_ranks: bool
    zero_copy_combine: bool
    pre_reduce: bool
    across_nodes: tuple[str, ...]

    def __post_init__(self) -> None:
        _require_types(self)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Everything a backend declares; None means the whole operation is not offered.

    Parameters
    ----------
    device_types : tuple of str
        ``torch.device`` types whose tensors the backend takes.
    mla_dense, mla_sparse : MlaCapabilities or None
        Decode over whole sequences, and over chosen tokens (``indices``).
    ep : EpCapabilities or None
        Expert-parallel communication.
    """

    device_types: tuple[str, ...]
    mla_dense: MlaCapabilities | None
    mla_sparse: MlaCapabilities | None
    ep: EpCapabilities | None

    def __post_init__(self) -> None:
        _require_types(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """The same as one JSON document with sorted keys."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Capabilities:
        """Rebuild from `to_dict`.

        Raises
        ------
        SpecError
            A field is missing or unknown.
        """
        fields = {f.name for f in dataclasses.fields(Capabilities)}
        if set(data) != fields:
            raise SpecError("capabilities", sorted(data), sorted(fields))
        return Capabilities(
            device_types=tuple(data["device_types"]),
            mla_dense=_section(MlaCapabilities, data["mla_dense"]),
            mla_sparse=_section(MlaCapabilities, data["mla_sparse"]),
            ep=_section(EpCapabilities, data["ep"]),
        )


_KINDS: dict[str, Callable[[Any], bool]] = {
    "tuple[str, ...]": _strings,
    "bool": lambda value: isinstance(value, bool),
    "Ints": lambda value: isinstance(value, Ints),
    "Ints | None": lambda value: value is None or isinstance(value, Ints),
    "MlaCapabilities | None": lambda value: value is None or isinstance(value, MlaCapabilities),
    "EpCapabilities | None": lambda value: value is None or isinstance(value, EpCapabilities),
}


def _section(cls: type[Any], data: dict[str, Any] | None) -> Any:
    if data is None:
        return None
    names = {f.name for f in dataclasses.fields(cls)}
    if set(data) != names:
        raise SpecError(cls.__name__, sorted(data), sorted(names))
    return cls(**{name: _value(value) for name, value in data.items()})


def _value(value: Any) -> Any:
    if isinstance(value, dict):
        return Ints(value["low"], value["high"], value["multiple_of"], tuple(value["only"]))
    return tuple(value) if isinstance(value, list) else value
