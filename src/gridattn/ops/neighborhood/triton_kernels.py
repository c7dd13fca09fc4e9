"""Triton kernels of neighborhood attention over tiles of a grid: forward, and backward by query and by key tiles.

A tile is a box of positions of one dilation group, t0 x t1 x t2; grids of fewer axes have leading axes of length one.
Tensors are addressed where they are, by their strides. A program owns one tile and goes through the tiles on the other
side that a table lists for it: first those that every query sees whole, without any mask, then the others, where the
position of a key is compared with the window of a query, axis by axis. With a key mask, every tile is of the second
kind. No two programs write the same number.

Sizes of a tile are powers of two. Logits are in units of log 2: `scale` arguments include log2(e).
"""

# pyright: reportArgumentType=false
# A constexpr argument is given as a plain value, which Triton's own types do not say.

import triton
import triton.language as tl


@triton.jit
def _program(tiles, heads):
    """Tile, sample and head of this program; those of one head run side by side, since they share what they read."""
    count = tiles[0] * tiles[1] * tiles[2]
    pair = tl.program_id(0) // count
    return tl.program_id(0) % count, pair // heads, pair % heads


@triton.jit
def _corner(tile, tiles, per_group):
    """Along each axis: group of a tile and its first position in the group."""
    a2 = tile % tiles[2]
    a1 = (tile // tiles[2]) % tiles[1]
    a0 = tile // (tiles[2] * tiles[1])
    groups = (a0 // per_group[0], a1 // per_group[1], a2 // per_group[2])
    return groups, (a0 % per_group[0], a1 % per_group[1], a2 % per_group[2])


@triton.jit
def _positions(corner, TILE: tl.constexpr):
    """Along each axis, positions in the group of a tile's tokens, (t0 * t1 * t2,)."""
    place = tl.arange(0, TILE[0] * TILE[1] * TILE[2])
    p0 = corner[0] * TILE[0] + place // (TILE[1] * TILE[2])
    p1 = corner[1] * TILE[1] + (place // TILE[2]) % TILE[1]
    p2 = corner[2] * TILE[2] + place % TILE[2]
    return p0, p1, p2


@triton.jit
def _indices(positions, groups, dilation):
    """Positions in groups -> indices on the grid."""
    return (
        positions[0] * dilation[0] + groups[0],
        positions[1] * dilation[1] + groups[1],
        positions[2] * dilation[2] + groups[2],
    )


@triton.jit
def _inside(index, shape):
    """Which tokens of a tile are on the grid."""
    return (index[0] < shape[0]) & (index[1] < shape[1]) & (index[2] < shape[2])


@triton.jit
def _rows(index, strides):
    """Where tokens stand in a tensor; strides along (batch, three axes, heads)."""
    i0, i1, i2 = index[0].to(tl.int64), index[1].to(tl.int64), index[2].to(tl.int64)
    return i0 * strides[1] + i1 * strides[2] + i2 * strides[3]


@triton.jit
def _start(tensor, strides, batch, head):
    return tensor + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[4]


@triton.jit
def _load(start, rows, inside, SIZE: tl.constexpr, BLOCK: tl.constexpr, CHECK: tl.constexpr):
    """(tokens, BLOCK) channels of tokens; zeros where there is no channel and, if rows are checked, no token."""
    channel = tl.arange(0, BLOCK)
    where = start + rows[:, None] + channel[None, :]
    if CHECK:
        return tl.load(where, mask=inside[:, None] & (channel[None, :] < SIZE), other=0.0)
    if SIZE != BLOCK:
        return tl.load(where, mask=channel[None, :] < SIZE, other=0.0)
    return tl.load(where)


@triton.jit
def _store(start, rows, inside, block, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    channel = tl.arange(0, BLOCK)
    mask = inside[:, None] & (channel[None, :] < SIZE)
    tl.store(start + rows[:, None] + channel[None, :], block.to(start.dtype.element_ty), mask=mask)


@triton.jit
def _kept(start, index, strides, inside, KEPT: tl.constexpr):
    """Which tokens of a tile are on the grid and, where there is a key mask, may be seen."""
    if KEPT:
        place = start + _rows(index, strides)
        return inside & (tl.load(place, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _windows(first, stop, index, inside, shape):
    """Along each axis, first and last position, exclusive, that each query sees."""
    o1, o2 = shape[0], shape[0] + shape[1]
    firsts = (
        tl.load(first + index[0], mask=inside, other=0),
        tl.load(first + o1 + index[1], mask=inside, other=0),
        tl.load(first + o2 + index[2], mask=inside, other=0),
    )
    stops = (
        tl.load(stop + index[0], mask=inside, other=0),
        tl.load(stop + o1 + index[1], mask=inside, other=0),
        tl.load(stop + o2 + index[2], mask=inside, other=0),
    )
    return firsts, stops


@triton.jit
def _seen_by_row(firsts, stops, positions):
    """(queries, keys): which keys are in the window of which query."""
    s0 = (positions[0][None, :] >= firsts[0][:, None]) & (positions[0][None, :] < stops[0][:, None])
    s1 = (positions[1][None, :] >= firsts[1][:, None]) & (positions[1][None, :] < stops[1][:, None])
    s2 = (positions[2][None, :] >= firsts[2][:, None]) & (positions[2][None, :] < stops[2][:, None])
    return s0 & s1 & s2


@triton.jit
def _seen_by_column(firsts, stops, positions):
    """(keys, queries): the transpose of `_seen_by_row`."""
    s0 = (positions[0][:, None] >= firsts[0][None, :]) & (positions[0][:, None] < stops[0][None, :])
    s1 = (positions[1][:, None] >= firsts[1][None, :]) & (positions[1][:, None] < stops[1][None, :])
    s2 = (positions[2][:, None] >= firsts[2][None, :]) & (positions[2][:, None] < stops[2][None, :])
    return s0 & s1 & s2


@triton.jit
def _attend_tile(
    q, firsts, stops, top, total, acc, column, k_start, v_start, kept_start,
    k_strides, v_strides, kept_strides, shape, dilation, k_tiles, k_per_group, scale,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr, K_TILE: tl.constexpr,
    PRECISION: tl.constexpr, KEPT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the running softmax: the queries of a tile and the keys of another."""
    groups, corner = _corner(column, k_tiles, k_per_group)
    positions = _positions(corner, K_TILE)
    index = _indices(positions, groups, dilation)
    inside = _kept(kept_start, index, kept_strides, _inside(index, shape), KEPT)
    k = _load(k_start, _rows(index, k_strides), inside, DEPTH, BLOCK_D, MASKED)
    v = _load(v_start, _rows(index, v_strides), inside, WIDTH, BLOCK_W, MASKED)
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if MASKED:
        logits = tl.where(_seen_by_row(firsts, stops, positions) & inside[None, :], logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 1))
    finite = new_top
    if MASKED:
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(logits - finite[:, None])
    shrink = tl.exp2(top - finite)
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    return new_top, total, acc


@triton.jit
def forward(
    query, key, value, out, lse, first, stop, starts, partials, columns, kept,
    q_strides, k_strides, v_strides, out_strides, lse_strides, kept_strides, shape, dilation,
    q_tiles, q_per_group, k_tiles, k_per_group, heads, group, scale,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
    Q_TILE: tl.constexpr, K_TILE: tl.constexpr, PRECISION: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """out and lse of one tile of queries of one head."""
    tile, batch, head = _program(q_tiles, heads)
    groups, corner = _corner(tile, q_tiles, q_per_group)
    index = _indices(_positions(corner, Q_TILE), groups, dilation)
    inside = _inside(index, shape)
    firsts, stops = _windows(first, stop, index, inside, shape)
    q = _load(_start(query, q_strides, batch, head), _rows(index, q_strides), inside, DEPTH, BLOCK_D, True)
    k_start = _start(key, k_strides, batch, head // group)
    v_start = _start(value, v_strides, batch, head // group)
    kept_start = kept + batch.to(tl.int64) * kept_strides[0]

    BLOCK: tl.constexpr = Q_TILE[0] * Q_TILE[1] * Q_TILE[2]
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, BLOCK_W), tl.float32)
    middle = tl.load(partials + tile)
    for step in range(tl.load(starts + tile), middle):
        top, total, acc = _attend_tile(
            q, firsts, stops, top, total, acc, tl.load(columns + step), k_start, v_start, kept_start,
            k_strides, v_strides, kept_strides, shape, dilation, k_tiles, k_per_group, scale,
            DEPTH, WIDTH, BLOCK_D, BLOCK_W, K_TILE, PRECISION, KEPT, False,
        )  # fmt: skip
    for step in range(middle, tl.load(starts + tile + 1)):
        top, total, acc = _attend_tile(
            q, firsts, stops, top, total, acc, tl.load(columns + step), k_start, v_start, kept_start,
            k_strides, v_strides, kept_strides, shape, dilation, k_tiles, k_per_group, scale,
            DEPTH, WIDTH, BLOCK_D, BLOCK_W, K_TILE, PRECISION, KEPT, True,
        )  # fmt: skip
    total = tl.where(total == 0.0, 1.0, total)  # without a key, 0 and an lse of minus infinity
    result = acc / total[:, None]
    _store(_start(out, out_strides, batch, head), _rows(index, out_strides), inside, result, WIDTH, BLOCK_W)
    place = _start(lse, lse_strides, batch, head) + _rows(index, lse_strides)
    tl.store(place, (top + tl.log2(total)) * 0.6931471805599453, mask=inside)


@triton.jit
def _query_gradient_of_tile(
    q, d_out, lse, delta, firsts, stops, acc, column, k_start, v_start, kept_start,
    k_strides, v_strides, kept_strides, shape, dilation, k_tiles, k_per_group, scale,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr, K_TILE: tl.constexpr,
    PRECISION: tl.constexpr, KEPT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    groups, corner = _corner(column, k_tiles, k_per_group)
    positions = _positions(corner, K_TILE)
    index = _indices(positions, groups, dilation)
    inside = _kept(kept_start, index, kept_strides, _inside(index, shape), KEPT)
    k = _load(k_start, _rows(index, k_strides), inside, DEPTH, BLOCK_D, MASKED)
    v = _load(v_start, _rows(index, v_strides), inside, WIDTH, BLOCK_W, MASKED)
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None])
    if MASKED:
        p = tl.where(_seen_by_row(firsts, stops, positions) & inside[None, :], p, 0.0)
    d_logits = p * (tl.dot(d_out, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    return acc + tl.dot(d_logits.to(k.dtype), k, input_precision=PRECISION)


@triton.jit
def query_gradient(
    query, key, value, d_out, lse, delta, d_query, first, stop, starts, partials, columns, kept,
    q_strides, k_strides, v_strides, d_out_strides, lse_strides, d_query_strides, kept_strides,
    shape, dilation,
    q_tiles, q_per_group, k_tiles, k_per_group, heads, group, scale, factor,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
    Q_TILE: tl.constexpr, K_TILE: tl.constexpr, PRECISION: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries of one head."""
    tile, batch, head = _program(q_tiles, heads)
    groups, corner = _corner(tile, q_tiles, q_per_group)
    index = _indices(_positions(corner, Q_TILE), groups, dilation)
    inside = _inside(index, shape)
    firsts, stops = _windows(first, stop, index, inside, shape)
    q = _load(_start(query, q_strides, batch, head), _rows(index, q_strides), inside, DEPTH, BLOCK_D, True)
    g = _load(_start(d_out, d_out_strides, batch, head), _rows(index, d_out_strides), inside, WIDTH, BLOCK_W, True)
    rows = _rows(index, lse_strides)
    own_lse = tl.load(_start(lse, lse_strides, batch, head) + rows, mask=inside, other=0.0) * 1.4426950408889634
    own_delta = tl.load(_start(delta, lse_strides, batch, head) + rows, mask=inside, other=0.0)
    k_start = _start(key, k_strides, batch, head // group)
    v_start = _start(value, v_strides, batch, head // group)
    kept_start = kept + batch.to(tl.int64) * kept_strides[0]

    acc = tl.zeros((Q_TILE[0] * Q_TILE[1] * Q_TILE[2], BLOCK_D), tl.float32)
    middle = tl.load(partials + tile)
    for step in range(tl.load(starts + tile), middle):
        acc = _query_gradient_of_tile(
            q, g, own_lse, own_delta, firsts, stops, acc, tl.load(columns + step), k_start, v_start, kept_start,
            k_strides, v_strides, kept_strides, shape, dilation, k_tiles, k_per_group, scale,
            DEPTH, WIDTH, BLOCK_D, BLOCK_W, K_TILE, PRECISION, KEPT, False,
        )  # fmt: skip
    for step in range(middle, tl.load(starts + tile + 1)):
        acc = _query_gradient_of_tile(
            q, g, own_lse, own_delta, firsts, stops, acc, tl.load(columns + step), k_start, v_start, kept_start,
            k_strides, v_strides, kept_strides, shape, dilation, k_tiles, k_per_group, scale,
            DEPTH, WIDTH, BLOCK_D, BLOCK_W, K_TILE, PRECISION, KEPT, True,
        )  # fmt: skip
    start = _start(d_query, d_query_strides, batch, head)
    _store(start, _rows(index, d_query_strides), inside, acc * factor, DEPTH, BLOCK_D)


@triton.jit
def _key_gradient_of_tile(
    k, v, d_key, d_value, positions, kept, column, q_start, d_out_start, lse_start, delta_start, first, stop,
    q_strides, d_out_strides, lse_strides, shape, dilation, q_tiles, q_per_group, scale,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr, Q_TILE: tl.constexpr,
    PRECISION: tl.constexpr, KEPT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    groups, corner = _corner(column, q_tiles, q_per_group)
    index = _indices(_positions(corner, Q_TILE), groups, dilation)
    inside = _inside(index, shape)
    q = _load(q_start, _rows(index, q_strides), inside, DEPTH, BLOCK_D, True)
    g = _load(d_out_start, _rows(index, d_out_strides), inside, WIDTH, BLOCK_W, True)
    rows = _rows(index, lse_strides)
    lse = tl.load(lse_start + rows, mask=inside, other=0.0) * 1.4426950408889634
    delta = tl.load(delta_start + rows, mask=inside, other=0.0)
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - lse[None, :])
    if MASKED:
        firsts, stops = _windows(first, stop, index, inside, shape)
        p = tl.where(_seen_by_column(firsts, stops, positions) & kept[:, None], p, 0.0)
    d_value += tl.dot(p.to(g.dtype), g, input_precision=PRECISION)
    d_logits = p * (tl.dot(v, tl.trans(g), input_precision=PRECISION) - delta[None, :])
    d_key += tl.dot(d_logits.to(q.dtype), q, input_precision=PRECISION)
    return d_key, d_value


@triton.jit
def key_gradient(
    query, key, value, d_out, lse, delta, d_key, d_value, first, stop, starts, partials, columns, kept,
    q_strides, k_strides, v_strides, d_out_strides, lse_strides, d_key_strides, d_value_strides,
    kept_strides, shape, dilation,
    q_tiles, q_per_group, k_tiles, k_per_group, heads, group, scale, factor,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
    Q_TILE: tl.constexpr, K_TILE: tl.constexpr, PRECISION: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values of one of the `heads` key heads, from all query heads that read it."""
    tile, batch, head = _program(k_tiles, heads)
    groups, corner = _corner(tile, k_tiles, k_per_group)
    positions = _positions(corner, K_TILE)
    index = _indices(positions, groups, dilation)
    on_grid = _inside(index, shape)
    inside = _kept(kept + batch.to(tl.int64) * kept_strides[0], index, kept_strides, on_grid, KEPT)
    k = _load(_start(key, k_strides, batch, head), _rows(index, k_strides), inside, DEPTH, BLOCK_D, True)
    v = _load(_start(value, v_strides, batch, head), _rows(index, v_strides), inside, WIDTH, BLOCK_W, True)

    BLOCK: tl.constexpr = K_TILE[0] * K_TILE[1] * K_TILE[2]
    dk = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK, BLOCK_W), tl.float32)
    begin, middle, end = tl.load(starts + tile), tl.load(partials + tile), tl.load(starts + tile + 1)
    for member in range(group):
        q_head = head * group + member
        q_start = _start(query, q_strides, batch, q_head)
        g_start = _start(d_out, d_out_strides, batch, q_head)
        lse_start = _start(lse, lse_strides, batch, q_head)
        delta_start = _start(delta, lse_strides, batch, q_head)
        for step in range(begin, middle):
            dk, dv = _key_gradient_of_tile(
                k, v, dk, dv, positions, inside, tl.load(columns + step), q_start, g_start, lse_start, delta_start,
                first, stop, q_strides, d_out_strides, lse_strides, shape, dilation, q_tiles, q_per_group, scale,
                DEPTH, WIDTH, BLOCK_D, BLOCK_W, Q_TILE, PRECISION, KEPT, False,
            )  # fmt: skip
        for step in range(middle, end):
            dk, dv = _key_gradient_of_tile(
                k, v, dk, dv, positions, inside, tl.load(columns + step), q_start, g_start, lse_start, delta_start,
                first, stop, q_strides, d_out_strides, lse_strides, shape, dilation, q_tiles, q_per_group, scale,
                DEPTH, WIDTH, BLOCK_D, BLOCK_W, Q_TILE, PRECISION, KEPT, True,
            )  # fmt: skip
    start = _start(d_key, d_key_strides, batch, head)
    _store(start, _rows(index, d_key_strides), on_grid, dk * factor, DEPTH, BLOCK_D)
    start = _start(d_value, d_value_strides, batch, head)
    _store(start, _rows(index, d_value_strides), on_grid, dv, WIDTH, BLOCK_W)
