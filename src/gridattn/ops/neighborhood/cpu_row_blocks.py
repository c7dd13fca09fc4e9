"""How the backward row kernel cuts a neighborhood attention problem, as integer tables.

A *block* owns a box of positions of one dilation group and gives the gradients of their queries, keys and values. For
those it visits the queries that see a key that it owns, and the keys that these queries see. Positions, which queries
and keys share, are counted within their group.

An *area* is a block along the axes before the last one. The kernel goes through its pairs of neighbouring rows of
queries, and keeps P and dS of a row until every row of keys that it sees has been worked on. Lanes are neighbouring
queries of a row, and then neighbouring keys.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from math import ceil, prod

import numpy as np

from gridattn.ops.neighborhood.cpu_rows import ROW_LANES, row_pitch
from gridattn.ops.neighborhood.cpu_tiles import MIN_ITEMS
from gridattn.ops.neighborhood.plan import AxisPlan, Plan

BAND = 4  # pairs of query rows that are visited before keys are: they share most of what they read
BAND_BYTES = 1024 * 1024  # wanted most of the keys and values that these pairs see: they shall stay in cache
LEAST_ROW = 4  # windows that a row must hold to be cut for that
SCRATCH_BYTES = 24 * 1024 * 1024  # wanted most of what a thread copies and keeps for a block
LEAST_CUT = 8  # windows along an axis from which on cutting it is worth the work done twice, for the sake of threads


@dataclass(frozen=True)
class RowBlocks:
    """Tables of a problem on a grid of rank 3 (missing axes have length 1).

    "Inside" means counted from the block's first query or key. A row that is missing has the number -1.
    """

    step: np.ndarray  # (3,): dilation
    kernel: np.ndarray  # (3,): kernel size
    areas: np.ndarray  # (n, 11): keys, then queries: first plane on the grid, planes, first row on the grid, rows;
    # first and last + 1 of its pairs of query rows, first of its pairs of key rows
    pairs: np.ndarray  # (n, 11): plane, rows A and B on the grid; number of row A inside; first key plane, first key
    # row of A and of B inside; rows of the bias table of A and B; first and last + 1 of the owned rows (0: A, 1: B)
    due: np.ndarray  # (n,): of the area's pairs of key rows, those that see no query after a pair of query rows
    key_pairs: np.ndarray  # (n, 9): plane, rows A and B on the grid; queries: first plane inside, planes, first row
    # inside and rows of A, the same of B
    columns: np.ndarray  # (n, 8): first key on the grid, keys, first query on the grid, queries; first and last + 1 of
    # its vectors of queries, of its vectors of keys
    vectors: np.ndarray  # (n, 9): first query on the grid, queries, its place in a row of queries; first key inside,
    # least bias entry; first and last + 1 of the owned lanes, their kind; entries of a row of the window that
    # the lanes see together, or 0 where that is what each one sees
    lanes: np.ndarray  # (n, 2 * ROW_LANES) int32: first key and bias entry of each lane, as in `RowTiling`
    kinds: np.ndarray  # (n, ROW_LANES): bias entry of each owned lane's first key; -1 for one that another vector has
    key_vectors: np.ndarray  # (n, 6): first key on the grid, keys; place in a row of queries of the first query of lane
    # 0, queries of a lane; where P of the first vector of queries is kept, the first of their rows of the next tables
    places: np.ndarray  # (n, 2): where the two vectors of queries are kept, counted from there, that see a lane's key
    origins: np.ndarray  # (n, 4 * ROW_LANES) int32: the bits of each lane to take from one and the other, and the lanes
    # that the queries have in them
    capacity: np.ndarray  # (8,): rows of keys and the room for one, rows of queries and the room for one, its first
    # place; pairs of query rows that are kept, numbers of one; most vectors of the weights of a pair of key rows
    items: np.ndarray  # (n, 2): every block as its area and its columns

    @property
    def tables(self) -> tuple[np.ndarray, ...]:
        """What the kernel reads, in the order of its arguments."""
        of_rows = self.areas, self.pairs, self.due, self.key_pairs
        of_columns = self.columns, self.vectors, self.lanes, self.kinds, self.key_vectors, self.places, self.origins
        return self.step, self.kernel, *of_rows, *of_columns, self.capacity, self.items


@dataclass(frozen=True)
class _Part:
    """What a block owns along an axis, as positions in a dilation group; ranges are (first, last + 1)."""

    axis: AxisPlan
    group: int
    start: np.ndarray  # of the whole group: first key of each query
    owned: tuple[int, int]

    @cached_property
    def seeing(self) -> list[tuple[int, int]]:
        """The queries that see each key of the group."""
        key = np.arange(len(self.start))
        first, last = (np.searchsorted(self.start, least, side="right") for least in (key - self.axis.kernel, key))
        return list(zip(first.tolist(), last.tolist()))

    @cached_property
    def queries(self) -> tuple[int, int]:
        """The queries that see a key that is owned."""
        return self.seeing[self.owned[0]][0], self.seeing[self.owned[1] - 1][1]

    @cached_property
    def keys(self) -> tuple[int, int]:
        """The keys that these queries see."""
        first, last = self.queries
        return int(self.start[first]), int(self.start[last - 1]) + self.axis.kernel

    @cached_property
    def bias(self) -> np.ndarray:
        """Entry of the bias table for the first key of each query of the group."""
        return self.start - np.arange(len(self.start)) + self.axis.kernel - 1

    def owns(self, position: int) -> bool:
        return self.owned[0] <= position < self.owned[1]

    def on_grid(self, position: int) -> int:
        return self.group + self.axis.dilation * position

    def range_on_grid(self, positions: tuple[int, int]) -> tuple[int, int]:
        """First index on the grid, and how many."""
        return self.on_grid(positions[0]), positions[1] - positions[0]


def _parts(axis: AxisPlan, cuts: int) -> list[_Part]:
    parts = []
    for group in range(min(axis.dilation, axis.length)):
        start = axis.start[group :: axis.dilation] // axis.dilation
        for owned in np.array_split(np.arange(len(start)), min(cuts, len(start))):
            parts.append(_Part(axis, group, start, (int(owned[0]), int(owned[-1]) + 1)))
    return parts


@lru_cache(maxsize=256)
def make_row_blocks(plan: Plan, depths: int, heads: int) -> RowBlocks:
    """Cuts a problem without stride or causality that `fits_rows`.

    Args:
        plan: the problem.
        depths: numbers of a key and a value together, as the kernel copies them.
        heads: number of (sample, head) pairs, each of which is worked on separately.
    """
    axes = (AxisPlan(1, 1),) * (3 - plan.rank) + plan.axes
    planes, rows, columns = parts = _cut(axes, depths, ceil(MIN_ITEMS // 2 / heads))
    row_tables = _RowTables(planes, rows)
    column_tables = _ColumnTables(columns, axes[0].kernel * axes[1].kernel)
    key_rows, query_rows = (prod(_most(part, what) for part in parts[:2]) for what in ("keys", "queries"))
    pitch, room = row_pitch(_most(columns, "keys")), row_pitch(column_tables.room)
    weights = row_tables.most_queries * column_tables.most_queries
    kept = row_tables.kept, column_tables.most_vectors * column_tables.vector_size
    return RowBlocks(
        step=np.array([axis.dilation for axis in axes]),
        kernel=np.array([axis.kernel for axis in axes]),
        areas=np.array(row_tables.areas),
        pairs=np.array(row_tables.pairs),
        due=np.array(row_tables.due),
        key_pairs=np.array(row_tables.key_pairs),
        columns=np.array(column_tables.columns),
        vectors=np.array(column_tables.vectors),
        lanes=np.array(column_tables.lanes, np.int32),
        kinds=np.array(list(column_tables.kinds)),
        key_vectors=np.array(column_tables.key_vectors),
        places=np.array(column_tables.places),
        origins=np.array(column_tables.origins, np.int32),
        capacity=np.array([key_rows, pitch, query_rows, room, column_tables.margin, *kept, weights]),
        items=np.array(list(product(range(len(row_tables.areas)), range(len(columns))))),
    )


def _most(parts: list[_Part], what: str) -> int:
    """The most queries or keys of a part."""
    return max(last - first for first, last in (getattr(part, what) for part in parts))


def _cut(axes: tuple[AxisPlan, ...], depths: int, min_blocks: int) -> list[list[_Part]]:
    """Cuts rows that are too long, then the axis with the most windows until blocks are many and small enough."""
    cuts = [1] * len(axes)
    while True:
        parts = [_parts(axis, count) for axis, count in zip(axes, cuts)]
        owned = [_most(of_axis, "owned") for of_axis in parts]
        windows = [size / axis.kernel if size > 1 else 0 for size, axis in zip(owned, axes)]
        longest = max(range(len(axes)), key=windows.__getitem__)
        band = 4 * depths * (2 * BAND + axes[1].kernel - 1) * _most(parts[2], "keys")
        too_few = prod(map(len, parts)) < min_blocks and windows[longest] >= LEAST_CUT
        too_big = _scratch_bytes(axes, parts, depths) > SCRATCH_BYTES and windows[longest] > 1
        if axes[1].length > 1 and band > BAND_BYTES and windows[2] >= LEAST_ROW:
            cuts[2] += 1
        elif too_few or too_big:
            cuts[longest] += 1
        else:
            return parts


def _scratch_bytes(axes: tuple[AxisPlan, ...], parts: list[list[_Part]], depths: int) -> int:
    """About how much the kernel needs for what it copies and for P and dS."""
    keys, queries = ([_most(of_axis, what) for of_axis in parts] for what in ("keys", "queries"))
    kept = queries[1] * min(queries[0], 3 * axes[0].kernel // 2 + 1)
    if queries[0] == 1:
        kept = min(queries[1], 3 * axes[1].kernel // 2 + 2 * BAND)
    weights = kept * axes[0].kernel * axes[1].kernel * (2 * axes[2].kernel - 1) * keys[2]
    return 4 * (depths * (prod(keys) + prod(queries)) + 2 * weights)


class _RowTables:
    """The tables of all areas, filled one area after another."""

    def __init__(self, planes: list[_Part], rows: list[_Part]):
        self.areas, self.pairs, self.due, self.key_pairs = [], [], [], []
        self.kept = self.most_queries = 0
        for of_planes, of_rows in product(planes, rows):
            keys = *of_planes.range_on_grid(of_planes.keys), *of_rows.range_on_grid(of_rows.keys)
            queries = *of_planes.range_on_grid(of_planes.queries), *of_rows.range_on_grid(of_rows.queries)
            begin = len(self.pairs), len(self.key_pairs)
            self._add_area(of_planes, of_rows)
            self.areas.append((*keys, *queries, begin[0], len(self.pairs), begin[1]))

    def _add_area(self, planes: _Part, rows: _Part) -> None:
        pairs_of_plane = ceil((rows.queries[1] - rows.queries[0]) / 2)

        def pair_of(plane: int, row: int) -> int:
            return (plane - planes.queries[0]) * pairs_of_plane + (row - rows.queries[0]) // 2

        key_pairs = []  # the first and the last pair of rows of queries that see one of the rows, and the row of tables
        for plane, row in product(range(*planes.owned), range(rows.owned[0], rows.owned[1], 2)):
            first_plane, last_plane = planes.seeing[plane]
            first, last = rows.seeing[row]
            first_b, last_b = rows.seeing[row + 1] if rows.owns(row + 1) else (last, last)
            seen = first_plane - planes.queries[0], last_plane - first_plane
            seen += first - rows.queries[0], last - first, first_b - rows.queries[0], last_b - first_b
            at = planes.on_grid(plane), rows.on_grid(row), rows.on_grid(row + 1) if rows.owns(row + 1) else -1
            key_pairs.append((pair_of(last_plane - 1, last_b - 1), pair_of(first_plane, first), (*at, *seen)))
            self.most_queries = max(self.most_queries, 2 * seen[1] * max(seen[3], seen[5]))
        key_pairs.sort()
        lasts = [last for last, *_ in key_pairs]
        due = [bisect_right(lasts, pair) for pair in range(pairs_of_plane * (planes.queries[1] - planes.queries[0]))]
        self.key_pairs += [pair for *_, pair in key_pairs]
        self.due += due
        for plane, row in product(range(*planes.queries), range(*rows.queries, 2)):
            self.pairs.append(_query_pair(planes, rows, plane, row))

        done = 0
        for last in [*range(BAND - 1, len(due) - 1, BAND), len(due) - 1]:
            self.kept = max([self.kept, *(last + 1 - first for _, first, _ in key_pairs[done : due[last]])])
            done = due[last]


def _query_pair(planes: _Part, rows: _Part, plane: int, row: int) -> tuple[int, ...]:
    has_b = row + 1 < rows.queries[1]
    at = planes.on_grid(plane), rows.on_grid(row), rows.on_grid(row + 1) if has_b else -1
    inside = (plane - planes.queries[0]) * (rows.queries[1] - rows.queries[0]) + row - rows.queries[0]
    key_rows = rows.start[row], rows.start[row + 1] if has_b else rows.start[row] + rows.axis.kernel
    first_keys = planes.start[plane] - planes.keys[0], *(key - rows.keys[0] for key in key_rows)
    bias = [planes.bias[plane] * (2 * rows.axis.kernel - 1) + rows.bias[b] for b in (row, row + has_b)]
    owned = [m for m in range(1 + has_b) if planes.owns(plane) and rows.owns(row + m)]
    return (*at, inside, *first_keys, *bias, min(owned, default=0), max(owned, default=-1) + 1)


class _ColumnTables:
    """The tables of all blocks along the last axis, filled one after another."""

    def __init__(self, parts: list[_Part], window_rows: int):
        self.columns, self.vectors, self.lanes, self.key_vectors, self.places, self.origins = [], [], [], [], [], []
        self.kinds: dict[tuple[int, ...], int] = {}
        self.patterns: dict[tuple, int] = {}
        self.vector_size = 2 * window_rows * (2 * parts[0].axis.kernel - 1) * ROW_LANES
        for part in parts:
            begin, done = (len(self.vectors), len(self.key_vectors)), part.owned[0]
            firsts = _vectors_of(part.queries)
            for first in firsts:
                self._add_vector(part, first, done)
                done = max(done, first + ROW_LANES)
            for first in _vectors_of(part.owned):
                self._add_key_vector(part, first, firsts)
            ranges = *part.range_on_grid(part.keys), *part.range_on_grid(part.queries)
            self.columns.append((*ranges, begin[0], len(self.vectors), begin[1], len(self.key_vectors)))
        # The queries of a vector of keys may begin before the first one.
        self.margin = max(-min(vector[2] for vector in self.key_vectors), 0)
        self.vectors = [(*vector[:2], vector[2] + self.margin, *vector[3:]) for vector in self.vectors]
        self.key_vectors = [(*vector[:2], vector[2] + self.margin, *vector[3:]) for vector in self.key_vectors]
        self.room = max([*(v[2] for v in self.vectors), *(v[2] + v[3] - 1 for v in self.key_vectors)])
        self.most_queries = max(vector[3] for vector in self.key_vectors)
        self.most_vectors = max(of_part[5] - of_part[4] for of_part in self.columns)

    def _add_vector(self, part: _Part, first: int, done: int) -> None:
        queries = min(ROW_LANES, part.queries[1] - first)
        lane = first + np.minimum(np.arange(ROW_LANES), queries - 1)
        start, bias = part.start[lane], part.bias[lane]
        owned = [i for i in range(queries) if part.owns(first + i)]
        kind = tuple(int(bias[i]) if i in owned and first + i >= done else -1 for i in range(ROW_LANES))
        entries = part.axis.kernel + bias.max() - bias.min() if queries < ROW_LANES or bias.min() < bias.max() else 0
        at = part.on_grid(first), queries, first - part.queries[0], start[0] - part.keys[0], bias.min()
        lanes = min(owned, default=0), max(owned, default=-1) + 1, self.kinds.setdefault(kind, len(self.kinds))
        self.vectors.append((*at, *lanes, entries))
        self.lanes.append([*(start - start[0]), *(bias - bias.min())])

    def _add_key_vector(self, part: _Part, first: int, firsts: np.ndarray) -> None:
        keys = range(first, min(first + ROW_LANES, part.owned[1]))
        seeing = [(a - first, b - first) for a, b in part.seeing[keys.start : keys.stop]]
        offsets = min(a - i for i, (a, _) in enumerate(seeing)), max(b - i for i, (_, b) in enumerate(seeing))
        lowest = int(np.searchsorted(firsts + ROW_LANES, first + seeing[0][0], side="right"))
        nearby = [int(vector) - first for vector in firsts[lowest : lowest + len(range(*offsets)) // ROW_LANES + 3]]
        pattern = *seeing, *nearby
        if pattern not in self.patterns:
            self.patterns[pattern] = len(self.origins)
            for offset in range(*offsets):
                queries = [i + offset if a <= i + offset < b else None for i, (a, b) in enumerate(seeing)]
                self._add_origins(queries, nearby, part.axis.kernel - 1 - offset)
        at = part.on_grid(first), len(keys), first + offsets[0] - part.queries[0], len(range(*offsets))
        self.key_vectors.append((*at, lowest * self.vector_size, self.patterns[pattern]))

    def _add_origins(self, queries: list[int | None], firsts: list[int], entry: int) -> None:
        """Which two neighbouring vectors hold a query of each lane, and where in them."""
        lowest = min(query for query in queries if query is not None)
        a = next(i for i, first in enumerate(firsts) if lowest < first + ROW_LANES)
        b = min(a + 1, len(firsts) - 1)
        self.places.append([vector * self.vector_size + entry * ROW_LANES for vector in (a, b)])
        from_a, from_b, lanes_a, lanes_b = np.zeros((4, ROW_LANES), np.int64)
        for lane, query in enumerate(queries):
            if query is not None:
                in_a = int(query < firsts[a] + ROW_LANES)
                from_a[lane], from_b[lane] = -in_a, in_a - 1
                lanes_a[lane], lanes_b[lane] = query - firsts[a], query - firsts[b]
        self.origins.append([*from_a, *from_b, *lanes_a % ROW_LANES, *lanes_b % ROW_LANES])


def _vectors_of(positions: tuple[int, int]) -> np.ndarray:
    """Where vectors begin that cover a range; the last one may overlap the one before."""
    first, last = positions
    return np.minimum(np.arange(first, last, ROW_LANES), max(last - ROW_LANES, first))
