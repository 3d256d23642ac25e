"""The three kernels of MLA decode: `schedule`, `decode`, `merge`.

**Work.** The query rows of a sequence and KV head (queries × heads of its group) are cut into tiles of ROWS. SIDE tiles
that read the same tokens run side by side, so that one read from memory serves them all: together they are a *unit*. A
unit has a *step* for each BLOCK_N tokens, and some more that stand for what it costs to begin one. `schedule` sums the
steps of all sequences (`prefix`); program (g, p) of `decode` takes tile g of every unit within the p-th of ``parts``
equal shares of all steps. So a share holds many short sequences, or a piece of a long one.

**Pieces.** A unit that lies within one share is finished there. Otherwise each share leaves its partial result in a
slot: 2p + 1 where the unit began in share p, 2p where it continued. `merge` program p merges the unit that the cut
before share p goes through, if it is the first cut through it, in order. Hence 2 · parts slots suffice for any lengths,
and nothing about lengths need be known to the host.

**Batch invariance.** With INVARIANT a step is a chunk of tokens whose length follows from the sequence's own length and
queries. Every chunk is attended by itself, and chunks are merged in order, wherever they were computed.

**Trust.** Lengths, table entries and query offsets are data from outside: each is brought into its range before it is
followed, tokens of pages that do not exist are left out, and `flag` says that there were some.

Scores are kept in units of log 2. Row maxima start at −inf; a row that attends nothing has sum 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether the kernels run in Triton's interpreter, which is decided when they are decorated."""

MOST = tl.constexpr(2**31 - 1)

BAD_LENGTH = tl.constexpr(1)
BAD_ENTRY = tl.constexpr(2)
BAD_QUERIES = tl.constexpr(4)


@triton.jit
def _queries(j, cu, s_q, total_q, mask, RAGGED: tl.constexpr):
    """First row of q that belongs to sequence j, and how many do."""
    if RAGGED:
        first = tl.minimum(tl.maximum(tl.load(cu + j, mask=mask, other=0), 0), total_q)
        last = tl.minimum(tl.maximum(tl.load(cu + j + 1, mask=mask, other=0), first), total_q)
        return first, last - first
    return j * 0, j * 0 + s_q


@triton.jit
def _length(j, seqlens, most, mask):
    return tl.minimum(tl.maximum(tl.load(seqlens + j, mask=mask, other=0), 0), most)


@triton.jit
def _shape(
    length,
    queries,
    group,
    h_kv,
    side,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BEGIN: tl.constexpr,
    INVARIANT: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK_BLOCKS: tl.constexpr,
):
    """Units a KV head, blocks a unit, and steps a unit of ``span`` blocks each; ``room`` chunks have slots."""
    tiles = (queries.to(tl.int64) * group + (ROWS - 1)) // ROWS
    units = (tiles + side - 1) // side
    blocks = (length.to(tl.int64) + (BLOCK_N - 1)) // BLOCK_N
    if INVARIANT:
        room = tl.maximum(CHUNKS // tl.maximum(units * h_kv, 1), 1)
        span = tl.maximum((blocks + room - 1) // room, CHUNK_BLOCKS)
        steps = tl.maximum((blocks + span - 1) // span, 1)
    else:
        room = units * 0 + 1
        span = units * 0 + 1
        steps = blocks + BEGIN
    return tiles, units, blocks, steps, span, room


@triton.jit
def _rows(rows, tile, group, ROWS: tl.constexpr):
    """Query, counted from the first of the tile, and head in its group of each row of a tile."""
    row = (tile * ROWS % group).to(tl.int32) + rows
    return row // group, row % group


@triton.jit
def _offsets(i, stride_i, h, stride_h, WIDE: tl.constexpr):
    """Offsets within a tile; 32 bits are enough for most strides and take half the registers."""
    if WIDE:
        # One return: a function of which two have unlike types does not compile, whichever is never reached.
        i, h = i.to(tl.int64), h.to(tl.int64)
    return i * stride_i + h * stride_h


@triton.jit
def _rounded(value, dtype: tl.constexpr):
    """To the element type of out. Triton's interpreter cuts float32 off at bf16, so there it is rounded before."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        value = tl.where(value == value, even, bits).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit(do_not_specialize=["batch", "s_q", "group", "h_kv", "side", "parts"])
def schedule(
    seqlens,
    cu,
    prefix,
    first,
    flag,
    batch,
    s_q,
    group,
    h_kv,
    side,
    parts,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    RAGGED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BEGIN: tl.constexpr,
    INVARIANT: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK_BLOCKS: tl.constexpr,
):
    """Sum the steps of all sequences into ``prefix`` [batch + 1]; ``first`` [parts]: the sequence each share begins in.

    One program. PARTS is the power of two from ``parts`` on.
    """
    tl.store(prefix, tl.zeros([], tl.int64))
    tl.store(flag, 0)
    total = tl.zeros([], tl.int64)
    falling = tl.zeros([CHUNK], tl.int32)
    for base in range(0, batch, CHUNK):
        j = base + tl.arange(0, CHUNK)
        here = j < batch
        length = _length(j, seqlens, MOST, here)
        _, queries = _queries(j, cu, s_q, MOST, here, RAGGED)
        _, units, _, steps, _, _ = _shape(
            length, queries, group, h_kv, side, ROWS, BLOCK_N, BEGIN, INVARIANT, CHUNKS, CHUNK_BLOCKS
        )
        sums = total + tl.cumsum(tl.where(here, units * h_kv * steps, 0), 0)
        tl.store(prefix + 1 + j, sums, mask=here)
        total = tl.max(sums, 0)
        if RAGGED:
            falls = tl.load(cu + j + 1, mask=here, other=0) < tl.load(cu + j, mask=here, other=0)
            falling |= falls.to(tl.int32)
    if RAGGED:
        if (tl.max(falling, 0) > 0) | (tl.load(cu) != 0):
            tl.store(flag, BAD_QUERIES)
    tl.debug_barrier()
    p = tl.arange(0, PARTS)
    cut = total * p // parts
    # Binary search: how many sequences end at or before the cut.
    before, after = tl.zeros([PARTS], tl.int32), tl.zeros([PARTS], tl.int32) + batch
    width = batch
    while width > 0:
        middle = (before + after) // 2
        ended = tl.load(prefix + 1 + middle, mask=middle < batch, other=0x7FFFFFFFFFFFFFFF) <= cut
        before = tl.where(ended & (before < after), middle + 1, before)
        after = tl.where(ended, after, tl.minimum(after, middle))
        width //= 2
    tl.store(first + p, tl.minimum(before, batch - 1), mask=p < parts)


@triton.jit
def _piece(
    x,
    end,
    j,
    start,
    seqlens,
    cu,
    s_q,
    total_q,
    group,
    h_kv,
    max_tokens,
    side,
    g,
    p,
    RAGGED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BEGIN: tl.constexpr,
    INVARIANT: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK_BLOCKS: tl.constexpr,
):
    """What program (g, p) does of the unit of sequence j that step x lies in: blocks ``lo`` to ``hi`` of which tile."""
    length = _length(j, seqlens, max_tokens, True)
    row0, queries = _queries(j, cu, s_q, total_q, True, RAGGED)
    tiles, units, blocks, steps, span, room = _shape(
        length, queries, group, h_kv, side, ROWS, BLOCK_N, BEGIN, INVARIANT, CHUNKS, CHUNK_BLOCKS
    )
    unit = (x - start) // steps
    step = (x - start) - unit * steps
    if INVARIANT:
        take = tl.full([], 1, tl.int64)
        lo = step * span
        hi = tl.minimum(lo + span, blocks)
        alone = steps == 1
        slot = (j.to(tl.int64) * CHUNKS + unit * room + step) * side + g
    else:
        take = tl.minimum(steps - step, end - x)
        lo = tl.minimum(step, blocks)
        hi = tl.minimum(step + take, blocks)
        alone = (step == 0) & (hi == blocks)
        slot = (2 * p.to(tl.int64) + (step == 0)) * side + g
    head = unit // tl.maximum(units, 1)
    tile = (unit - head * units) * side + g
    return length, row0, queries, tiles, head, tile, lo.to(tl.int32), hi.to(tl.int32), take, alone, slot


# Sizes and strides are run-time numbers, so that few variants are ever compiled; what the machine code really turns on
# is a constant. Strides count UNIT elements: 8 where all are multiples of it, and memory then moves 16 bytes at once.
_SIZES = ["batch", "s_q", "total_q", "group", "h_kv", "d_v", "max_tokens", "side", "parts"]
_OUT = ["o_b", "o_s", "o_h", "l_b", "l_h"]
_IN = ["d", "q_b", "q_s", "q_h", "kv_p", "kv_t", "kv_h", "t_b", "page_size", "num_blocks", "causal"]


@triton.jit(do_not_specialize=[*_SIZES, *_OUT, *_IN])
def decode(
    q,
    kv,
    table,
    seqlens,
    cu,
    out,
    lse,
    prefix,
    first,
    slots,
    states,
    flag,
    scale,
    log_unit,
    causal,
    q_b,
    q_s,
    q_h,
    kv_p,
    kv_t,
    kv_h,
    t_b,
    o_b,
    o_s,
    o_h,
    l_b,
    l_h,
    d,
    page_size,
    num_blocks,
    batch,
    s_q,
    total_q,
    group,
    h_kv,
    d_v,
    max_tokens,
    side,
    parts,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    AT_ONCE: tl.constexpr,
    FULL: tl.constexpr,
    FULL_V: tl.constexpr,
    TAIL_V: tl.constexpr,
    WHOLE: tl.constexpr,
    TOKEN: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
    RAGGED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BEGIN: tl.constexpr,
    INVARIANT: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK_BLOCKS: tl.constexpr,
):
    """Attend one share of all steps, for tile ``program_id(0)`` of each unit. Grid (side, parts).

    Columns of K are taken in two powers of two, MAIN and (where d is more) TAIL; V is the first d_v of the same shared
    memory (but see AT_ONCE). The interpreter, whose bf16 products are wrong, multiplies in float32.

    AT_ONCE: columns of K that are multiplied at once, MAIN and then TAIL; fewer where no matrix instruction takes its
    operands from shared memory, for registers do not hold 512. FULL: d is MAIN + TAIL. FULL_V: d_v is no less than
    MAIN; TAIL_V: it is more. WHOLE: a step lies in one page. TOKEN: elements from one token to the next, where that is
    one of the usual numbers, else 0. WIDE: 32 bits do not hold the offsets within a page or a tile.
    """
    g = tl.program_id(0)
    p = tl.program_id(1)
    total = tl.load(prefix + batch)
    x = total * p // parts
    end = total * (p + 1) // parts
    j = tl.load(first + p)
    if RAGGED:
        if (g == 0) & (p == 0) & (tl.load(cu + batch) != total_q):
            tl.atomic_or(flag, BAD_QUERIES)
    faults = tl.zeros([BLOCK_N], tl.int32)
    rows = tl.arange(0, ROWS)
    main = tl.arange(0, MAIN)
    # A while loop alone cannot be told to leave addresses where they are used. The inner bound is that of the pieces
    # there can be, and 256 since lengths that are out of range make it meaningless.
    while x < end:
        pieces = tl.minimum((end - x) if INVARIANT else (end - x) // BEGIN + 2, 256).to(tl.int32)
        for _ in tl.range(0, pieces, num_stages=1, disable_licm=True):
            if x < end:
                start = tl.load(prefix + j)
                stop = tl.load(prefix + j + 1)
                while stop <= x:
                    j += 1
                    start = stop
                    stop = tl.load(prefix + j + 1)
                length, row0, queries, tiles, head, tile, lo, hi, take, alone, slot = _piece(
                    x, end, j, start, seqlens, cu, s_q, total_q, group, h_kv, max_tokens, side, g, p,
                    RAGGED, ROWS, BLOCK_N, BEGIN, INVARIANT, CHUNKS, CHUNK_BLOCKS,
                )  # fmt: skip
                if length != tl.load(seqlens + j):
                    tl.atomic_or(flag, BAD_LENGTH)
                # A unit beyond the last: the schedule was made for longer lengths than the table holds.
                if head >= h_kv:
                    take = stop - x
                if (head < h_kv) & (tile < tiles) & (alone | (lo < hi)):
                    base = (tile * ROWS // group).to(tl.int32)
                    i, h = _rows(rows, tile, group, ROWS)
                    live = i < queries - base
                    at = q + (j.to(tl.int64) * q_b + (row0 + base).to(tl.int64) * q_s + head * group * q_h) * UNIT
                    at = at + _offsets(i, q_s, h, q_h, WIDE) * UNIT
                    if TAIL:
                        tail = MAIN + tl.arange(0, TAIL)
                    if AT_ONCE == MAIN:
                        if FULL or TAIL:
                            q_main = tl.load(at[:, None] + main[None, :], mask=live[:, None], other=0.0)
                        else:
                            q_main = tl.load(
                                at[:, None] + main[None, :], mask=live[:, None] & (main < d)[None, :], other=0.0
                            )
                        if INTERPRETED:
                            q_main = q_main.to(tl.float32)
                        if TAIL:
                            if FULL:
                                q_tail = tl.load(at[:, None] + tail[None, :], mask=live[:, None], other=0.0)
                            else:
                                q_tail = tl.load(
                                    at[:, None] + tail[None, :], mask=live[:, None] & (tail < d)[None, :], other=0.0
                                )
                            if INTERPRETED:
                                q_tail = q_tail.to(tl.float32)
                    acc = tl.zeros([ROWS, MAIN], tl.float32)
                    if TAIL_V:
                        acc_tail = tl.zeros([ROWS, TAIL], tl.float32)
                    top = tl.full([ROWS], float("-inf"), tl.float32)
                    weight = tl.zeros([ROWS], tl.float32)
                    taken = tl.zeros([ROWS], tl.float32)
                    seen = length - (queries - 1 - base - i) * causal
                    entries = table + j.to(tl.int64) * t_b
                    tokens = kv + head * kv_h * UNIT
                    for block in tl.range(lo, hi, num_stages=STAGES, disable_licm=True):
                        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
                        wanted = n < length
                        if WHOLE:
                            place = block * BLOCK_N // page_size
                            page = tl.load(entries + place)
                            real = (page >= 0) & (page < num_blocks)
                            held = n < tl.where(real, length, 0)
                            inside = (block * BLOCK_N - place * page_size).to(tl.int64) * kv_t * UNIT
                            offset = tl.arange(0, BLOCK_N)
                        else:
                            page = tl.load(entries + n // page_size, mask=wanted, other=0)
                            real = (page >= 0) & (page < num_blocks)
                            held = wanted & real
                            inside = 0
                            offset = n % page_size
                        page = tl.where(real, page, 0)
                        faults |= wanted.to(tl.int32) - held.to(tl.int32)
                        if TOKEN:
                            offset = offset * TOKEN
                        elif WIDE:
                            offset = offset.to(tl.int64) * kv_t * UNIT
                        else:
                            offset = offset * kv_t * UNIT
                        k_at = tokens + page.to(tl.int64) * kv_p * UNIT + inside + offset
                        # What is not held is zero here, since zero weight times NaN would still be NaN.
                        if FULL or TAIL:
                            k = tl.load(k_at[:, None] + main[None, :], mask=held[:, None], other=0.0)
                        else:
                            k = tl.load(
                                k_at[:, None] + main[None, :], mask=held[:, None] & (main < d)[None, :], other=0.0
                            )
                        if INTERPRETED:
                            k = k.to(tl.float32)
                        if TAIL and (AT_ONCE == MAIN or TAIL_V):
                            if FULL:
                                k_tail = tl.load(k_at[:, None] + tail[None, :], mask=held[:, None], other=0.0)
                            else:
                                k_tail = tl.load(
                                    k_at[:, None] + tail[None, :], mask=held[:, None] & (tail < d)[None, :], other=0.0
                                )
                            if INTERPRETED:
                                k_tail = k_tail.to(tl.float32)
                        if AT_ONCE == MAIN:
                            s = tl.dot(q_main, tl.trans(k), input_precision="ieee")
                            if TAIL:
                                s = tl.dot(q_tail, tl.trans(k_tail), s, input_precision="ieee")
                        else:
                            s = tl.zeros([ROWS, BLOCK_N], tl.float32)
                            for column in range(0, MAIN + TAIL, AT_ONCE):
                                some = column + tl.arange(0, AT_ONCE)
                                within = (some < d)[None, :]
                                q_some = tl.load(at[:, None] + some[None, :], mask=live[:, None] & within, other=0.0)
                                k_some = tl.load(k_at[:, None] + some[None, :], mask=held[:, None] & within, other=0.0)
                                if INTERPRETED:
                                    q_some, k_some = q_some.to(tl.float32), k_some.to(tl.float32)
                                s = tl.dot(q_some, tl.trans(k_some), s, input_precision="ieee")
                        s = tl.where(held[None, :] & (n[None, :] < seen[:, None]), s * scale, float("-inf"))
                        highest = tl.maximum(top, tl.max(s, 1))
                        shift = tl.where(highest == float("-inf"), 0.0, highest)
                        fade = tl.exp2(top - shift)
                        share = tl.exp2(s - shift[:, None])
                        weight = weight * fade + tl.sum(share, 1)
                        # The output is divided by the sum of what was multiplied: rounding scales no row.
                        share = share.to(k.dtype)
                        taken = taken * fade + tl.sum(share.to(tl.float32), 1)
                        acc = tl.dot(share, k, acc * fade[:, None], input_precision="ieee")
                        if TAIL_V:
                            acc_tail = tl.dot(share, k_tail, acc_tail * fade[:, None], input_precision="ieee")
                        top = highest
                    # A zero the compiler cannot see through: it would keep what it knows of this piece in registers
                    # during the loop, which has none to spare. Finding the piece again is cheaper.
                    zero = tl.max(faults, 0) >> 1
                    length, row0, queries, tiles, head, tile, lo, hi, take, alone, slot = _piece(
                        x + zero, end, j + zero, start, seqlens, cu, s_q, total_q, group, h_kv, max_tokens, side, g, p,
                        RAGGED, ROWS, BLOCK_N, BEGIN, INVARIANT, CHUNKS, CHUNK_BLOCKS,
                    )  # fmt: skip
                    base = (tile * ROWS // group).to(tl.int32)
                    rows_again = rows + zero
                    i, h = _rows(rows_again, tile, group, ROWS)
                    if alone:
                        live = i < queries - base
                        nothing = weight == 0.0
                        norm = 1.0 / tl.where(nothing, 1.0, taken)
                        o_at = (
                            out + (j.to(tl.int64) * o_b + (row0 + base).to(tl.int64) * o_s + head * group * o_h) * UNIT
                        )
                        o_at = o_at + _offsets(i, o_s, h, o_h, WIDE) * UNIT
                        value = _rounded(acc * norm[:, None], out.dtype.element_ty)
                        if FULL_V:
                            tl.store(o_at[:, None] + main[None, :], value, mask=live[:, None])
                        else:
                            tl.store(o_at[:, None] + main[None, :], value, mask=live[:, None] & (main < d_v)[None, :])
                        if TAIL_V:
                            value = _rounded(acc_tail * norm[:, None], out.dtype.element_ty)
                            tl.store(o_at[:, None] + tail[None, :], value, mask=live[:, None] & (tail < d_v)[None, :])
                        log = (top + tl.log2(weight)) * log_unit
                        l_at = lse + j.to(tl.int64) * l_b + head * group * l_h + row0 + base
                        tl.store(l_at + h.to(tl.int64) * l_h + i, tl.where(nothing, float("inf"), log), mask=live)
                    else:
                        true = weight / tl.where(weight == 0.0, 1.0, taken)  # so that one weight serves out and lse
                        tl.store(states + slot * (2 * ROWS) + rows_again, top)
                        tl.store(states + slot * (2 * ROWS) + ROWS + rows_again, weight)
                        if TAIL_V:
                            s_at = slots + slot * (ROWS * (MAIN + TAIL)) + rows_again * (MAIN + TAIL)
                            tl.store(s_at[:, None] + tail[None, :], acc_tail * true[:, None])
                        else:
                            s_at = slots + slot * (ROWS * MAIN) + rows_again * MAIN
                        tl.store(s_at[:, None] + main[None, :], acc * true[:, None])
                x += take
    if tl.max(faults, 0) > 0:
        tl.atomic_or(flag, BAD_ENTRY)


@triton.jit(do_not_specialize=[*_SIZES, *_OUT, "each"])
def merge(
    seqlens,
    cu,
    out,
    lse,
    prefix,
    first,
    slots,
    states,
    log_unit,
    o_b,
    o_s,
    o_h,
    l_b,
    l_h,
    batch,
    s_q,
    total_q,
    group,
    h_kv,
    d_v,
    max_tokens,
    side,
    parts,
    each,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOGETHER: tl.constexpr,
    UNIT: tl.constexpr,
    RAGGED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BEGIN: tl.constexpr,
    INVARIANT: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK_BLOCKS: tl.constexpr,
):
    """Merge the pieces of one tile, TOGETHER rows a program. Grid (cuts, side, ROWS / TOGETHER).

    Cuts: ``parts``; with INVARIANT instead batch × ``each``, of which program j · each + u has unit u of sequence j.
    COLUMNS are those of a slot, WIDTH the power of two from there on.
    """
    cut = tl.program_id(0)
    g = tl.program_id(1)
    total = tl.load(prefix + batch)
    x = total * cut // parts
    if INVARIANT:
        j = cut // each
    else:
        j = tl.load(first + cut)
    start = tl.load(prefix + j)
    length = _length(j, seqlens, max_tokens, True)
    row0, queries = _queries(j, cu, s_q, total_q, True, RAGGED)
    tiles, units, blocks, steps, _span, room = _shape(
        length, queries, group, h_kv, side, ROWS, BLOCK_N, BEGIN, INVARIANT, CHUNKS, CHUNK_BLOCKS
    )
    if INVARIANT:
        unit = (cut - j * each).to(tl.int64)
        wanted = steps > 1
        piece = j.to(tl.int64) * CHUNKS + unit * room
        last = piece + steps
    else:
        unit = (x - start) // steps
        begin = start + unit * steps
        # The first cut within the tokens of this unit, not at its beginning nor in the steps of no tokens after them.
        wanted = (x < total) & (x > begin) & (x < begin + blocks) & (total * (cut - 1) // parts <= begin)
        piece = cut.to(tl.int64) - 1
        last = piece + 1
        while (last < parts) & (total * last // parts < begin + blocks):
            last += 1
    head = unit // tl.maximum(units, 1)
    tile = (unit - head * units) * side + g
    if wanted & (head < h_kv) & (tile < tiles):
        rows = tl.program_id(2) * TOGETHER + tl.arange(0, TOGETHER)
        columns = tl.arange(0, WIDTH)
        acc = tl.zeros([TOGETHER, WIDTH], tl.float32)
        top = tl.full([TOGETHER], float("-inf"), tl.float32)
        weight = tl.zeros([TOGETHER], tl.float32)
        begun = 1
        while piece < last:
            if INVARIANT:
                slot = piece * side + g
                filled = True
            else:
                slot = (2 * piece + begun) * side + g
                # Where there are fewer steps than shares some shares are empty and wrote nothing.
                filled = total * piece // parts < total * (piece + 1) // parts
            if filled:
                part_top = tl.load(states + slot * (2 * ROWS) + rows)
                part_weight = tl.load(states + slot * (2 * ROWS) + ROWS + rows)
                at = slots + (slot * ROWS + rows) * COLUMNS
                part = tl.load(at[:, None] + columns[None, :], mask=(columns < COLUMNS)[None, :], other=0.0)
                highest = tl.maximum(top, part_top)
                shift = tl.where(highest == float("-inf"), 0.0, highest)
                fade, grow = tl.exp2(top - shift), tl.exp2(part_top - shift)
                acc = acc * fade[:, None] + part * grow[:, None]
                weight = weight * fade + part_weight * grow
                top = highest
            begun = 0
            piece += 1
        row = tile * ROWS + rows
        i = row // group
        h = head * group + row - i * group
        live = i < queries
        nothing = weight == 0.0
        value = _rounded(acc / tl.where(nothing, 1.0, weight)[:, None], out.dtype.element_ty)
        o_at = out + (j.to(tl.int64) * o_b + (row0 + i) * o_s + h * o_h) * UNIT
        tl.store(o_at[:, None] + columns[None, :], value, mask=live[:, None] & (columns < d_v)[None, :])
        log = (top + tl.log2(weight)) * log_unit
        tl.store(lse + j.to(tl.int64) * l_b + h * l_h + row0 + i, tl.where(nothing, float("inf"), log), mask=live)
