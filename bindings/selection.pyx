# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, embedsignature=True
"""Hot loops that select weights: per row, n:m, transposable n:m, blocks, HRBP.

Every function fills arrays that the Python side has allocated and checked; nothing here checks
shapes or values. Arrays are typed memoryviews, so the extension needs no numpy headers. The GIL is
released inside every loop. Masks are uint8 (0 or 1).
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset

from workspace cimport allocate

ctypedef fused real:
    float
    double


# ---- selection -------------------------------------------------------------------------------


cdef void _sort_descending(real *a, Py_ssize_t n) noexcept nogil:
    """Insertion sort for short ranges."""
    cdef Py_ssize_t i, j
    cdef real v
    for i in range(1, n):
        v = a[i]
        j = i
        while j > 0 and a[j - 1] < v:
            a[j] = a[j - 1]
            j -= 1
        a[j] = v


cdef real _pivot(const real *a, Py_ssize_t n, Py_ssize_t target, uint64_t *state) noexcept nogil:
    """A sampled value whose rank in a[:n] is about target.

    Near the target most elements fall on one side, which is both less work and, because branches
    become predictable, faster than a median.
    """
    cdef real sample[31]
    cdef Py_ssize_t i, size = 31 if n >= 256 else 3
    for i in range(size):
        state[0] = state[0] * 6364136223846793005ULL + 1442695040888963407ULL
        sample[i] = a[(state[0] >> 33) % <uint64_t> n]
    _sort_descending(sample, size)
    return sample[target * size // n]


cdef real _kth_largest(real *a, Py_ssize_t n, Py_ssize_t k) noexcept nogil:
    """The k-th largest (1-based) of a[:n]; reorders a. Expected O(n) on every input.

    Pivots come from a fixed pseudo-random sequence: no input is systematically slow, and the
    result does not depend on it.
    """
    cdef Py_ssize_t lo = 0, hi = n - 1, target = k - 1, i, above, below
    cdef uint64_t state = 0x9E3779B97F4A7C15ULL
    cdef real pivot, v
    while hi - lo >= 16:
        pivot = _pivot(a + lo, hi - lo + 1, target - lo, &state)
        above, below, i = lo, hi, lo
        while i <= below:  # [lo, above) > pivot, [above, i) == pivot, (below, hi] < pivot
            v = a[i]
            if v > pivot:
                a[i] = a[above]
                a[above] = v
                above += 1
                i += 1
            elif v < pivot:
                a[i] = a[below]
                a[below] = v
                below -= 1
            else:
                i += 1
        if target < above:
            hi = above - 1
        elif target > below:
            lo = below + 1
        else:
            return pivot
    _sort_descending(a + lo, hi - lo + 1)
    return a[target]


cdef Py_ssize_t _n_above(const real *a, Py_ssize_t n, Py_ssize_t step, real bound) noexcept nogil:
    cdef Py_ssize_t i, count = 0
    for i in range(n):
        count += a[i * step] > bound
    return count


def per_row_topk(const real[:, ::1] scores, Py_ssize_t k, int32_t[:, ::1] out):
    """Columns of the k largest scores of each row, ascending; ties go to the lowest column."""
    cdef Py_ssize_t rows = scores.shape[0], cols = scores.shape[1], r, c, at, ties
    cdef real *work
    cdef real bound
    if k == 0 or rows == 0:
        return
    work = <real *> allocate(cols * sizeof(real))
    with nogil:
        for r in range(rows):
            for c in range(cols):
                work[c] = scores[r, c]
            bound = _kth_largest(work, cols, k)
            ties = k - _n_above(&scores[r, 0], cols, 1, bound)
            at = 0
            for c in range(cols):
                if scores[r, c] > bound:
                    out[r, at] = <int32_t> c
                    at += 1
                elif scores[r, c] == bound and ties > 0:
                    out[r, at] = <int32_t> c
                    at += 1
                    ties -= 1
    free(work)


cdef void _mark_group(const real *group, Py_ssize_t length, Py_ssize_t step, Py_ssize_t n,
                      real *work, uint8_t *keep) noexcept nogil:
    """Set keep at the n largest of a strided group; ties go to the lowest index."""
    cdef Py_ssize_t i, ties
    cdef real bound
    if n >= length:
        for i in range(length):
            keep[i * step] = 1
        return
    for i in range(length):
        work[i] = group[i * step]
    bound = _kth_largest(work, length, n)
    ties = n - _n_above(group, length, step, bound)
    for i in range(length):
        if group[i * step] > bound:
            keep[i * step] = 1
        elif group[i * step] == bound and ties > 0:
            keep[i * step] = 1
            ties -= 1


cdef void _mark_row(const real *row, Py_ssize_t channels, Py_ssize_t cells, Py_ssize_t n,
                    Py_ssize_t m, real *work, uint8_t *keep) noexcept nogil:
    """Best n of every group of m channels of one row, cell by cell; the last may be short."""
    cdef Py_ssize_t g, begin, cell, length
    for g in range((channels + m - 1) // m):
        begin = g * m
        length = min(m, channels - begin)
        for cell in range(cells):
            _mark_group(row + begin * cells + cell, length, cells, n, work,
                        keep + begin * cells + cell)


def nm_columns(const real[:, ::1] scores, Py_ssize_t n, Py_ssize_t m, Py_ssize_t cells,
               int32_t[:, ::1] out):
    """Matrix columns of the best n of every group of m channels per cell, ascending per row."""
    cdef Py_ssize_t rows = scores.shape[0], cols = scores.shape[1], r, c, at
    cdef real *work
    cdef uint8_t *keep
    if out.shape[0] == 0 or out.shape[1] == 0:
        return
    work = <real *> allocate(m * sizeof(real))
    try:
        keep = <uint8_t *> allocate(cols)
    except MemoryError:
        free(work)
        raise
    with nogil:
        for r in range(rows):
            memset(keep, 0, cols)
            _mark_row(&scores[r, 0], cols // cells, cells, n, m, work, keep)
            at = 0
            for c in range(cols):
                if keep[c]:
                    out[r, at] = <int32_t> c
                    at += 1
    free(keep)
    free(work)


# ---- transposable n:m ------------------------------------------------------------------------


def transposable_2_4(const real[:, ::1] scores, Py_ssize_t cells,
                     const int32_t[:, ::1] patterns, uint8_t[:, ::1] out):
    """Best of the 90 patterns for every whole 4 x 4 tile; ties go to the first pattern.

    patterns[p, i] is the index of row i's pair of columns among (01, 02, 03, 12, 13, 23).
    """
    cdef Py_ssize_t tile_rows = scores.shape[0] // 4, channels = scores.shape[1] // cells // 4
    cdef Py_ssize_t r, b, cell
    with nogil:
        for r in range(tile_rows):
            for b in range(channels):
                for cell in range(cells):
                    _tile_2_4(&scores[4 * r, 4 * b * cells + cell], scores.shape[1], cells,
                              &patterns[0, 0], patterns.shape[0],
                              &out[4 * r, 4 * b * cells + cell])


cdef void _tile_2_4(const real *w, Py_ssize_t row_step, Py_ssize_t step,
                    const int32_t *patterns, Py_ssize_t n_patterns, uint8_t *keep) noexcept nogil:
    cdef double pairs[4][6]
    cdef double top[36]
    cdef double bottom[36]
    cdef double total, best = 0.0
    cdef Py_ssize_t i, j, a, b, p, chosen = -1
    cdef const int32_t *q
    for i in range(4):
        p = 0
        for a in range(3):
            for b in range(a + 1, 4):
                pairs[i][p] = <double> w[i * row_step + a * step] + w[i * row_step + b * step]
                p += 1
    for i in range(6):
        for j in range(6):
            top[6 * i + j] = pairs[0][i] + pairs[1][j]
            bottom[6 * i + j] = pairs[2][i] + pairs[3][j]
    for p in range(n_patterns):
        q = patterns + 4 * p
        total = top[6 * q[0] + q[1]] + bottom[6 * q[2] + q[3]]
        if chosen < 0 or total > best:
            best = total
            chosen = p
    for i in range(4):
        p = 0
        for a in range(3):
            for b in range(a + 1, 4):
                if patterns[4 * chosen + i] == p:
                    keep[i * row_step + a * step] = 1
                    keep[i * row_step + b * step] = 1
                p += 1


# One m x m tile as a transportation problem: rows supply n units, columns take n, an edge carries
# at most one. Potentials u (rows) and v (columns) keep `w - u - v >= 0` on chosen edges and `<= 0`
# on the others, which proves the choice optimal for its own column loads. Starting from the best n
# of each row, shortest augmenting paths move load from over-full columns to short ones.
cdef struct Tile:
    Py_ssize_t m
    Py_ssize_t n
    double *w            # (m, m)
    double *work         # (m,)
    double *u            # (m,) rows, then v: (m,) columns
    double *v
    double *dist         # (2 m,) columns, then rows
    uint8_t *x           # (m, m) chosen edges
    uint8_t *done        # (2 m,)
    int32_t *load        # (m,) chosen edges per column
    int32_t *parent      # (2 m,)


cdef void _tile_start(Tile *t) noexcept nogil:
    """The n best of every row; ties start at column i*n, so that equal scores balance themselves."""
    cdef Py_ssize_t i, j, s, ties, m = t.m
    cdef double *row
    memset(t.x, 0, m * m)
    memset(t.load, 0, m * sizeof(int32_t))
    for i in range(m):
        row = t.w + i * m
        for j in range(m):
            t.work[j] = row[j]
        t.u[i] = _kth_largest(t.work, m, t.n)
        t.v[i] = 0.0
        ties = t.n - _n_above(row, m, 1, t.u[i])
        for s in range(m):
            j = (i * t.n + s) % m
            if row[j] > t.u[i] or (row[j] == t.u[i] and ties > 0):
                ties -= row[j] == t.u[i]
                t.x[i * m + j] = 1
                t.load[j] += 1


cdef inline void _relax(Tile *t, Py_ssize_t node, Py_ssize_t source, double length) noexcept nogil:
    if length < t.dist[node] and not t.done[node]:
        t.dist[node] = length
        t.parent[node] = <int32_t> source


cdef Py_ssize_t _tile_shortest_path(Tile *t, Py_ssize_t start) noexcept nogil:
    """Dijkstra from an over-full column to the nearest short one, which is returned.

    Nodes 0..m-1 are columns, m..2m-1 rows. Lengths are clamped at 0 against rounding.
    """
    cdef Py_ssize_t m = t.m, node, other, k
    cdef double reach
    for k in range(2 * m):
        t.dist[k] = 1e308
        t.done[k] = 0
    t.dist[start] = 0.0
    while True:
        node = -1
        for k in range(2 * m):
            if not t.done[k] and (node < 0 or t.dist[k] < t.dist[node]):
                node = k
        t.done[node] = 1
        reach = t.dist[node]
        if node < m:
            if t.load[node] < t.n:
                return node
            for k in range(m):
                if t.x[k * m + node]:
                    _relax(t, m + k, node, reach + max(0.0, t.w[k * m + node] - t.u[k] - t.v[node]))
        else:
            other = node - m
            for k in range(m):
                if not t.x[other * m + k]:
                    _relax(t, k, node,
                           reach + max(0.0, t.u[other] + t.v[k] - t.w[other * m + k]))


cdef void _tile_augment(Tile *t, Py_ssize_t start, Py_ssize_t end) noexcept nogil:
    """Flip the path's edges and move the potentials of the nodes that were settled."""
    cdef Py_ssize_t m = t.m, k, row, column = end
    cdef double length = t.dist[end]
    for k in range(m):
        if t.done[k]:
            t.v[k] -= t.dist[k] - length
        if t.done[m + k]:
            t.u[k] += t.dist[m + k] - length
    t.load[end] += 1
    t.load[start] -= 1
    while column != start:
        row = t.parent[column] - m
        t.x[row * m + column] = 1
        column = t.parent[m + row]
        t.x[row * m + column] = 0


cdef void _tile_solve(Tile *t) noexcept nogil:
    cdef Py_ssize_t start, end
    _tile_start(t)
    for start in range(t.m):
        while t.load[start] > t.n:
            end = _tile_shortest_path(t, start)
            _tile_augment(t, start, end)


cdef Tile _tile_workspace(Py_ssize_t n, Py_ssize_t m, void *block) noexcept:
    """Cut one allocation of (m*m + 5m) doubles, 3m int32 and m*m + 2m bytes into the fields."""
    cdef Tile t
    t.n = n
    t.m = m
    t.w = <double *> block
    t.work = t.w + m * m
    t.u = t.work + m
    t.v = t.u + m
    t.dist = t.v + m
    t.load = <int32_t *> (t.dist + 2 * m)
    t.parent = t.load + m
    t.x = <uint8_t *> (t.parent + 2 * m)
    t.done = t.x + m * m
    return t


cdef void _tile_in_place(Tile *t, const real *w, Py_ssize_t row_step, Py_ssize_t step,
                         uint8_t *keep) noexcept nogil:
    cdef Py_ssize_t i, j, m = t.m
    for i in range(m):
        for j in range(m):
            t.w[i * m + j] = w[i * row_step + j * step]
    _tile_solve(t)
    for i in range(m):
        for j in range(m):
            keep[i * row_step + j * step] = t.x[i * m + j]


def transposable_tiles(const real[:, ::1] scores, Py_ssize_t n, Py_ssize_t m, Py_ssize_t cells,
                       uint8_t[:, ::1] out):
    """Exact maximum of the score with n per row and n per column, for every whole m x m tile."""
    cdef Py_ssize_t tile_rows = scores.shape[0] // m, channels = scores.shape[1] // cells // m
    cdef Py_ssize_t r, b, cell
    cdef void *block = allocate((m * m + 5 * m) * sizeof(double) + 3 * m * sizeof(int32_t)
                                 + m * m + 2 * m)
    cdef Tile t = _tile_workspace(n, m, block)
    with nogil:
        for r in range(tile_rows):
            for b in range(channels):
                for cell in range(cells):
                    _tile_in_place(&t, &scores[r * m, b * m * cells + cell], scores.shape[1],
                                   cells, &out[r * m, b * m * cells + cell])
    free(block)


# ---- shuffled blocks -------------------------------------------------------------------------


cdef void _merge_sort(const double *key, int32_t *order, int32_t *work, Py_ssize_t n) noexcept nogil:
    """Stable: order[:n] by key descending."""
    cdef Py_ssize_t half = n // 2, i = 0, j = half, k
    cdef int32_t v
    if n <= 12:
        for k in range(1, n):
            v = order[k]
            j = k
            while j > 0 and key[order[j - 1]] < key[v]:
                order[j] = order[j - 1]
                j -= 1
            order[j] = v
        return
    _merge_sort(key, order, work, half)
    _merge_sort(key, order + half, work, n - half)
    for k in range(half):
        work[k] = order[k]
    for k in range(n):
        if i < half and (j >= n or key[work[i]] >= key[order[j]]):
            order[k] = work[i]
            i += 1
        elif i < half:
            order[k] = order[j]
            j += 1
        else:
            return


cdef void _column_order(const double *norm, Py_ssize_t cols, int32_t *order,
                        int32_t *work) noexcept nogil:
    """Columns by norm descending, ties ascending; zeros, often the most, need no sorting."""
    cdef Py_ssize_t c, n = 0, at, below
    for c in range(cols):
        if norm[c] > 0.0:
            order[n] = <int32_t> c
            n += 1
    at = n
    for c in range(cols):
        if norm[c] == 0.0:
            order[at] = <int32_t> c
            at += 1
    below = at
    for c in range(cols):
        if norm[c] < 0.0:
            order[at] = <int32_t> c
            at += 1
    _merge_sort(norm, order, work, n)
    _merge_sort(norm, order + below, work, at - below)


def block_norms(const real[:, ::1] scores, const int32_t[::1] row_perm, Py_ssize_t block_rows,
                Py_ssize_t block_cols, int32_t[:, ::1] order, double[:, ::1] norms):
    """Per row group: columns by their sum descending (order) and the sum of every run of columns."""
    cdef Py_ssize_t rows = scores.shape[0], cols = scores.shape[1], g, i, c, end
    cdef double *column
    cdef int32_t *work
    cdef const real *row
    if rows == 0 or cols == 0:
        return
    column = <double *> allocate(cols * (sizeof(double) + sizeof(int32_t)))
    work = <int32_t *> (column + cols)
    with nogil:
        for g in range(order.shape[0]):
            memset(column, 0, cols * sizeof(double))
            end = min(rows, (g + 1) * block_rows)
            for i in range(g * block_rows, end):
                row = &scores[row_perm[i], 0]
                for c in range(cols):
                    column[c] += row[c]
            _column_order(column, cols, &order[g, 0], work)
            for c in range(norms.shape[1]):
                norms[g, c] = 0.0
            for c in range(cols):
                norms[g, c // block_cols] += column[order[g, c]]
    free(column)


# ---- HRBP ------------------------------------------------------------------------------------


def kernel_counts(const uint8_t[:, ::1] mask, Py_ssize_t cells, int32_t[:, ::1] out):
    """out[o, i] = nonzeros of the kernel from channel i to channel o."""
    cdef Py_ssize_t o, i, k
    cdef int32_t count
    with nogil:
        for o in range(out.shape[0]):
            for i in range(out.shape[1]):
                count = 0
                for k in range(i * cells, (i + 1) * cells):
                    count += mask[o, k]
                out[o, i] = count


def kernel_sums(const real[:, ::1] scores, Py_ssize_t cells, double[:, ::1] out):
    """out[o, i] = sum of the kernel from channel i to channel o."""
    cdef Py_ssize_t o, i, k
    cdef double total
    with nogil:
        for o in range(out.shape[0]):
            for i in range(out.shape[1]):
                total = 0.0
                for k in range(i * cells, (i + 1) * cells):
                    total += scores[o, k]
                out[o, i] = total


def cell_counts(const uint8_t[:, ::1] mask, const real[:, ::1] scores,
                const int32_t[::1] rows, const int32_t[::1] channels, int64_t[::1] counts,
                double[::1] sums):
    """Nonzeros and sum of every kernel cell over rows x channels (added to what is there)."""
    cdef Py_ssize_t cells = counts.shape[0], r, i, k, column
    with nogil:
        for r in range(rows.shape[0]):
            for i in range(channels.shape[0]):
                column = channels[i] * cells
                for k in range(cells):
                    counts[k] += mask[rows[r], column + k]
                    sums[k] += scores[rows[r], column + k]
