"""MLA decode as the user calls it: check once, choose the backend, hand over."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hal import plugins
from hal.spec.errors import SpecError
from hal.spec.mla import LSE_BASES, check_decode, require_decode_declared, require_geometry_declared
from hal.spec.plan import MlaPlan, check_plan
from hal.spec.tensors import require_choice, require_device, require_shape, require_tensor

_ADMITTED_LIMIT = 4096
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_LSE_FLOATS = (torch.float32, torch.float64)


def mla_decode(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    *,
    head_dim_v: int = 512,
    softmax_scale: float | None = None,
    causal: bool = False,
    plan: MlaPlan | None = None,
    kv_format: str | None = None,
    indices: Tensor | None = None,
    topk_length: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_kv_cache: Tensor | None = None,
    extra_indices: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    out: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    lse_base: str = "e",
    batch_invariant: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a few new queries over a paged latent KV cache (forward only).

    For each query row, ``out = softmax(softmax_scale · q Kᵀ) V`` where K is the whole cached row and V its first
    ``head_dim_v`` columns. Layouts follow FlashMLA's ``flash_mla_with_kvcache``.

    Parameters
    ----------
    q : Tensor
        [b, s_q, h_q, d], bf16, fp16 or float32; or [total_q, h_q, d] with ``cu_seqlens_q``.
    kv_cache : Tensor
        [num_blocks, page_size, h_kv, d] of q's dtype, or packed FP8 rows (see ``kv_format``).
    block_table : Tensor or None
        [b, max_blocks] int32: page numbers of each sequence. Entries past the last used page may hold anything.
    cache_seqlens : Tensor or None
        [b] int32: cached tokens of each sequence, 0 included. Memory past them may hold anything, NaN included.
        ``block_table`` and ``cache_seqlens`` may be None with ``indices``, which does not use them.
    head_dim_v : int
        Columns of V, at most d.
    softmax_scale : float, optional
        Default d ** -0.5.
    causal : bool
        Query i of s_q sees positions up to ``cache_seqlens - s_q + i``.
    plan : MlaPlan, optional
        From `mla_plan`, for these lengths and sizes.
    kv_format : {"plain", "v32", "model1"}, optional
        Default ``"plain"``: elements as q.
    indices : Tensor, optional
        [b, s_q, topk] int32, sparse decode: token ``page * page_size + offset`` each, -1 a hole.
    topk_length : Tensor, optional
        [b] int32: only the leftmost so many indices count.
    attn_sink : Tensor, optional
        [h_q] float32: out is scaled by exp(lse) / (exp(lse) + exp(sink)); lse is not.
    extra_kv_cache, extra_indices, extra_topk_length : Tensor, optional
        A second cache of the same format and the indices into it.
    out : Tensor, optional
        Where to write; like q with last dimension ``head_dim_v``. Writing to memory mapped read-only ends the process,
        as anywhere else; only ``HAL_VALIDATE=full`` asks for that, since asking takes a quarter of the time of all
        other checks.
    cu_seqlens_q : Tensor, optional
        [b + 1] int32: sequence j owns query rows ``cu_seqlens_q[j]`` to ``cu_seqlens_q[j + 1]``.
    lse_base : {"e", "2"}
        Base of the returned logarithm.
    batch_invariant : bool
        A row's bits do not depend on the rest of the batch, on splits or on threads.
    backend : str, optional
        Overrides `hal.use` and ``HAL_BACKEND`` for this call.

    Returns
    -------
    out : Tensor
        Like q with last dimension ``head_dim_v``. 0 for a query with nothing to attend.
    lse : Tensor
        [b, h_q, s_q] ([h_q, total_q] for ragged queries) float32: log of the sum of exponentials of the scaled scores.
        +inf for a query with nothing to attend.

    Raises
    ------
    SpecError
        An argument is wrong; names it, what it got and what is legal.
    UnsupportedError
        The call is legal but the backend does not declare it.
    BackendUnavailable
        The chosen backend cannot be used.
    """
    args = check_decode(
        q,
        kv_cache,
        block_table,
        cache_seqlens,
        head_dim_v,
        softmax_scale,
        causal,
        kv_format,
        indices,
        topk_length,
        attn_sink,
        extra_kv_cache,
        extra_indices,
        extra_topk_length,
        out,
        cu_seqlens_q,
        lse_base,
        batch_invariant,
    )
    selected = plugins.select(backend)
    geometry = args.geometry()
    key = (geometry, lse_base, indices is None, attn_sink is None, extra_kv_cache is None)
    if key not in selected.admitted or indices is not None:
        require_decode_declared(args, selected.capabilities, selected.name)
        if len(selected.admitted) >= _ADMITTED_LIMIT:
            selected.admitted.clear()
        selected.admitted.add(key)
    if plan is not None:
        if not isinstance(plan, MlaPlan):
            raise SpecError("plan", type(plan).__name__, "what hal.mla_plan returned")
        plan.check(args, geometry, selected.name)
        args.schedule = plan.schedule
    selected.backend.mla_decode(args)
    return args.out, args.lse


def mla_plan(
    cache_seqlens: Tensor,
    *,
    h_q: int,
    h_kv: int = 1,
    s_q: int = 1,
    cu_seqlens_q: Tensor | None = None,
    head_dim: int = 576,
    head_dim_v: int = 512,
    page_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    kv_format: str = "plain",
    causal: bool = False,
    batch_invariant: bool = False,
    backend: str | None = None,
) -> MlaPlan:
    """Make the split-KV schedule of one step, to be used by all its layers.

    Parameters
    ----------
    cache_seqlens : Tensor
        [b] int32, as it will be passed to `mla_decode`; also a ragged ``cu_seqlens_q`` [b + 1].
    h_q, h_kv, s_q, head_dim, head_dim_v, page_size, dtype, kv_format, causal, batch_invariant
        The sizes and options of the decode calls. ``s_q`` is ignored with ``cu_seqlens_q``.
    backend : str, optional
        As for `mla_decode`.

    Returns
    -------
    MlaPlan
        Refused by `mla_decode` for other lengths, sizes or backends; once ``cache_seqlens`` changes, make a new one.

    Raises
    ------
    SpecError, UnsupportedError, BackendUnavailable
        As for `mla_decode`.
    """
    args = check_plan(
        cache_seqlens,
        h_q,
        h_kv,
        s_q,
        cu_seqlens_q,
        head_dim,
        head_dim_v,
        page_size,
        dtype,
        kv_format,
        causal,
        batch_invariant,
    )
    selected = plugins.select(backend)
    capabilities = selected.capabilities
    require_geometry_declared(args.geometry, capabilities, capabilities.mla_dense, selected.name)
    return MlaPlan.make(selected.name, args, selected.backend.mla_plan(args))


def mla_merge(
    outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor, *, lse_base: str = "e"
) -> tuple[Tensor, Tensor]:
    """Merge partial results of one attention whose context was split, for instance over ranks.

    ``out = Σ wᵢ outᵢ / Σ wᵢ`` with ``wᵢ = exp(lseᵢ − max lse)``, summed in float32 in the order given.

    Parameters
    ----------
    outs : sequence of Tensor, or one Tensor stacked along dimension 0
        Partial results, all [b, s_q, h_q, d_v] or all [total_q, h_q, d_v].
    lses : sequence of Tensor, or one Tensor stacked along dimension 0
        Their logarithms, [b, h_q, s_q] or [h_q, total_q]. +inf (or −inf) marks a part that attended nothing: its out is
        not read.
    lse_base : {"e", "2"}
        Base of ``lses`` and of the result.

    Returns
    -------
    out, lse : Tensor
        Of the dtypes of the parts. A row that is empty in every part gives 0 and +inf.

    Raises
    ------
    SpecError
        No parts, unequal counts, or shapes, dtypes or devices that do not match.
    """
    require_choice("lse_base", lse_base, LSE_BASES)
    outs, lses = _parts("outs", outs), _parts("lses", lses)
    _check_parts(outs, lses)
    accumulate = torch.promote_types(outs[0].dtype, torch.float32)
    stacked = torch.stack(lses).to(torch.promote_types(lses[0].dtype, accumulate))
    empty = stacked.isinf()
    finite = stacked.masked_fill(empty, -torch.inf)
    highest = finite.amax(0)
    nothing = empty.all(0)
    shift = highest.masked_fill(nothing, 0)
    exp, log = (torch.exp2, torch.log2) if lse_base == "2" else (torch.exp, torch.log)
    weights = exp(finite - shift)
    total = weights.sum(0)
    merged = torch.zeros(outs[0].shape, dtype=accumulate, device=outs[0].device)
    for part, weight, absent in zip(outs, weights / total.masked_fill(nothing, 1), empty, strict=True):
        rows = part.to(accumulate).masked_fill(_per_row(absent), 0)
        merged += rows * _per_row(weight)
    lse = (shift + log(total)).masked_fill(nothing, torch.inf)
    return merged.to(outs[0].dtype), lse.to(lses[0].dtype)


def _per_row(lse: Tensor) -> Tensor:
    """[b, h_q, s_q] → [b, s_q, h_q, 1], or [h_q, total_q] → [total_q, h_q, 1]: the layout of out."""
    return lse.transpose(-1, -2).unsqueeze(-1)


def _parts(name: str, parts: Sequence[Tensor] | Tensor) -> list[Tensor]:
    stacked = isinstance(parts, Tensor) and not parts.is_nested and parts.dim() > 0 and parts.layout is torch.strided
    if not stacked and not isinstance(parts, (list, tuple)):
        raise SpecError(name, type(parts).__name__, "a list of tensors, or one tensor stacked along dimension 0")
    return list(parts)


def _check_parts(outs: list[Tensor], lses: list[Tensor]) -> None:
    if not outs:
        raise SpecError("outs", "no parts", "one or more")
    if len(lses) != len(outs):
        raise SpecError("lses", f"{len(lses)} parts", f"{len(outs)}, one for each of outs")
    rank = outs[0].dim() if isinstance(outs[0], Tensor) else 4
    if rank not in (3, 4):
        raise SpecError("outs[0]", f"shape {list(outs[0].shape)}", "[b, s_q, h_q, d_v] or [total_q, h_q, d_v]")
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        require_tensor(f"outs[{i}]", out, _FLOATS if i == 0 else (outs[0].dtype,), rank, "like outs[0]")
        require_shape(f"outs[{i}]", out, outs[0].shape, "the shape of outs[0]")
        require_device(f"outs[{i}]", out, outs[0].device, "outs[0]")
        require_tensor(f"lses[{i}]", lse, _LSE_FLOATS if i == 0 else (lses[0].dtype,), rank - 1, "like out's rows")
        require_shape(f"lses[{i}]", lse, (*out.shape[:-3], out.shape[-2], out.shape[-3]), "rows of out, heads first")
        require_device(f"lses[{i}]", lse, outs[0].device, "outs[0]")
