"""What the backward row kernel does with vectors beside the products that it shares with the forward pass."""

from llvmlite import ir

from gridattn.ops.neighborhood.cpu_row_products import row_loop
from gridattn.ops.neighborhood.cpu_vector import Sums, Vectors, count_up, int64, whole_blocks


@row_loop
def take_columns(v, source, at, pitch, depth, target, to):
    """target[d, lane] = source[d, lane]; rows of the source lie `pitch` numbers apart, from `at` on."""
    b = v.builder
    with count_up(b, int64(0), depth) as (d, _):
        vector = v.load(source, b.add(at, b.mul(d, pitch)))
        v.store(vector, target, b.add(to, b.mul(d, int64(v.width))))


@row_loop
def row_dots(v, a, a_at, a_apart, c, c_at, c_apart, count, depth, target, to):
    """target[x] -= sum over d of a[x, d] * c[x, d], rows of floats or of bfloat16; of the target from `to` on."""
    b, one = v.builder, Vectors(v.context, v.builder, v.dtype, 1)
    whole = whole_blocks(b, int64(0), depth, v.width)
    with count_up(b, int64(0), count) as (x, _):
        at = [b.add(start, b.mul(x, apart)) for start, apart in ((a_at, a_apart), (c_at, c_apart))]
        parts = []
        for vectors, start, stop in ((v, int64(0), whole), (one, whole, depth)):
            sums = Sums(vectors, 1)
            sums[0] = vectors.constant(0.0)
            with count_up(b, start, stop, vectors.width) as (d, _):
                left, right = (vectors.load_stored(source, b.add(row, d)) for source, row in zip((a, c), at))
                sums[0] = vectors.multiply_add(left, right, sums[0])
            parts.append(vectors.total(sums[0]))
        there = b.add(to, x)
        number = b.fsub(v.element(target, there), b.fadd(*parts))
        b.store(number, b.gep(target, [there]))


@row_loop
def key_weights(v, p, ds, row_places, first_row, rows, offset, places, origins, first, count, p_out, ds_out, to):
    """Gathers P and dS of some rows of queries for a vector of keys.

    Args:
        p, ds: vectors of queries. row_places: where those begin that a row of queries has for the first row of keys.
        first_row, rows: the rows of queries. offset: from the first row of keys to theirs.
        places, origins: rows from `first` on say for each of `count` queries of a key which two vectors of queries hold
            the numbers of all lanes, from which to take each lane (all of its bits, or none), and which lane there.
        p_out, ds_out: receive `count` vectors for each row, from `to` on.
    """
    b, wide = v.builder, int64(v.width)
    with count_up(b, int64(0), rows) as (y, _):
        at = b.add(v.element(row_places, b.add(first_row, y)), offset)
        row_to = b.add(to, b.mul(b.mul(y, count), wide))
        with count_up(b, int64(0), count) as (i, _):
            row = b.add(first, i)
            table = [v.load_index(origins, b.mul(b.add(b.mul(row, int64(4)), int64(n)), wide)) for n in range(4)]
            pair = [b.add(at, v.element(places, b.add(b.mul(row, int64(2)), int64(n)))) for n in range(2)]
            for source, target in ((p, p_out), (ds, ds_out)):
                parts = [v.permute(v.load(source, place), table[2 + n]) for n, place in enumerate(pair)]
                bits = [b.and_(b.bitcast(part, table[n].type), table[n]) for n, part in enumerate(parts)]
                v.store(b.bitcast(b.or_(*bits), v.type), target, b.add(row_to, b.mul(i, wide)))


@row_loop
def keep_entries(v, source, start, index, rows, count, apart, target, to):
    """target[row, i, lane] = source[row, i - entry[lane], lane] for `count` vectors of rows that lie `apart` apart.

    The second half of `index` holds the entries, which are less than ROW_LANES. What lies beside a row of the source is
    read as well.
    """
    b, wide = v.builder, int64(v.width)
    entry = v.load_index(index, wide)
    bits = [
        b.icmp_signed("!=", b.and_(entry, ir.Constant(entry.type, [2**i] * v.width)), entry.type(None))
        for i in range(3)
    ]
    with count_up(b, int64(0), rows) as (row, _):
        row_at = b.mul(b.mul(row, apart), wide)
        with count_up(b, int64(0), count) as (i, _):
            at = b.add(row_at, b.mul(i, wide))
            shifted = [v.load(source, b.add(start, b.sub(at, int64(n * v.width)))) for n in range(v.width)]
            for bit in (2, 1, 0):
                shifted = [b.select(bits[bit], shifted[n + 2**bit], shifted[n]) for n in range(2**bit)]
            v.store(shifted[0], target, b.add(to, at))


@row_loop
def add_windows(v, source, start, rows, columns, apart, target, to):
    """Adds the first `columns` vectors of rows that lie `apart` vectors apart."""
    b = v.builder
    with count_up(b, int64(0), rows) as (row, _):
        begin = b.mul(b.mul(row, apart), int64(v.width))
        with count_up(b, int64(0), columns) as (column, _):
            at = b.add(begin, b.mul(column, int64(v.width)))
            there = b.add(to, at)
            v.store(b.fadd(v.load(target, there), v.load(source, b.add(start, at))), target, there)
