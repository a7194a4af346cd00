# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, embedsignature=True
"""Hot loops of DSB's updates: which weights go together, and which positions come in blocks.

Every function fills arrays that the Python side has allocated and checked; nothing here checks
shapes or values. The GIL is released inside every loop.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t
from libc.stdlib cimport free

from workspace cimport allocate


def lines_of(const int64_t[::1] places, const int64_t[::1] value_ptr, const int64_t[:, ::1] bands,
             int64_t block_cols, int64_t[::1] in_row, int64_t[::1] in_column,
             uint8_t[::1] enough):
    """enough[i] = whether places[i], ascending, share a line of their block with as many as half.

    bands[:, t] are of band t: its rows, its columns, the number of its first line of a block, its
    first column, and the height of its group's blocks. in_row and in_column are zeros.
    """
    # A band of 3 rows and 5 columns in blocks 2 wide; its first place is 0, its first line l and
    # its first column c. In bands of one group, which are parts of its blocks, c is the same.
    #
    #     places    0  3 |  6  9 | 12     their in_row    l    | l+3 | l+6
    #               1  4 |  7 10 | 13                     l+1  | l+4 | l+7
    #               2  5 |  8 11 | 14                     l+2  | l+5 | l+8
    #
    #     in_column c c+1 c+2 c+3  c+4
    cdef Py_ssize_t comparing, i, n = places.shape[0], band
    cdef int64_t column, rows, columns, first, row_at, column_at, line, in_block, width
    with nogil:
        for comparing in range(2):  # all are counted first
            i = 0
            for band in range(bands.shape[1]):
                rows, columns, line = bands[0, band], bands[1, band], bands[2, band]
                first, in_block, width = value_ptr[band], 0, min(block_cols, columns)
                for column in range(columns):
                    while i < n and places[i] < first + rows:
                        row_at, column_at = line + places[i] - first, bands[3, band] + column
                        if comparing:
                            enough[i] = (2 * in_row[row_at] >= width
                                         or 2 * in_column[column_at] >= bands[4, band])
                        else:
                            in_row[row_at] += 1
                            in_column[column_at] += 1
                        i += 1
                    first += rows
                    in_block += 1
                    if in_block == block_cols:
                        line, in_block = line + rows, 0
                        width = min(block_cols, columns - column - 1)


cdef inline bint _before(const double[::1] x, const double[::1] y, const int64_t *next_,
                         int64_t i, int64_t j) noexcept nogil:
    """Whether row i's next cell comes before that of row j: the larger product, then the row."""
    cdef double a = x[i] * y[next_[i]], b = x[j] * y[next_[j]]
    return a > b or (a == b and i < j)


cdef void _sift_down(const double[::1] x, const double[::1] y, const int64_t *next_,
                     int64_t *heap, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t at = 0, child
    cdef int64_t moved = heap[0]
    while 2 * at + 1 < n:
        child = 2 * at + 1
        if child + 1 < n and _before(x, y, next_, heap[child + 1], heap[child]):
            child += 1
        if not _before(x, y, next_, heap[child], moved):
            break
        heap[at] = heap[child]
        at = child
    heap[at] = moved


cdef void _sift_up(const double[::1] x, const double[::1] y, const int64_t *next_,
                   int64_t *heap, Py_ssize_t at) noexcept nogil:
    cdef int64_t moved = heap[at]
    while at > 0 and _before(x, y, next_, moved, heap[(at - 1) // 2]):
        heap[at] = heap[(at - 1) // 2]
        at = (at - 1) // 2
    heap[at] = moved


def best_first(const double[::1] x, const double[::1] y, int64_t[:, ::1] out):
    """out[k] = the k-th cell (i, j) from the largest x[i] * y[j] down; x and y descend.

    Of equal products the smaller i, then j, comes first. The frontier holds the next cell of every
    row that was begun; a row is begun when the first cell of the row before it is taken.
    """
    cdef Py_ssize_t n = out.shape[0], k, size = 1
    cdef int64_t i
    cdef int64_t *heap
    cdef int64_t *next_
    if n == 0:
        return
    heap = <int64_t *> allocate(2 * x.shape[0] * sizeof(int64_t))
    next_ = heap + x.shape[0]
    with nogil:
        heap[0] = next_[0] = 0
        for k in range(n):
            i = heap[0]
            out[k, 0], out[k, 1] = i, next_[i]
            next_[i] += 1
            if next_[i] == y.shape[0]:
                size -= 1
                heap[0] = heap[size]
            _sift_down(x, y, next_, heap, size)
            if out[k, 1] == 0 and i + 1 < x.shape[0]:
                next_[i + 1] = 0
                heap[size] = i + 1
                size += 1
                _sift_up(x, y, next_, heap, size - 1)
    free(heap)


def free_positions(const int64_t[:, ::1] blocks, const int64_t[:, ::1] rows,
                   const int64_t[:, ::1] columns, const uint8_t[:, ::1] taken,
                   Py_ssize_t count, int64_t[::1] found, Py_ssize_t held):
    """Append the free positions of blocks to found[:held] until there are `count`.

    Returns how many there are now, and where those of the last block begin.
    """
    cdef Py_ssize_t k, a, b, last = held
    cdef int64_t row, column
    with nogil:
        for k in range(blocks.shape[0]):
            if held >= count:
                break
            last = held
            for a in range(rows.shape[1]):
                row = rows[blocks[k, 0], a]
                if row < 0:
                    continue
                for b in range(columns.shape[1]):
                    column = columns[blocks[k, 1], b]
                    if column >= 0 and not taken[row, column]:
                        found[held] = row * taken.shape[1] + column
                        held += 1
    return held, last
