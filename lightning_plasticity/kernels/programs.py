"""What runs on a GPU: programs that Triton compiles, many of each at a time.

Triton has no types for mypy, and takes an annotation of an argument for a constant. Offsets are integers of 64 bits
where tensors may have more entries than 32 bits count.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows_before"])
def sum_columns(
    x,
    total,
    size,
    apart,
    ended,
    channels,
    rows,
    near,
    to_far,
    to_near,
    to_channel,
    rows_before,
    SIZED: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    split, splits = tl.program_id(1), tl.num_programs(1)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    sums, sizes = tl.zeros((ROWS, CHANNELS), tl.float32), tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(split * ROWS, rows, splits * ROWS):
        row = start + tl.arange(0, ROWS)
        at = (row // near).to(tl.int64) * to_far + (row % near).to(tl.int64) * to_near
        at = at[:, None] + channel[None, :].to(tl.int64) * to_channel
        is_inside = (row < rows)[:, None] & is_channel[None, :]
        entries = tl.load(x + at, mask=is_inside, other=0.0).to(tl.float32)
        sums += entries
        sizes += tl.abs(entries)
    tl.store(apart + split * channels + channel, tl.sum(sums, 0), mask=is_channel)
    apart_sizes = apart + splits * channels
    if SIZED:
        tl.store(apart_sizes + split * channels + channel, tl.sum(sizes, 0), mask=is_channel)
    tl.debug_barrier()  # all threads have written before the program counts as ended
    if tl.atomic_add(ended + tl.program_id(0), 1, sem="acq_rel") == splits - 1:
        tl.store(ended + tl.program_id(0), 0)  # for the next launch
        before = tl.load(total + channel, mask=is_channel & (rows_before > 0), other=0.0)
        new = _over_splits(apart, splits, channels, channel, ROWS, CHANNELS)
        tl.store(total + channel, before + new, mask=is_channel)
        if SIZED:
            size_before = tl.load(size + channel, mask=is_channel & (rows_before > 1), other=0.0)
            size_before = tl.where(rows_before == 1, tl.abs(before), size_before)
            new = _over_splits(apart_sizes, splits, channels, channel, ROWS, CHANNELS)
            tl.store(size + channel, size_before + new, mask=is_channel)


@triton.jit
def _over_splits(apart, splits, channels, channel, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    sums = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(0, splits, ROWS):
        split = start + tl.arange(0, ROWS)
        is_inside = (split < splits)[:, None] & (channel < channels)[None, :]
        sums += tl.load(apart + split[:, None] * channels + channel[None, :], mask=is_inside, other=0.0)
    return tl.sum(sums, 0)


@triton.jit
def _moved(average, value, weight):
    value = tl.where(value * 0 == 0, value, average)  # what is not finite says nothing
    return average * (1 - weight) + value * weight


@triton.jit
def average_in(places, weight, BLOCK: tl.constexpr):
    row = places + 3 * tl.program_id(0)
    averages, values = tl.load(row).to(tl.pointer_type(tl.float32)), tl.load(row + 2).to(tl.pointer_type(tl.float32))
    size = tl.load(row + 1)
    for start in range(tl.program_id(1) * BLOCK, size, tl.num_programs(1) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        is_inside = at < size
        average, value = tl.load(averages + at, mask=is_inside), tl.load(values + at, mask=is_inside)
        tl.store(averages + at, _moved(average, value, weight), mask=is_inside)


@triton.jit
def average_utilities(places, gradients, weight, BLOCK: tl.constexpr):
    row, of_gradient = places + 3 * tl.program_id(0), gradients + 3 * tl.program_id(0)
    averages, weights = tl.load(row).to(tl.pointer_type(tl.float32)), tl.load(row + 2).to(tl.pointer_type(tl.float32))
    slopes, size = tl.load(of_gradient).to(tl.pointer_type(tl.float32)), tl.load(row + 1)
    for start in range(tl.program_id(1) * BLOCK, size, tl.num_programs(1) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        is_inside = at < size
        average = tl.load(averages + at, mask=is_inside)
        value = tl.abs(tl.load(weights + at, mask=is_inside) * tl.load(slopes + at, mask=is_inside))
        tl.store(averages + at, _moved(average, value, weight), mask=is_inside)


@triton.jit
def scale(places, factors, BLOCK: tl.constexpr):
    row = places + 3 * tl.program_id(0)
    entries, size = tl.load(row).to(tl.pointer_type(tl.float32)), tl.load(row + 1)
    factor = tl.load(factors + tl.program_id(0))
    for start in range(tl.program_id(1) * BLOCK, size, tl.num_programs(1) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        is_inside = at < size
        tl.store(entries + at, tl.load(entries + at, mask=is_inside) * factor, mask=is_inside)


@triton.jit
def scale_from_diagonal(places, factors, target, BLOCK: tl.constexpr):
    row = places + 3 * tl.program_id(0)
    entries, size, side = tl.load(row).to(tl.pointer_type(tl.float32)), tl.load(row + 1), tl.load(row + 2)
    factor = tl.load(factors + tl.program_id(0))
    for start in range(tl.program_id(1) * BLOCK, size, tl.num_programs(1) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        is_inside = at < size
        entry = tl.load(entries + at, mask=is_inside)
        tl.store(entries + at, tl.where(at % (side + 1) == 0, entry - target, entry) * factor, mask=is_inside)


@triton.jit
def pull(places, factor, BLOCK: tl.constexpr):
    row = places + 3 * tl.program_id(0)
    entries, targets = tl.load(row).to(tl.pointer_type(tl.float32)), tl.load(row + 2).to(tl.pointer_type(tl.float32))
    size = tl.load(row + 1)
    for start in range(tl.program_id(1) * BLOCK, size, tl.num_programs(1) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        is_inside = at < size
        entry, target = tl.load(entries + at, mask=is_inside), tl.load(targets + at, mask=is_inside)
        tl.store(entries + at, entry + (entry - target) * factor, mask=is_inside)


@triton.jit
def contributions(places, readers, first, sizes, out, SIZED: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr):
    begin, end = tl.load(first + tl.program_id(0)), tl.load(first + tl.program_id(0) + 1)
    row = readers + 8 * begin  # all readers of a set have the same units
    units = tl.load(row + 3) * tl.load(row + 5) // tl.load(row + 2)
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    is_unit = unit < units
    total = tl.zeros((UNITS,), tl.float32)
    for reader in range(begin, end):
        row = readers + 8 * reader
        first_column, of_each = tl.load(row + 1), tl.load(row + 2)
        outputs, inputs, kernel, is_transposed = (
            tl.load(row + 4),
            tl.load(row + 5),
            tl.load(row + 6),
            tl.load(row + 7),
        )
        weights = tl.load(places + 3 * reader).to(tl.pointer_type(tl.float32))
        count = outputs * kernel  # of the weights of a column
        to_next = tl.where(is_transposed != 0, kernel, inputs * kernel)  # output
        for k in range(0, of_each):
            column = unit * of_each + k
            by_output = (column // inputs) * count * inputs + (column % inputs) * kernel
            start = tl.where(is_transposed != 0, column * count, by_output)
            sums = tl.zeros((UNITS,), tl.float32)
            for n in range(0, count, ROWS):
                at = n + tl.arange(0, ROWS)
                offset = (at // kernel) * to_next + at % kernel
                is_inside = (at < count)[:, None] & is_unit[None, :]
                entries = tl.load(weights + start[None, :] + offset[:, None], mask=is_inside, other=0.0)
                sums += tl.sum(tl.abs(entries), 0)
            mean = sums / (count * of_each)
            if SIZED:
                mean *= tl.load(sizes + first_column + column, mask=is_unit, other=0.0)
            total += mean
    tl.store(out + tl.load(readers + 8 * begin) + unit, total, mask=is_unit)


@triton.jit
def times_matrices(
    places, rows_from, columns_from, given, out, BY_ROW: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr
):
    # Each matrix times its part of a vector, or where not BY_ROW the matrix transposed.
    matrix = tl.load(places + 3 * tl.program_id(0)).to(tl.pointer_type(tl.float32))
    first_row, first_column = tl.load(rows_from + tl.program_id(0)), tl.load(columns_from + tl.program_id(0))
    rows = tl.load(rows_from + tl.program_id(0) + 1) - first_row
    columns = tl.load(columns_from + tl.program_id(0) + 1) - first_column
    if BY_ROW:
        outputs, inputs, to_output, to_input = rows, columns, columns, 1
        out, given = out + first_row, given + first_column
    else:
        outputs, inputs, to_output, to_input = columns, rows, 1, columns
        out, given = out + first_column, given + first_row
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_output = output < outputs
    if tl.program_id(1) * OUTPUTS < outputs:
        sums = tl.zeros((OUTPUTS, INPUTS), tl.float32)
        for start in range(0, inputs, INPUTS):
            read = start + tl.arange(0, INPUTS)
            is_inside = is_output[:, None] & (read < inputs)[None, :]
            at = output[:, None].to(tl.int64) * to_output + read[None, :].to(tl.int64) * to_input
            vector = tl.load(given + read, mask=read < inputs, other=0.0)
            sums += tl.load(matrix + at, mask=is_inside, other=0.0) * vector[None, :]
        tl.store(out + output, tl.sum(sums, 1), mask=is_output)


@triton.jit
def directions(vectors, starts, instead, lengths, BLOCK: tl.constexpr):
    # Divides each vector by its length; what is beside it takes the place of one that has none.
    begin, end = tl.load(starts + tl.program_id(0)), tl.load(starts + tl.program_id(0) + 1)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        entries = tl.load(vectors + at, mask=at < end, other=0.0)
        squares += entries * entries
    length = tl.sqrt(tl.sum(squares, 0))
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        entries = tl.load(vectors + at, mask=at < end)
        found = tl.where(length > 0, entries / length, tl.load(instead + at, mask=at < end))
        tl.store(vectors + at, found, mask=at < end)
    tl.store(lengths + tl.program_id(0), length)


@triton.jit
def outer_products(rows_from, columns_from, entries_from, lefts, rights, factors, out, BLOCK: tl.constexpr):
    begin, end = tl.load(rows_from + tl.program_id(0)), tl.load(rows_from + tl.program_id(0) + 1)
    first_column = tl.load(columns_from + tl.program_id(0))
    columns = tl.load(columns_from + tl.program_id(0) + 1) - first_column
    out += tl.load(entries_from + tl.program_id(0))
    factor = tl.load(factors + tl.program_id(0))
    for row in range(begin + tl.program_id(1), end, tl.num_programs(1)):
        left = factor * tl.load(lefts + row)
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            right = tl.load(rights + first_column + column, mask=column < columns)
            tl.store(out + (row - begin) * columns + column, left * right, mask=column < columns)
