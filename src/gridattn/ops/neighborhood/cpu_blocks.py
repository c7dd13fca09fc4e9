"""What the CPU kernels do with blocks, runs and tiles of a `Tiling`: reading tables, moving rows, masks and biases.

Tensors are flat views of their memory with a row of strides (batch, three axes, head) each.
"""

import math

import numpy as np
from numba import njit

from gridattn.ops.neighborhood.cpu_products import KEY_BLOCK, QUERY_BLOCK
from gridattn.ops.neighborhood.cpu_tiles import LANES
from gridattn.ops.neighborhood.cpu_vector import add_row, prefetch_row, read_row, write_row

HIDDEN = -1e30  # a logit that must not count; finite, so that no arithmetic on it makes a NaN
LOG2_E = 1.0 / math.log(2.0)
PREFETCH = 8  # rows between the one that is copied and the one that is asked for
QUERY_BLOCKS = LANES // QUERY_BLOCK


@njit(nogil=True)
def _row_of(stride, sample, head, step, box, a, b, c):
    """Where a head's row at (a, b, c) of a box of keys or queries (first, number) begins."""
    row = sample * stride[0] + head * stride[4] + (box[0, 0] + a * step[0]) * stride[1]
    return row + (box[1, 0] + b * step[1]) * stride[2] + (box[2, 0] + c * step[2]) * stride[3]


@njit(nogil=True)
def copy_box(source, stride, sample, head, step, box, depth, pitch, target):
    """Copies the rows of a box of keys side by side, `pitch` numbers apart."""
    to = 0
    for a in range(box[0, 1]):
        for b in range(box[1, 1]):
            for c in range(box[2, 1]):
                at = _row_of(stride, sample, head, step, box, a, b, c)
                prefetch_row(source, at + PREFETCH * step[2] * stride[3], depth)
                read_row(source, at, 1.0, depth, target, to)
                to += pitch


@njit(nogil=True)
def add_box(source, factor, stride, sample, head, step, box, depth, pitch, target):
    """Adds the rows of a box, as `copy_box` lays them out, times a factor to the tensor they belong to."""
    at = 0
    for a in range(box[0, 1]):
        for b in range(box[1, 1]):
            for c in range(box[2, 1]):
                to = _row_of(stride, sample, head, step, box, a, b, c)
                add_row(source, at, factor, depth, target, to)
                at += pitch


@njit(nogil=True)
def hide_masked(key_mask, stride, sample, step, box, keys, values, penalty):
    """Marks the keys of a box that the mask hides and clears what they hold, which may be anything."""
    row = 0
    for a in range(box[0, 1]):
        for b in range(box[1, 1]):
            for c in range(box[2, 1]):
                penalty[row] = 0
                if not key_mask[_row_of(stride, sample, 0, step, box, a, b, c)]:
                    penalty[row] = HIDDEN
                    for d in range(keys.shape[1]):
                        keys[row, d] = 0
                    for d in range(values.shape[1]):
                        values[row, d] = 0
                row += 1


@njit(nogil=True)
def _lane_hull(begin, end, position):
    """The first lane that sees a position along one axis, and the last one + 1."""
    first, last = LANES, 0
    for lane in range(LANES):
        if begin[lane] <= position < end[lane]:
            first = min(first, lane)
            last = lane + 1
    return first, last


@njit(nogil=True)
def lay_out_pattern(pattern, extent, box, logits, rows, lane_from, lane_to, group_keys, group_count):
    """Fills the tables that all tiles of one pattern share; returns their number of keys.

    Args:
        pattern: (3, 3, LANES) visible ranges of the lanes along each axis, see `Tiling.patterns`.
        extent: keys of a tile along each axis.
        box: the block's keys, see `open_block`.
        logits: (keys, LANES) set to 0 where a lane sees a key and to HIDDEN elsewhere.
        rows: (keys,) set to the row of each key in the block, counted from the tile's first key.
        lane_from, lane_to: (keys,) set to a range of lanes that holds all lanes that see a key.
        group_keys, group_count: set to the keys that each group of QUERY_BLOCK lanes sees, and how many.
    """
    hull = np.empty((max(extent[0], extent[1], extent[2]), 3, 2), np.int64)
    for axis in range(3):
        for position in range(extent[axis]):
            hull[position, axis, 0], hull[position, axis, 1] = _lane_hull(pattern[axis, 0], pattern[axis, 1], position)
    count = 0
    sees = np.empty(LANES, np.bool_)
    for a in range(extent[0]):
        for b in range(extent[1]):
            for lane in range(LANES):
                sees[lane] = (pattern[0, 0, lane] <= a < pattern[0, 1, lane]) & (
                    pattern[1, 0, lane] <= b < pattern[1, 1, lane]
                )
            for c in range(extent[2]):
                for lane in range(LANES):
                    visible = sees[lane] & (pattern[2, 0, lane] <= c) & (c < pattern[2, 1, lane])
                    logits[count, lane] = 0.0 if visible else HIDDEN
                rows[count] = (a * box[1, 1] + b) * box[2, 1] + c
                lane_from[count] = max(hull[a, 0, 0], hull[b, 1, 0], hull[c, 2, 0])
                lane_to[count] = max(min(hull[a, 0, 1], hull[b, 1, 1], hull[c, 2, 1]), lane_from[count])
                count += 1
    low, high = np.empty(3, np.int64), np.empty(3, np.int64)
    for group in range(QUERY_BLOCKS):
        for axis in range(3):
            low[axis], high[axis] = extent[axis], 0
        for lane in range(group * QUERY_BLOCK, (group + 1) * QUERY_BLOCK):
            if pattern[0, 1, lane] * pattern[1, 1, lane] * pattern[2, 1, lane] > 0:
                for axis in range(3):
                    low[axis] = min(low[axis], pattern[axis, 0, lane])
                    high[axis] = max(high[axis], pattern[axis, 1, lane])
        found = 0
        for a in range(low[0], high[0]):
            for b in range(low[1], high[1]):
                for c in range(low[2], high[2]):
                    group_keys[group, found] = (a * extent[1] + b) * extent[2] + c
                    found += 1
        group_count[group] = found
    for extra in range(count, -(-count // KEY_BLOCK) * KEY_BLOCK):
        rows[extra] = 0
        for lane in range(LANES):
            logits[extra, lane] = HIDDEN
    return count


@njit(nogil=True)
def _bias_index(pattern, kernel, a, b, c, lane):
    """Where a head's flat bias table holds the entry of key (a, b, c) of a tile for one lane."""
    row = (a + pattern[0, 2, lane]) * (2 * kernel[1] - 1) + b + pattern[1, 2, lane]
    return row * (2 * kernel[2] - 1) + c + pattern[2, 2, lane]


@njit(nogil=True)
def add_bias(pattern, extent, kernel, bias, start, logits):
    """Replaces the 0 of visible keys by their entry of a head's bias table, in base 2."""
    key = 0
    for a in range(extent[0]):
        for b in range(extent[1]):
            for c in range(extent[2]):
                for lane in range(LANES):
                    if logits[key, lane] > HIDDEN / 2:
                        logits[key, lane] = bias[start + _bias_index(pattern, kernel, a, b, c, lane)] * LOG2_E
                key += 1


@njit(nogil=True)
def add_bias_gradient(pattern, extent, kernel, d_logits, visible, start, d_bias):
    """Adds the gradients of a tile's logits to the entries of a head's bias table."""
    key = 0
    for a in range(extent[0]):
        for b in range(extent[1]):
            for c in range(extent[2]):
                for lane in range(LANES):
                    if visible[key, lane] > HIDDEN / 2:
                        d_bias[start + _bias_index(pattern, kernel, a, b, c, lane)] += d_logits[key, lane]
                key += 1


@njit(nogil=True)
def load_queries(source, factor, stride, sample, head, step, tile, shape, depth, pitch, target):
    """Copies the rows of a tile's queries, one per lane, times a factor; lanes without a query keep what they hold."""
    for a in range(tile[0, 1]):
        for b in range(tile[1, 1]):
            for c in range(tile[2, 1]):
                to = ((a * shape[1] + b) * shape[2] + c) * pitch
                at = _row_of(stride, sample, head, step, tile, a, b, c)
                prefetch_row(source, at + tile[2, 1] * step[2] * stride[3], depth)  # most likely of the next tile
                read_row(source, at, factor, depth, target, to)


@njit(nogil=True)
def store_queries(source, factors, stride, sample, head, step, tile, shape, depth, pitch, target):
    """Writes rows of a tile's queries, each times the factor of its lane, to the tensor they belong to."""
    for a in range(tile[0, 1]):
        for b in range(tile[1, 1]):
            for c in range(tile[2, 1]):
                lane = (a * shape[1] + b) * shape[2] + c
                to = _row_of(stride, sample, head, step, tile, a, b, c)
                write_row(source, lane * pitch, factors[lane], depth, target, to)


@njit(nogil=True)
def _unravel(index, begin, end):
    """The index-th triple of three ranges."""
    c = index % (end[2] - begin[2])
    index //= end[2] - begin[2]
    return index // (end[1] - begin[1]) + begin[0], index % (end[1] - begin[1]) + begin[1], c + begin[2]


@njit(nogil=True)
def open_block(item, items, blocks, box, run_begin, run_end):
    """Reads an item's block: its box of keys (first, number) and its runs along each axis; returns the item's head."""
    for axis in range(3):
        block = blocks[axis, items[item % len(items), axis]]
        run_begin[axis], run_end[axis] = block[0], block[1]
        box[axis, 0], box[axis, 1] = block[2], block[3]
    return item // len(items)


@njit(nogil=True)
def open_run(index, run_begin, run_end, runs, tiles, patterns, pattern, extent, tile_begin, tile_end):
    """Reads the tables of a block's run: its pattern, the keys of its tiles along each axis and the tiles."""
    chosen = _unravel(index, run_begin, run_end)
    for axis in range(3):
        run = runs[axis, chosen[axis]]
        tile_begin[axis], tile_end[axis] = run[0], run[1]
        for i in range(3):
            for lane in range(LANES):
                pattern[axis, i, lane] = patterns[axis, run[2], i, lane]
        extent[axis] = tiles[axis, run[0], 3]


@njit(nogil=True)
def open_tile(index, tile_begin, tile_end, tiles, box, tile):
    """Reads a run's tile: its queries (first, number) along each axis; returns its first key as a row of the block."""
    chosen = _unravel(index, tile_begin, tile_end)
    row = 0
    for axis in range(3):
        tile[axis, 0] = tiles[axis, chosen[axis], 0]
        tile[axis, 1] = tiles[axis, chosen[axis], 1]
        row = row * box[axis, 1] + tiles[axis, chosen[axis], 2]
    return row


@njit(nogil=True)
def hide_keys(visible, penalty, first_row, rows, count, logits):
    """Logits of one tile from those of its pattern and the block's masked keys."""
    for i in range(count):
        extra = penalty[first_row + rows[i]]
        for lane in range(LANES):
            logits[i, lane] = visible[i, lane] + extra


@njit(nogil=True)
def scratch_tables(most_keys):
    """Room for what `open_block`, `open_run`, `open_tile` and `lay_out_pattern` fill, in this order."""
    bounds = np.empty((5, 3), np.int64)
    return (
        (np.empty((3, 2), np.int64), bounds[0], bounds[1]),
        (np.empty((3, 3, LANES), np.int64), bounds[2], bounds[3], bounds[4]),
        np.empty((3, 2), np.int64),
        (np.empty(most_keys, np.int64), np.empty(most_keys, np.int64), np.empty(most_keys, np.int64)),
        (np.empty((QUERY_BLOCKS, most_keys), np.int64), np.empty(QUERY_BLOCKS, np.int64)),
    )


@njit(nogil=True)
def room(like, rows, pitch):
    """(rows, pitch) zeros of the type of an array."""
    return np.zeros((rows, pitch), like.dtype)


@njit(nogil=True)
def numbers(like, count):
    """(count,) zeros of the type of an array."""
    return np.zeros(count, like.dtype)


@njit(nogil=True)
def multiply(target, by, count):
    for i in range(count):
        for lane in range(LANES):
            target[i, lane] *= by[i, lane]


@njit(nogil=True)
def add(target, what, count):
    for i in range(count):
        for lane in range(LANES):
            target[i, lane] += what[i, lane]


@njit(nogil=True)
def fill(target, number):
    for i in range(target.shape[0]):
        for d in range(target.shape[1]):
            target[i, d] = number


@njit(nogil=True)
def triples(begin, end):
    """How many triples three ranges have."""
    return (end[0] - begin[0]) * (end[1] - begin[1]) * (end[2] - begin[2])
