"""OmniSparse attention in Triton: the kernels. `gpu` launches them.

Tensors are contiguous: queries [B, H, N, D], keys and values [B, G, M, D], GROUP = H / G. What is
kept of a query's scores is their log-sum-exp in base 2, of scores times log2(e). A query is at
position `row + M - N`. WIDTH is D rounded up to a power of two.

Queries come in two passes: LISTED ones (active) see all keys and are named by `rows`, int32
[B * G, N * GROUP] of `row * GROUP + head`, ascending, of which the first `counts` [B * G] count;
without that, blocks of consecutive ones see their neighbourhood and the selected keys of their
segment, which are far from it and no padding. In the backward passes the log-sum-exp of queries
that do not belong to a pass is +inf, which weighs all their scores with 0.

No two programs of a launch write to the same place, unless ATOMIC says so.
"""

# mypy takes triton.jit's functions for plain Python, whose arguments would need types.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

__all__ = [
    "forward_kernel",
    "key_gradient_kernel",
    "probe_kernel",
    "query_gradient_kernel",
    "selected_key_gradient_kernel",
]


@triton.jit
def _queries(
    rows, counts, block, pair, first, N, M,
    GROUP: tl.constexpr, LISTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block's queries: where they are in [B * H * N], their positions, and which there are.

    first: position of the first one, where they are consecutive ones of head `block % GROUP`.
    """
    index = tl.arange(0, BLOCK)
    if LISTED:
        index += block * BLOCK
        there = index < tl.load(counts + pair)
        entry = tl.load(rows + pair.to(tl.int64) * N * GROUP + index, mask=there, other=0)
        row, head = entry // GROUP, entry % GROUP
    else:
        row = first + index - (M - N)
        head = tl.zeros_like(row) + block % GROUP
        there = (row >= 0) & (row < N)
    return (pair.to(tl.int64) * GROUP + head) * N + row, row + M - N, there


@triton.jit
def _segment(
    keys, budget, first, pair, G, M, S, LENGTH, window,
    BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """What lazy queries from position `first` on see: keys [start, stop), and a list of others."""
    segment = tl.maximum(first, 0) // LENGTH
    count = tl.load(budget + pair // G * S + segment)
    chosen = keys + (pair.to(tl.int64) * S + segment) * M
    start = tl.maximum(segment * LENGTH - window, 0)
    stop = tl.minimum(first + BLOCK if CAUSAL else (segment + 1) * LENGTH + window, M)
    if count < 0:  # every key
        start = 0
        stop = stop if CAUSAL else M
        count = 0
    return start, stop, chosen, count


@triton.jit
def _load(base, place, there, D, WIDTH: tl.constexpr):
    """Rows of a [.., D] tensor: [places, WIDTH]."""
    column = tl.arange(0, WIDTH)
    mask = there[:, None] & (column < D)[None, :]
    return tl.load(base + place.to(tl.int64)[:, None] * D + column[None, :], mask=mask, other=0.0)


@triton.jit
def _store(base, place, there, block, D, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    mask = there[:, None] & (column < D)[None, :]
    where = base + place.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(where, block.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _visible(valid, position, there, place, known, CAUSAL: tl.constexpr, PADDED: tl.constexpr):
    """Which of the keys at `place`, of those that are `known`, each query may see."""
    if PADDED:
        known = known & (tl.load(valid + place, mask=known, other=0) != 0)
    seen = there[:, None] & known[None, :]
    if CAUSAL:
        seen = seen & (place[None, :] <= position[:, None])
    return seen


@triton.jit
def _attend(state, query, key, value, place, known, seen, scale, D, WIDTH: tl.constexpr):
    """Take in a block of keys (online softmax)."""
    result, peak, norm = state
    keys = _load(key, place, known, D, WIDTH)
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
    scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(peak - base)
    values = _load(value, place, known, D, WIDTH)
    result = result * shrink[:, None]
    result = tl.dot(weights.to(values.dtype), values, result, input_precision="ieee")
    return result, higher, norm * shrink + tl.sum(weights, 1)


@triton.jit
def _reach(
    position, there, first, pair, keys, budget, M, G, S, LENGTH, window,
    BLOCK: tl.constexpr, CAUSAL: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """What a block of queries sees: keys [start, stop), and so many of a list of others."""
    if LISTED:
        start = 0
        stop = tl.max(tl.where(there, position, -1)) + 1 if CAUSAL else M
        chosen, count = keys, 0
    else:
        start, stop, chosen, count = _segment(
            keys, budget, first, pair, G, M, S, LENGTH, window, BLOCK, CAUSAL
        )
    return start, stop, chosen, count


@triton.jit
def forward_kernel(
    query, key, value, keys, budget, valid, rows, counts, output, total,
    N, M, D, G, S, LENGTH, begin, scale, window,
    GROUP: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Results and log-sum-exps of one block of queries; grid: blocks, B * G.

    begin: the position of the first block, a multiple of its length. LENGTH: a segment's.
    """
    block, pair = tl.program_id(0), tl.program_id(1)
    if LISTED and block * BLOCK_QUERIES >= tl.load(counts + pair):
        return
    first = begin + block // GROUP * BLOCK_QUERIES
    where, position, there = _queries(
        rows, counts, block, pair, first, N, M, GROUP, LISTED, BLOCK_QUERIES
    )
    start, stop, chosen, count = _reach(
        position, there, first, pair, keys, budget, M, G, S, LENGTH, window,
        BLOCK_QUERIES, CAUSAL, LISTED,
    )  # fmt: skip
    some = _load(query, where, there, D, WIDTH)
    valid += pair // G * M
    key += pair.to(tl.int64) * M * D
    value += pair.to(tl.int64) * M * D
    state = (
        tl.zeros((BLOCK_QUERIES, WIDTH), tl.float32),
        tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32),
        tl.zeros((BLOCK_QUERIES,), tl.float32),
    )
    column = tl.arange(0, BLOCK_KEYS)
    if not LISTED:
        for j in range(0, count, BLOCK_KEYS):
            known = j + column < count
            place = tl.load(chosen + j + column, mask=known, other=0)
            seen = there[:, None] & known[None, :]
            state = _attend(state, some, key, value, place, known, seen, scale, D, WIDTH)
    for j in range(start, stop, BLOCK_KEYS):
        place = j + column
        seen = _visible(valid, position, there, place, place < stop, CAUSAL, PADDED)
        state = _attend(state, some, key, value, place, place < stop, seen, scale, D, WIDTH)
    result, peak, norm = state
    norm = tl.where(norm == 0, 1.0, norm)  # of queries that saw nothing; their peak is -inf
    _store(output, where, there, result / norm[:, None], D, WIDTH)
    tl.store(total + where, peak + tl.log2(norm), mask=there)


@triton.jit
def _scores(query, key, valid, position, there, place, stop, scale, D,
            WIDTH: tl.constexpr, CAUSAL: tl.constexpr, PADDED: tl.constexpr):  # fmt: skip
    """Of a block of queries on a block of keys; -inf where a key is not seen."""
    known = place < stop
    keys = _load(key, place, known, D, WIDTH)
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
    seen = _visible(valid, position, there, place, known, CAUSAL, PADDED)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def probe_kernel(
    query, key, valid, rows, shares, N, M, D, G, S, scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, PROBES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """How much attention a segment's probes pay to each key, on average; grid: S, B * H.

    rows: int32 [S, PROBES], the probes' rows, -1 for none. shares: float32 [B * H, S, M], of which
    keys that no probe sees are left as they are. Scores are computed twice and never written.
    """
    segment, head = tl.program_id(0), tl.program_id(1)
    pair = head // GROUP
    row = tl.load(rows + segment * PROBES + tl.arange(0, PROBES))
    there = row >= 0
    position = row + M - N
    stop = tl.max(tl.where(there, position, -1)) + 1 if CAUSAL else M
    some = _load(query, head.to(tl.int64) * N + row, there, D, WIDTH)
    key += pair.to(tl.int64) * M * D
    valid += pair // G * M
    looking = there
    if CAUSAL and PADDED:  # rows of padding count for nothing
        looking = there & (tl.load(valid + position, mask=there, other=0) != 0)
    column = tl.arange(0, BLOCK_KEYS)
    peak = tl.full((PROBES,), float("-inf"), tl.float32)
    norm = tl.zeros((PROBES,), tl.float32)
    for j in range(0, stop, BLOCK_KEYS):
        scores = _scores(some, key, valid, position, there, j + column, stop, scale, D,
                         WIDTH, CAUSAL, PADDED)  # fmt: skip
        higher = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        norm = norm * tl.exp2(peak - base) + tl.sum(tl.exp2(scores - base[:, None]), 1)
        peak = higher
    total = peak + tl.log2(norm)
    number = tl.maximum(tl.sum(looking.to(tl.float32), 0), 1.0)
    shares += (head.to(tl.int64) * S + segment) * M
    for j in range(0, stop, BLOCK_KEYS):
        place = j + column
        scores = _scores(some, key, valid, position, there, place, stop, scale, D,
                         WIDTH, CAUSAL, PADDED)  # fmt: skip
        weights = tl.where(looking[:, None], tl.exp2(scores - total[:, None]), 0.0)
        tl.store(shares + place, tl.sum(weights, 0) / number, mask=place < stop)


@triton.jit
def _query_step(
    gradient, some, up, norm, weight, key, value, place, known, seen, scale, D, WIDTH: tl.constexpr
):
    keys = _load(key, place, known, D, WIDTH)
    values = _load(value, place, known, D, WIDTH)
    slope = _slopes(some, keys, values, up, norm, weight, seen, scale)[1]
    return tl.dot(slope.to(keys.dtype), keys, gradient, input_precision="ieee")


@triton.jit
def _slopes(some, keys, values, up, norm, weight, seen, scale):
    """Attention weights [queries, keys] of a block, and the gradients of their scores."""
    scores = tl.dot(some, tl.trans(keys), input_precision="ieee") * scale
    weights = tl.where(seen, tl.exp2(scores - norm[:, None]), 0.0)
    return weights, weights * (
        tl.dot(up, tl.trans(values), input_precision="ieee") - weight[:, None]
    )


@triton.jit
def _query_data(query, gradient, total, delta, where, there, D, WIDTH: tl.constexpr):
    some = _load(query, where, there, D, WIDTH)
    up = _load(gradient, where, there, D, WIDTH)
    norm = tl.load(total + where, mask=there, other=float("inf"))
    weight = tl.load(delta + where, mask=there, other=0.0)
    return some, up, norm, weight


@triton.jit
def query_gradient_kernel(
    query, key, value, gradient, total, delta, keys, budget, valid, rows, counts, grad_query,
    N, M, D, G, S, LENGTH, begin, scale, slope_scale, window,
    GROUP: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of queries; arguments and grid as for `forward_kernel`.

    delta: [B, H, N], the sum of gradient times output. slope_scale: of scores, without log2(e).
    """
    block, pair = tl.program_id(0), tl.program_id(1)
    if LISTED and block * BLOCK_QUERIES >= tl.load(counts + pair):
        return
    first = begin + block // GROUP * BLOCK_QUERIES
    where, position, there = _queries(
        rows, counts, block, pair, first, N, M, GROUP, LISTED, BLOCK_QUERIES
    )
    start, stop, chosen, count = _reach(
        position, there, first, pair, keys, budget, M, G, S, LENGTH, window,
        BLOCK_QUERIES, CAUSAL, LISTED,
    )  # fmt: skip
    some, up, norm, weight = _query_data(query, gradient, total, delta, where, there, D, WIDTH)
    valid += pair // G * M
    key += pair.to(tl.int64) * M * D
    value += pair.to(tl.int64) * M * D
    own = tl.zeros((BLOCK_QUERIES, WIDTH), tl.float32)
    column = tl.arange(0, BLOCK_KEYS)
    if not LISTED:
        for j in range(0, count, BLOCK_KEYS):
            known = j + column < count
            place = tl.load(chosen + j + column, mask=known, other=0)
            seen = there[:, None] & known[None, :]
            own = _query_step(
                own, some, up, norm, weight, key, value, place, known, seen, scale, D, WIDTH
            )
    for j in range(start, stop, BLOCK_KEYS):
        place = j + column
        known = place < stop
        seen = _visible(valid, position, there, place, known, CAUSAL, PADDED)
        own = _query_step(
            own, some, up, norm, weight, key, value, place, known, seen, scale, D, WIDTH
        )
    _store(grad_query, where, there, own * slope_scale, D, WIDTH)


@triton.jit
def _key_step(own, keys, values, some, up, norm, weight, seen, scale):
    """Add a block of queries' part of the gradients of keys (still without scale) and values."""
    grad_key, grad_value = own
    weights, slope = _slopes(some, keys, values, up, norm, weight, seen, scale)
    grad_value = tl.dot(tl.trans(weights.to(up.dtype)), up, grad_value, input_precision="ieee")
    grad_key = tl.dot(tl.trans(slope.to(some.dtype)), some, grad_key, input_precision="ieee")
    return grad_key, grad_value


@triton.jit
def key_gradient_kernel(
    query, key, value, gradient, total, delta, budget, valid, rows, counts, grad_key, grad_value,
    N, M, D, G, S, LENGTH, begin, scale, slope_scale, window,
    GROUP: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Add to the gradients of a block of keys what comes from neighbouring queries, from exact
    segments, or (LISTED) from active queries; grid: blocks of keys, B * G."""
    block, pair = tl.program_id(0), tl.program_id(1)
    place = block * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    known = place < M
    here = pair.to(tl.int64) * M + place
    keys = _load(key, here, known, D, WIDTH)
    values = _load(value, here, known, D, WIDTH)
    valid += pair // G * M
    own = (
        tl.zeros((BLOCK_KEYS, WIDTH), tl.float32), tl.zeros((BLOCK_KEYS, WIDTH), tl.float32)
    )  # fmt: skip
    if LISTED:
        steps = tl.cdiv(tl.load(counts + pair), BLOCK_QUERIES)
    else:
        steps = tl.cdiv(M - begin, BLOCK_QUERIES) * GROUP
    for step in range(0, steps):
        first = begin + step // GROUP * BLOCK_QUERIES
        where, position, there = _queries(
            rows, counts, step, pair, first, N, M, GROUP, LISTED, BLOCK_QUERIES
        )
        start, stop, _, _ = _reach(
            position, there, first, pair, budget, budget, M, G, S, LENGTH, window,
            BLOCK_QUERIES, CAUSAL, LISTED,
        )  # fmt: skip
        if (block * BLOCK_KEYS < stop) & ((block + 1) * BLOCK_KEYS > start):
            near = known & (place >= start) & (place < stop)
            seen = _visible(valid, position, there, place, near, CAUSAL, PADDED)
            some, up, norm, weight = _query_data(
                query, gradient, total, delta, where, there, D, WIDTH
            )
            own = _key_step(own, keys, values, some, up, norm, weight, seen, scale)
    before = _load(grad_key, here, known, D, WIDTH)
    _store(grad_key, here, known, before + own[0] * slope_scale, D, WIDTH)
    before = _load(grad_value, here, known, D, WIDTH)
    _store(grad_value, here, known, before + own[1], D, WIDTH)


@triton.jit
def selected_key_gradient_kernel(
    query, key, value, gradient, total, delta, keys, budget, grad_key, grad_value,
    N, M, D, G, S, LENGTH, segment, scale, slope_scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """Add to the gradients of a block of a segment's selected keys what comes from its queries.

    Grid: blocks of selected keys, B * G, segments from `segment` on. Segments share keys, so that
    more than one in a launch have to be ATOMIC.
    """
    block, pair = tl.program_id(0), tl.program_id(1)
    segment += tl.program_id(2)
    count = tl.load(budget + pair // G * S + segment)
    if block * BLOCK_KEYS >= count:
        return
    index = block * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    known = index < count
    place = tl.load(keys + (pair.to(tl.int64) * S + segment) * M + index, mask=known, other=0)
    here = pair.to(tl.int64) * M + place
    selected = _load(key, here, known, D, WIDTH)
    values = _load(value, here, known, D, WIDTH)
    own = (
        tl.zeros((BLOCK_KEYS, WIDTH), tl.float32), tl.zeros((BLOCK_KEYS, WIDTH), tl.float32)
    )  # fmt: skip
    begin = segment * LENGTH
    steps = tl.cdiv(tl.minimum(LENGTH, M - begin), BLOCK_QUERIES) * GROUP
    for step in range(0, steps):
        first = begin + step // GROUP * BLOCK_QUERIES
        where, _, there = _queries(
            keys, budget, step, pair, first, N, M, GROUP, False, BLOCK_QUERIES
        )
        seen = there[:, None] & known[None, :]
        some, up, norm, weight = _query_data(query, gradient, total, delta, where, there, D, WIDTH)
        own = _key_step(own, selected, values, some, up, norm, weight, seen, scale)
    _add(grad_key, here, known, own[0] * slope_scale, D, WIDTH, ATOMIC)
    _add(grad_value, here, known, own[1], D, WIDTH, ATOMIC)


@triton.jit
def _add(base, place, there, block, D, WIDTH: tl.constexpr, ATOMIC: tl.constexpr):
    if ATOMIC:
        column = tl.arange(0, WIDTH)
        mask = there[:, None] & (column < D)[None, :]
        tl.atomic_add(base + place[:, None] * D + column[None, :], block, mask=mask)
    else:
        _store(base, place, there, _load(base, place, there, D, WIDTH) + block, D, WIDTH)
