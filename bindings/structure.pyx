# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, embedsignature=True
"""Hot loops of the structure search (see spfmt/structure for the algorithms around them).

Every function fills arrays that the Python side has allocated and checked; nothing here checks
shapes or values. Arrays are typed memoryviews, so the extension needs no numpy headers. The GIL is
released inside every loop. Masks are uint8 (0 or 1) or rows of 64-bit words, least significant bit
first.
"""

from libc.math cimport sqrt
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

ctypedef fused real:
    float
    double

cdef extern from *:
    """
    #include <stdint.h>

    /* One row against many: the loop under every row similarity. The baseline x86-64 has no
       popcount instruction, so GCC and clang compile the body for three levels and the machine
       is asked once per call. */
    #define SPFMT_INTERSECTIONS(NAME, TARGET)                                                  \
    TARGET static void NAME(const uint64_t *one, const uint64_t *many, const int32_t *rows,    \
                            int64_t n_rows, int64_t n_words, int32_t *out)                     \
    {                                                                                          \
        for (int64_t i = 0; i < n_rows; ++i) {                                                 \
            const uint64_t *other = many + (int64_t)rows[i] * n_words;                         \
            int64_t common = 0;                                                                \
            for (int64_t w = 0; w < n_words; ++w)                                              \
                common += __builtin_popcountll(one[w] & other[w]);                             \
            out[i] = (int32_t)common;                                                          \
        }                                                                                      \
    }
    SPFMT_INTERSECTIONS(spfmt_intersections_any, )
    #if defined(__x86_64__)
    SPFMT_INTERSECTIONS(spfmt_intersections_popcnt, __attribute__((target("popcnt"))))
    SPFMT_INTERSECTIONS(spfmt_intersections_avx512,
                        __attribute__((target("popcnt,avx512vl,avx512vpopcntdq"))))
    #endif

    static void spfmt_intersections(const uint64_t *one, const uint64_t *many,
                                    const int32_t *rows, int64_t n_rows, int64_t n_words,
                                    int32_t *out)
    {
    #if defined(__x86_64__)
        if (n_words >= 8 && __builtin_cpu_supports("avx512vl")
            && __builtin_cpu_supports("avx512vpopcntdq")) {
            spfmt_intersections_avx512(one, many, rows, n_rows, n_words, out);
            return;
        }
        if (__builtin_cpu_supports("popcnt")) {
            spfmt_intersections_popcnt(one, many, rows, n_rows, n_words, out);
            return;
        }
    #endif
        spfmt_intersections_any(one, many, rows, n_rows, n_words, out);
    }
    """
    void spfmt_intersections(const uint64_t *one, const uint64_t *many, const int32_t *rows,
                             int64_t n_rows, int64_t n_words, int32_t *out) noexcept nogil
    int popcount "__builtin_popcountll"(uint64_t word) noexcept nogil
    int count_trailing_zeros "__builtin_ctzll"(uint64_t word) noexcept nogil


cdef void *_allocate(size_t n_bytes) except NULL:
    cdef void *block = malloc(n_bytes if n_bytes > 0 else 1)
    if block == NULL:
        raise MemoryError(f"structure search: {n_bytes} bytes of workspace are not available")
    return block


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
    work = <real *> _allocate(cols * sizeof(real))
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
    work = <real *> _allocate(m * sizeof(real))
    try:
        keep = <uint8_t *> _allocate(cols)
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
    cdef void *block = _allocate((m * m + 5 * m) * sizeof(double) + 3 * m * sizeof(int32_t)
                                 + m * m + 2 * m)
    cdef Tile t = _tile_workspace(n, m, block)
    with nogil:
        for r in range(tile_rows):
            for b in range(channels):
                for cell in range(cells):
                    _tile_in_place(&t, &scores[r * m, b * m * cells + cell], scores.shape[1],
                                   cells, &out[r * m, b * m * cells + cell])
    free(block)


# ---- row similarity --------------------------------------------------------------------------


def overlap_maxima(const uint64_t[:, ::1] bits, int32_t[::1] out):
    """out[i] = the most columns that row i shares with any other row."""
    cdef Py_ssize_t rows = bits.shape[0], words = bits.shape[1], i, j
    cdef int32_t *every
    cdef int32_t *common
    if rows == 0 or words == 0:
        return
    every = <int32_t *> _allocate(2 * rows * sizeof(int32_t))
    common = every + rows
    with nogil:
        for i in range(rows):
            every[i] = <int32_t> i
            out[i] = 0
        for i in range(rows - 1):
            spfmt_intersections(&bits[i, 0], &bits[0, 0], every + i + 1, rows - i - 1, words,
                                common)
            for j in range(rows - i - 1):
                out[i] = max(out[i], common[j])
                out[i + 1 + j] = max(out[i + 1 + j], common[j])
    free(every)


cdef inline double _similarity(int32_t common, int32_t a, int32_t b, bint cosine) noexcept nogil:
    """Jaccard or cosine similarity of two sets of sizes a, b > 0."""
    if cosine:
        return common / sqrt(<double> a * <double> b)
    return <double> common / (<double> a + <double> b - common)


def row_counts(const uint64_t[:, ::1] bits, int32_t[::1] out):
    """out[i] = nonzeros of row i."""
    cdef Py_ssize_t i, w
    cdef int32_t count
    with nogil:
        for i in range(bits.shape[0]):
            count = 0
            for w in range(bits.shape[1]):
                count += popcount(bits[i, w])
            out[i] = count


def row_distances(const uint64_t[:, ::1] bits, const int32_t[::1] counts,
                  const int32_t[::1] chosen, bint cosine, double[:, ::1] out):
    """Square matrix of 1 - similarity over the chosen (non-empty) rows."""
    cdef Py_ssize_t n = chosen.shape[0], words = bits.shape[1], i, j
    cdef int32_t *common
    cdef double d
    if n == 0 or words == 0:
        return
    common = <int32_t *> _allocate(n * sizeof(int32_t))
    with nogil:
        for i in range(n):
            out[i, i] = 0.0
            if i + 1 == n:
                break
            spfmt_intersections(&bits[chosen[i], 0], &bits[0, 0], &chosen[i + 1], n - i - 1,
                                words, common)
            for j in range(i + 1, n):
                d = 1.0 - _similarity(common[j - i - 1], counts[chosen[i]], counts[chosen[j]],
                                      cosine)
                out[i, j] = d
                out[j, i] = d
    free(common)


def pair_similarities(const uint64_t[:, ::1] bits, const int32_t[::1] counts,
                      const int32_t[::1] first, const int32_t[::1] second, bint cosine,
                      double[::1] out):
    """Similarity of the (non-empty) rows first[i] and second[i]."""
    cdef Py_ssize_t n = first.shape[0], words = bits.shape[1], i
    cdef int32_t common = 0
    with nogil:
        for i in range(n):
            spfmt_intersections(&bits[first[i], 0], &bits[0, 0], &second[i], 1, words, &common)
            out[i] = _similarity(common, counts[first[i]], counts[second[i]], cosine)


def minhash(const uint64_t[:, ::1] bits, const uint16_t[::1] hashes, const int32_t[::1] rows,
            uint16_t[:, ::1] out):
    """out[i, h] = the smallest hash of the columns of rows[i] whose hash is h modulo 8."""
    cdef Py_ssize_t words = bits.shape[1], i, w
    cdef uint16_t *smallest
    cdef uint16_t key
    cdef uint64_t word
    with nogil:
        for i in range(rows.shape[0]):
            smallest = &out[i, 0]
            memset(smallest, 0xFF, 8 * sizeof(uint16_t))
            for w in range(words):
                word = bits[rows[i], w]
                while word:
                    key = hashes[64 * w + count_trailing_zeros(word)]
                    word &= word - 1
                    smallest[key & 7] = min(smallest[key & 7], key)


cdef inline int32_t _root(int32_t *parent, int32_t i) noexcept nogil:
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


def bounded_components(const int32_t[::1] first, const int32_t[::1] second, Py_ssize_t limit,
                       int32_t[::1] label):
    """Join pairs in the given order unless a component would exceed `limit` rows.

    label[i] becomes the smallest row of i's component.
    """
    cdef Py_ssize_t rows = label.shape[0], i
    cdef int32_t a, b
    cdef int32_t *size
    if rows == 0:
        return
    size = <int32_t *> _allocate(rows * sizeof(int32_t))
    with nogil:
        for i in range(rows):
            label[i] = <int32_t> i
            size[i] = 1
        for i in range(first.shape[0]):
            a = _root(&label[0], first[i])
            b = _root(&label[0], second[i])
            if a != b and size[a] + size[b] <= limit:
                label[max(a, b)] = min(a, b)
                size[min(a, b)] = size[a] + size[b]
        for i in range(rows):
            label[i] = _root(&label[0], <int32_t> i)
    free(size)


# ---- the fast row clusterer ------------------------------------------------------------------


cdef struct Grower:
    Py_ssize_t words
    Py_ssize_t group_size
    bint cosine
    const uint64_t *bits
    const int32_t *counts
    int32_t *alive       # (n,) rows not yet in a group, best seeds first
    Py_ssize_t n_alive
    int32_t *common      # (n,) columns shared with the centre
    float *similarity    # (n,) to the centre
    int32_t *picked      # (group_size,) heap of positions in alive, weakest on top
    Py_ssize_t n_picked
    float runner_up      # the largest similarity that was not picked
    int32_t *votes       # (64 words,) picked rows that hold a column
    int32_t *histogram   # (group_size + 1,)
    uint64_t *centre     # (words,)


cdef inline bint _weaker(const float *similarity, int32_t a, int32_t b) noexcept nogil:
    """Whether position a ranks behind b; equal similarities go to the first position."""
    return similarity[a] < similarity[b] or (similarity[a] == similarity[b] and a > b)


cdef void _sift_down(const float *similarity, int32_t *heap, Py_ssize_t n,
                     int32_t item) noexcept nogil:
    """Put item at the top of a heap whose top is free."""
    cdef Py_ssize_t at = 0, child = 1
    while child < n:
        if child + 1 < n and _weaker(similarity, heap[child + 1], heap[child]):
            child += 1
        if not _weaker(similarity, heap[child], item):
            break
        heap[at] = heap[child]
        at = child
        child = 2 * at + 1
    heap[at] = item


cdef void _sift_up(const float *similarity, int32_t *heap, Py_ssize_t at,
                   int32_t item) noexcept nogil:
    """Put item at the free end of a heap."""
    while at > 0 and _weaker(similarity, item, heap[(at - 1) // 2]):
        heap[at] = heap[(at - 1) // 2]
        at = (at - 1) // 2
    heap[at] = item


cdef void _grower_pick(Grower *g, int32_t centre_count) noexcept nogil:
    """Pick the group_size alive rows that are most similar to the centre."""
    cdef Py_ssize_t i
    spfmt_intersections(g.centre, g.bits, g.alive, g.n_alive, g.words, g.common)
    for i in range(g.n_alive):
        g.similarity[i] = <float> _similarity(g.common[i], centre_count, g.counts[g.alive[i]],
                                              g.cosine)
    g.n_picked = 0
    g.runner_up = 0.0
    for i in range(g.n_alive):
        if g.n_picked < g.group_size:
            _sift_up(g.similarity, g.picked, g.n_picked, <int32_t> i)
            g.n_picked += 1
        elif g.similarity[i] > g.similarity[g.picked[0]]:
            g.runner_up = max(g.runner_up, g.similarity[g.picked[0]])
            _sift_down(g.similarity, g.picked, g.n_picked, <int32_t> i)
        else:
            g.runner_up = max(g.runner_up, g.similarity[i])


cdef inline bint _grower_is_sure(const Grower *g) noexcept nogil:
    """Whether a clear gap parts the picked rows from the others, so that a new centre finds them."""
    return g.similarity[g.picked[0]] > 1.5 * g.runner_up


cdef int32_t _grower_threshold(Grower *g, Py_ssize_t wanted) noexcept nogil:
    """The number of votes that as near as possible to `wanted` columns reach."""
    cdef Py_ssize_t votes = g.n_picked, reached = 0, c
    memset(g.histogram, 0, (g.n_picked + 1) * sizeof(int32_t))
    for c in range(64 * g.words):
        g.histogram[g.votes[c]] += 1
    while votes > 1 and reached + g.histogram[votes] <= wanted:
        reached += g.histogram[votes]
        votes -= 1
    if reached > 0 and wanted - reached < reached + g.histogram[votes] - wanted:
        votes += 1
    return <int32_t> votes


cdef int32_t _grower_recentre(Grower *g) noexcept nogil:
    """Centre = the columns that most picked rows hold; returns their number.

    About half as many as a row has: what a group's rows agree on is the part that blocks can use.
    Half keeps more l1 mass on random masks than the whole, a third or a quarter do.
    """
    cdef Py_ssize_t i, w, c, total = 0
    cdef uint64_t word
    cdef int32_t count = 0, threshold
    memset(g.votes, 0, 64 * g.words * sizeof(int32_t))
    for i in range(g.n_picked):
        total += g.counts[g.alive[g.picked[i]]]
        for w in range(g.words):
            word = g.bits[g.alive[g.picked[i]] * g.words + w]
            while word:
                g.votes[64 * w + count_trailing_zeros(word)] += 1
                word &= word - 1
    threshold = _grower_threshold(g, total // (2 * g.n_picked))
    for w in range(g.words):
        word = 0
        for c in range(64):
            word |= (<uint64_t> (g.votes[64 * w + c] >= threshold)) << c
        g.centre[w] = word
        count += popcount(word)
    return count


cdef Py_ssize_t _grower_emit(Grower *g, int32_t *out) noexcept nogil:
    """Move the picked rows to out, keep the others alive; returns how many moved."""
    cdef Py_ssize_t i, kept = 0
    for i in range(g.n_picked):
        out[i] = g.alive[g.picked[i]]
        g.alive[g.picked[i]] = -1
    for i in range(g.n_alive):
        if g.alive[i] >= 0:
            g.alive[kept] = g.alive[i]
            kept += 1
    g.n_alive = kept
    return g.n_picked


cdef void _grow(Grower *g, Py_ssize_t passes, int32_t *out) noexcept nogil:
    cdef Py_ssize_t w, i, at = 0
    cdef int32_t count
    while g.n_alive > 0:
        count = g.counts[g.alive[0]]
        for w in range(g.words):
            g.centre[w] = g.bits[g.alive[0] * g.words + w]
        _grower_pick(g, count)
        for i in range(passes):
            if _grower_is_sure(g):
                break
            count = _grower_recentre(g)
            _grower_pick(g, count)
        at += _grower_emit(g, out + at)


def greedy_groups(const uint64_t[:, ::1] bits, const int32_t[::1] counts,
                  const int32_t[::1] chosen, Py_ssize_t group_size, Py_ssize_t passes,
                  bint cosine, int32_t[::1] out):
    """Order of the chosen (non-empty) rows whose consecutive runs of group_size are similar.

    Groups are seeded by the first row of `chosen` that is left and moved to their centre up to
    `passes` times.
    """
    cdef Py_ssize_t n = chosen.shape[0], words = bits.shape[1], i
    cdef Grower g
    if n == 0:
        return
    group_size = min(group_size, n)
    g.centre = <uint64_t *> _allocate(words * sizeof(uint64_t) + sizeof(int32_t) * (
        64 * words + 2 * n + 2 * group_size + 1) + n * sizeof(float))
    g.votes = <int32_t *> (g.centre + words)
    g.alive = g.votes + 64 * words
    g.common = g.alive + n
    g.picked = g.common + n
    g.histogram = g.picked + group_size
    g.similarity = <float *> (g.histogram + group_size + 1)
    g.words, g.n_alive, g.group_size, g.cosine = words, n, group_size, cosine
    g.bits, g.counts = &bits[0, 0], &counts[0]
    with nogil:
        for i in range(n):
            g.alive[i] = chosen[i]
        _grow(&g, passes, &out[0])
    free(g.centre)


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
    column = <double *> _allocate(cols * (sizeof(double) + sizeof(int32_t)))
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
