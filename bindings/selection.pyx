# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, embedsignature=True
"""Hot loops that select weights: of a matrix, per row, n:m, transposable n:m, blocks.

Every function fills arrays that the Python side has allocated and checked; nothing here checks
shapes or values. Arrays are typed memoryviews, so the extension needs no numpy headers. The GIL is
released inside every loop. Masks are uint8 (0 or 1).
"""

from libc.math cimport INFINITY, sqrt
from libc.stdint cimport INT64_MAX, INT64_MIN, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from workspace cimport allocate

cdef extern from "selection.h":
    const uint8_t spfmt_pairs[6][4]
    void spfmt_best_patterns(const double *pairs, const int32_t *patterns, int64_t n,
                             int64_t *which) noexcept nogil
    void spfmt_keys_float(const float *scores, int64_t n, int64_t *out) noexcept nogil
    void spfmt_keys_double(const double *scores, int64_t n, int64_t *out) noexcept nogil
    int64_t spfmt_count(const int64_t *keys, int64_t n, int64_t bound) noexcept nogil
    int64_t spfmt_between(const int64_t *keys, int64_t n, int64_t low, int64_t high,
                          int64_t *above, int64_t *out) noexcept nogil
    int64_t spfmt_emit(const int64_t *keys, int64_t n, int64_t bound, int64_t *ties, int32_t first,
                       int32_t *out) noexcept nogil
    void spfmt_mark(const int64_t *keys, int64_t n, int64_t bound, uint8_t *keep) noexcept nogil
    int64_t spfmt_largest(const int64_t *keys, int64_t m, int64_t n, int64_t bound,
                          int32_t first, int32_t *out) noexcept nogil
    void spfmt_top_magnitudes(const float *row, int64_t n, int32_t *top) noexcept nogil
    void spfmt_groups(const int64_t *keys, int64_t cols, int64_t n, int64_t m,
                      int32_t *out) noexcept nogil

cdef extern from "floats.h":
    int64_t spfmt_count_floats(const float *scores, int64_t n, float bound,
                               int exceeds) noexcept nogil
    int64_t spfmt_between_floats(const float *scores, int64_t n, uint32_t mask, float low,
                                 float high, int64_t *above, float *out) noexcept nogil
    float spfmt_bound_floats(const float *scores, int64_t n, int64_t k, float low,
                             float high) noexcept nogil
    float spfmt_masked(float score, uint32_t mask) noexcept nogil
    int64_t spfmt_emit_floats(const float *scores, int64_t n, uint32_t mask, float bound,
                              int64_t *ties, int32_t *out, int64_t room) noexcept nogil
    void spfmt_fours_floats(const float *scores, int64_t cols, int64_t n, uint32_t mask,
                            int32_t *out) noexcept nogil

cdef uint32_t _MAGNITUDE = 0x7FFFFFFF, _AS_IT_IS = 0xFFFFFFFF

ctypedef fused real:
    float
    double

ctypedef fused number:
    double
    int64_t


# ---- selection -------------------------------------------------------------------------------


cdef inline void _keys(const real *scores, Py_ssize_t n, int64_t *out) noexcept nogil:
    if real is float:
        spfmt_keys_float(scores, n, out)
    else:
        spfmt_keys_double(scores, n, out)


cdef void _sort_descending(number *a, Py_ssize_t n) noexcept nogil:
    """Insertion sort for short ranges."""
    cdef Py_ssize_t i, j
    cdef number v
    for i in range(1, n):
        v = a[i]
        j = i
        while j > 0 and a[j - 1] < v:
            a[j] = a[j - 1]
            j -= 1
        a[j] = v


cdef number _pivot(const number *a, Py_ssize_t n, Py_ssize_t target, uint64_t *state) noexcept nogil:
    """A sampled value whose rank in a[:n] is about target.

    Near the target most elements fall on one side, which is both less work and, because branches
    become predictable, faster than a median.
    """
    cdef number sample[31]
    cdef Py_ssize_t i, size = 31 if n >= 256 else 3
    for i in range(size):
        state[0] = state[0] * 6364136223846793005ULL + 1442695040888963407ULL
        sample[i] = a[(state[0] >> 33) % <uint64_t> n]
    _sort_descending(sample, size)
    return sample[target * size // n]


cdef number _kth_largest(number *a, Py_ssize_t n, Py_ssize_t k) noexcept nogil:
    """The k-th largest (1-based) of a[:n]; reorders a. Expected O(n) on every input.

    Pivots come from a fixed pseudo-random sequence: no input is systematically slow, and the
    result does not depend on it.
    """
    cdef Py_ssize_t lo = 0, hi = n - 1, target = k - 1, i, above, below
    cdef uint64_t state = 0x9E3779B97F4A7C15ULL
    cdef number pivot, v
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


cdef struct Bracket:
    int64_t low          # keys around the bound of a row before: most likely those of this one
    int64_t high
    int64_t *work        # (n,) keys


cdef int64_t _few_bound(int64_t *keys, Py_ssize_t n, Py_ssize_t k, int64_t low,
                        int64_t high) noexcept nogil:
    """A bound that k of few keys in low..high reach, or the k-th largest: by bisection.

    Counting is vectorised and moves nothing, so it beats a selection by far.
    """
    cdef int64_t middle
    cdef Py_ssize_t count
    if n > 512:
        return _kth_largest(keys, n, k)
    while low < high:
        middle = <int64_t> (<uint64_t> low + (<uint64_t> high - <uint64_t> low) // 2 + 1)
        count = spfmt_count(keys, n, middle)
        if count == k:
            return middle
        if count > k:
            low = middle
        else:
            high = middle - 1
    return low


cdef int64_t _kth_bracketed(Bracket *b, const int64_t *keys, Py_ssize_t n,
                            Py_ssize_t k) noexcept nogil:
    """A bound that k keys reach, the k-th largest where ties leave none; 1 <= k <= n.

    A bracket that holds it spares most of the work.
    """
    cdef Py_ssize_t inside, reach
    cdef int64_t bound, above
    inside = spfmt_between(keys, n, b.low, b.high, &above, b.work)
    if above < k <= above + inside:
        return _few_bound(b.work, inside, k - above, b.low, b.high)
    # Ranks in two rows of one distribution differ by sqrt(2 k (n - k) / n): three times that.
    reach = 2 + <Py_ssize_t> (3 * sqrt(2.0 * k * (n - k) / n))
    memcpy(b.work, keys, n * sizeof(int64_t))
    b.low, b.high = INT64_MIN, INT64_MAX - 1
    if k + reach < n:
        b.low = _kth_largest(b.work, n, k + reach)
        n = k + reach  # they come first now
    bound = _kth_largest(b.work, n, k)
    if k > reach:
        b.high = _kth_largest(b.work, k, k - reach)
    return bound


cdef void _groups(const int64_t *keys, Py_ssize_t length, Py_ssize_t n, Py_ssize_t m, Bracket *b,
                  int32_t *out) noexcept nogil:
    """Indices of the n best of every m keys, ties to the first; a short last group keeps min(n, L)."""
    cdef Py_ssize_t begin = 0, size, at = 0
    cdef int64_t bound
    if n <= 8:
        spfmt_groups(keys, length, n, m, out)
        return
    while begin < length:
        size = min(m, length - begin)
        bound = INT64_MIN + 1 if n >= size else _kth_bracketed(b, keys + begin, size, n)
        at += spfmt_largest(keys + begin, size, min(n, size), bound, <int32_t> begin, out + at)
        begin += m


cdef void _cell_groups(const int64_t *keys, Py_ssize_t channels, Py_ssize_t cells, Py_ssize_t n,
                       Py_ssize_t m, Py_ssize_t kept, Bracket *b, int64_t *cell_keys,
                       uint8_t *keep, int32_t *out) noexcept nogil:
    """`_groups` of every kernel cell by itself, as ascending columns."""
    cdef Py_ssize_t cell, i, at = 0
    memset(keep, 0, channels * cells)
    for cell in range(cells):
        for i in range(channels):
            cell_keys[i] = keys[i * cells + cell]
        _groups(cell_keys, channels, n, m, b, out)
        for i in range(kept // cells):
            keep[out[i] * cells + cell] = 1
    for i in range(channels * cells):
        out[at] = <int32_t> i
        at += keep[i]


def nm_columns(const real[:, ::1] scores, Py_ssize_t n, Py_ssize_t m, Py_ssize_t cells,
               int32_t[:, ::1] out):
    """Matrix columns of the best n of every group of m channels per cell, ascending per row."""
    cdef Py_ssize_t rows = scores.shape[0], cols = scores.shape[1], kept = out.shape[1], r
    cdef int64_t *keys
    cdef int32_t *columns
    cdef Bracket b
    if rows == 0 or kept == 0:
        return
    keys = <int64_t *> allocate((3 * cols + 3) * sizeof(int64_t) + (cols + 4) * sizeof(int32_t)
                                + cols)
    b.low, b.high, b.work = 1, 0, keys + 2 * cols + 1  # no bracket yet
    columns = <int32_t *> (b.work + cols + 1)
    with nogil:
        for r in range(rows):
            if real is float and cells == 1 and m == 4:
                spfmt_fours_floats(&scores[r, 0], cols, n, _AS_IT_IS, columns)
                memcpy(&out[r, 0], columns, kept * sizeof(int32_t))
                continue
            _keys(&scores[r, 0], cols, keys)
            if cells == 1:
                _groups(keys, cols, n, m, &b, columns)
            else:
                _cell_groups(keys, cols // cells, cells, n, m, kept, &b, keys + cols,
                             <uint8_t *> (columns + cols + 4), columns)
            memcpy(&out[r, 0], columns, kept * sizeof(int32_t))
    free(keys)


cdef void _sample_bracket(const double[:, ::1] scores, Py_ssize_t k, Bracket *b) noexcept nogil:
    """Keys between which the k-th largest of all scores most likely lies."""
    cdef Py_ssize_t cols = scores.shape[1], total = scores.shape[0] * cols, i, rank, reach
    cdef Py_ssize_t size = min(total, 8192)
    cdef double share = <double> k / total
    cdef uint64_t state = 0x9E3779B97F4A7C15ULL, place
    for i in range(size):
        state = state * 6364136223846793005ULL + 1442695040888963407ULL
        place = (state >> 20) % <uint64_t> total
        _keys(&scores[place // cols, place % cols], 1, b.work + i)
    rank = <Py_ssize_t> (share * size)
    reach = 4 + <Py_ssize_t> (4 * sqrt(size * share * (1 - share)))
    b.low, b.high = INT64_MIN, INT64_MAX - 1
    if rank + reach <= size:
        b.low = _kth_largest(b.work, size, rank + reach)
    if rank > reach:
        b.high = _kth_largest(b.work, size, rank - reach)


cdef int64_t _kth_of_all(const double[:, ::1] scores, Py_ssize_t k, Bracket *b, int64_t *keys,
                         int64_t *ties) noexcept nogil:
    """The bound of the k largest keys of a matrix: those above it and the first `ties` equal to it."""
    cdef Py_ssize_t cols = scores.shape[1], r, inside
    cdef int64_t bound, above, larger
    _sample_bracket(scores, k, b)
    while True:
        above, inside = 0, 0
        for r in range(scores.shape[0]):
            _keys(&scores[r, 0], cols, keys)
            inside += spfmt_between(keys, cols, b.low, b.high, &larger, b.work + inside)
            above += larger
        if above < k <= above + inside:
            break
        b.low, b.high = INT64_MIN, INT64_MAX - 1  # at most once
    bound = _kth_largest(b.work, inside, k - above)
    ties[0] = k - above - spfmt_count(b.work, inside, bound + 1)
    if k == above + spfmt_count(b.work, inside, bound):  # all ties: no need to count them down
        ties[0] = 0
        return bound - 1
    return bound


cdef Py_ssize_t _mark_row(const int64_t *keys, Py_ssize_t n, int64_t bound, int64_t ties,
                          uint8_t *keep) noexcept nogil:
    """keep = keys above bound and the first `ties` equal to it; returns how many ties are left."""
    cdef Py_ssize_t i
    spfmt_mark(keys, n, bound, keep)
    for i in range(n if ties else 0):
        if ties and keys[i] == bound:
            keep[i] = 1
            ties -= 1
    return ties


cdef float _float_of_all(const float *scores, Py_ssize_t n, uint32_t mask, Py_ssize_t k,
                         float *work, int64_t *ties) noexcept nogil:
    """The bound of the k largest: all that reach it, but of those equal to it only `ties`.

    -1 ties are all; `work` has room for n + 2, and for 8192.
    """
    cdef Py_ssize_t i, inside, size = min(n, 8192), reach
    cdef double share = <double> k / n
    cdef uint64_t state = 0x9E3779B97F4A7C15ULL
    cdef float low = -INFINITY, high = INFINITY, bound
    cdef int64_t above, reached, larger
    for i in range(size):
        state = state * 6364136223846793005ULL + 1442695040888963407ULL
        work[i] = spfmt_masked(scores[(state >> 20) % <uint64_t> n], mask)
    reach = 4 + <Py_ssize_t> (4 * sqrt(size * share * (1 - share)))
    i = <Py_ssize_t> (share * size)
    if i + reach <= size:
        low = spfmt_bound_floats(work, size, i + reach, low, high)
    if i > reach:
        high = spfmt_bound_floats(work, size, i - reach, low, high)
    inside = spfmt_between_floats(scores, n, mask, low, high, &above, work)
    if not above < k <= above + inside:  # a sample that misleads
        low, high = -INFINITY, INFINITY
        inside = spfmt_between_floats(scores, n, mask, low, high, &above, work)
    if k <= above:
        bound, reached, larger = INFINITY, above, 0
    else:
        bound = spfmt_bound_floats(work, inside, k - above, low, high)
        reached = above + spfmt_count_floats(work, inside, bound, 0)
        larger = above + spfmt_count_floats(work, inside, bound, 1)
    ties[0] = -1 if reached == k else k - larger
    return bound


cdef int64_t _mark_floats(const float *scores, Py_ssize_t n, float bound, int64_t ties,
                          uint8_t *keep) noexcept nogil:
    """keep = scores that reach bound, of those equal to it the first `ties`; returns what is left."""
    cdef Py_ssize_t i
    for i in range(n):
        keep[i] = scores[i] > bound if ties >= 0 else scores[i] >= bound
    for i in range(n if ties > 0 else 0):
        if ties and scores[i] == bound:
            keep[i] = 1
            ties -= 1
    return ties


cdef void _top_floats(const float[:, ::1] scores, Py_ssize_t k, int64_t[::1] row_ptr,
                      int32_t[::1] columns, uint8_t[:, ::1] keep, uint32_t mask):
    cdef Py_ssize_t rows = scores.shape[0], cols = scores.shape[1], r
    cdef int64_t ties = 0
    cdef float bound
    # Memory that is not touched costs nothing: most often few scores lie around the bound.
    cdef float *work = <float *> allocate(max(8192, rows * cols + 2) * sizeof(float))
    with nogil:
        bound = _float_of_all(&scores[0, 0], rows * cols, mask, k, work, &ties)
        for r in range(rows):
            if keep.shape[0]:
                ties = _mark_floats(&scores[r, 0], cols, bound, ties, &keep[r, 0])
            else:
                row_ptr[r + 1] = row_ptr[r] + spfmt_emit_floats(
                    &scores[r, 0], cols, mask, bound, &ties, &columns[0] + row_ptr[r],
                    k - row_ptr[r])
    free(work)


def top_magnitudes(const float[:, ::1] weights, Py_ssize_t k, int64_t[::1] row_ptr,
                   int32_t[::1] columns, uint8_t[:, ::1] keep):
    """`top_columns` of magnitudes, without a mask: `keep` is empty."""
    _top_floats(weights, k, row_ptr, columns, keep, _MAGNITUDE)


def fours_of_magnitudes(const float[:, ::1] weights, Py_ssize_t n, int32_t[:, ::1] out):
    """`nm_columns` of magnitudes, for groups of four in a matrix."""
    cdef Py_ssize_t cols = weights.shape[1], kept = out.shape[1], r
    cdef int32_t *columns
    if weights.shape[0] == 0 or kept == 0:
        return
    columns = <int32_t *> allocate((cols + 4) * sizeof(int32_t))
    with nogil:
        for r in range(weights.shape[0]):
            spfmt_fours_floats(&weights[r, 0], cols, n, _MAGNITUDE, columns)
            memcpy(&out[r, 0], columns, kept * sizeof(int32_t))
    free(columns)


def top_columns(const real[:, ::1] scores, Py_ssize_t k, int64_t[::1] row_ptr,
                int32_t[::1] columns, uint8_t[:, ::1] keep):
    """The k largest of all scores, ties to the first: their columns, row after row, or their mask.

    `columns` has k elements, or none where `keep` has some.
    """
    if real is float:
        _top_floats(scores, k, row_ptr, columns, keep, _AS_IT_IS)
    else:
        _top_doubles(scores, k, row_ptr, columns, keep)


cdef void _top_doubles(const double[:, ::1] scores, Py_ssize_t k, int64_t[::1] row_ptr,
                       int32_t[::1] columns, uint8_t[:, ::1] keep):
    cdef Py_ssize_t cols = scores.shape[1], r
    cdef int64_t *keys
    cdef int64_t bound, ties = 0
    cdef Bracket b
    # Memory that is not touched costs nothing: most often `work` is used for a few keys.
    keys = <int64_t *> allocate((cols + scores.shape[0] * cols + 1) * sizeof(int64_t))
    b.work = keys + cols
    with nogil:
        bound = _kth_of_all(scores, k, &b, keys, &ties)
        for r in range(scores.shape[0]):
            _keys(&scores[r, 0], cols, keys)
            if keep.shape[0]:
                ties = _mark_row(keys, cols, bound, ties, &keep[r, 0])
            else:
                row_ptr[r + 1] = row_ptr[r] + spfmt_emit(keys, cols, bound, &ties, 0,
                                                         &columns[row_ptr[r]])
    free(keys)


# ---- transposable n:m ------------------------------------------------------------------------


def transposable_2_4(const real[:, ::1] scores, Py_ssize_t cells,
                     const int32_t[:, ::1] patterns, uint8_t[:, ::1] out):
    """Best of the 90 patterns for every whole 4 x 4 tile; ties go to the first pattern.

    patterns[p, i] is the index of row i's pair of columns among (01, 02, 03, 12, 13, 23).
    """
    cdef Py_ssize_t tile_rows = scores.shape[0] // 4, row_step = scores.shape[1], r, t, lane, place
    cdef Py_ssize_t tiles = row_step // cells // 4 * cells
    cdef double pairs[4 * 6 * 8]
    cdef int64_t best[8]
    memset(pairs, 0, sizeof(pairs))
    with nogil:
        for r in range(tile_rows):
            for t in range(tiles):
                place = t // cells * 4 * cells + t % cells
                lane = t % 8
                _pair_sums(&scores[4 * r, place], row_step, cells, pairs + lane)
                if lane < 7 and t + 1 < tiles:
                    continue
                spfmt_best_patterns(pairs, &patterns[0, 0], patterns.shape[0], best)
                for place in range(lane + 1):
                    _mark_pattern(&patterns[best[place], 0], row_step, cells,
                                  &out[4 * r, 0] + (t - lane + place) // cells * 4 * cells
                                  + (t - lane + place) % cells)


cdef void _pair_sums(const real *w, Py_ssize_t row_step, Py_ssize_t step,
                     double *pairs) noexcept nogil:
    """Score of each pair of columns of each row of a tile, one of eight tiles side by side."""
    cdef Py_ssize_t i, a, b, p = 0
    for i in range(4):
        for a in range(3):
            for b in range(a + 1, 4):
                pairs[8 * p] = <double> w[i * row_step + a * step] + w[i * row_step + b * step]
                p += 1


cdef void _mark_pattern(const int32_t *pattern, Py_ssize_t row_step, Py_ssize_t step,
                        uint8_t *keep) noexcept nogil:
    cdef Py_ssize_t i, j
    for i in range(4):
        for j in range(4):
            keep[i * row_step + j * step] = spfmt_pairs[pattern[i]][j]


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
        ties = t.n
        for j in range(m):
            ties -= row[j] > t.u[i]
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


def mask_columns(const uint8_t[:, ::1] mask, int32_t[:, ::1] out):
    """Columns of a mask with equally many nonzeros in every row."""
    cdef Py_ssize_t cols = mask.shape[1], kept = out.shape[1], r, c, at
    cdef int32_t *columns
    if kept == 0:
        return
    columns = <int32_t *> allocate((cols + 1) * sizeof(int32_t))
    with nogil:
        for r in range(mask.shape[0]):
            at = 0
            for c in range(cols):
                columns[at] = <int32_t> c
                at += mask[r, c]
            memcpy(&out[r, 0], columns, kept * sizeof(int32_t))
    free(columns)


def column_counts(const int32_t[:, ::1] columns, Py_ssize_t m, int32_t[:, ::1] out):
    """out[b, c] += how often rows b*m to b*m + m - 1 list column c; rows beyond are left out."""
    cdef Py_ssize_t r, i
    with nogil:
        for r in range(out.shape[0] * m):
            for i in range(columns.shape[1]):
                out[r // m, columns[r, i]] += 1


# ---- blocks of the grid ----------------------------------------------------------------------


def grid_magnitudes(const float[:, ::1] weights, Py_ssize_t block_rows, Py_ssize_t block_cols,
                    float[:, ::1] out):
    """Largest magnitude of every block of the grid, NaN where there is one."""
    cdef Py_ssize_t rows = weights.shape[0], cols = weights.shape[1], g, r, b, c
    cdef int32_t *top
    cdef int32_t best
    if out.shape[0] == 0 or out.shape[1] == 0:
        return
    top = <int32_t *> allocate(cols * sizeof(int32_t))
    with nogil:
        for g in range(out.shape[0]):
            memset(top, 0, cols * sizeof(int32_t))
            for r in range(g * block_rows, min(rows, (g + 1) * block_rows)):
                spfmt_top_magnitudes(&weights[r, 0], cols, top)
            for b in range(out.shape[1]):
                best = 0
                for c in range(b * block_cols, min(cols, (b + 1) * block_cols)):
                    best = max(best, top[c])
                memcpy(&out[g, b], &best, sizeof(int32_t))
    free(top)


# ---- shuffled blocks -------------------------------------------------------------------------


cdef void _merge_sort(const double *key, int32_t *order, int32_t *work, Py_ssize_t n) noexcept nogil:
    """Stable: order[:n] by key descending."""
    cdef Py_ssize_t half = n // 2, i = 0, j = half, k
    cdef int32_t v, left, first
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
    k = 0
    while i < half and j < n:
        left, v = work[i], order[j]
        first = key[left] >= key[v]
        order[k] = v + (left - v) * first  # without a branch: which one it is cannot be foreseen
        k += 1
        i += first
        j += 1 - first
    for j in range(i, half):
        order[k + j - i] = work[j]


def block_norms(const real[:, ::1] scores, const int32_t[::1] row_perm, Py_ssize_t block_rows,
                Py_ssize_t block_cols, int32_t[:, ::1] order, double[:, ::1] norms):
    """Per row group: the best columns by their sum, descending, and the sum of every run of them.

    `order` has as many columns as are wanted; the last run may be short.
    """
    cdef Py_ssize_t rows = scores.shape[0], cols = scores.shape[1], kept = order.shape[1], g, i, c
    cdef double *column
    cdef int64_t *keys
    cdef int32_t *best
    cdef int64_t bound
    cdef const real *row
    cdef Bracket b
    if rows == 0 or kept == 0:
        return
    column = <double *> allocate(cols * sizeof(double) + (2 * cols + 1) * sizeof(int64_t)
                                 + 2 * (cols + 1) * sizeof(int32_t))
    keys = <int64_t *> (column + cols)
    b.low, b.high, b.work = 1, 0, keys + cols
    best = <int32_t *> (b.work + cols + 1)
    with nogil:
        for g in range(order.shape[0]):
            memset(column, 0, cols * sizeof(double))
            for i in range(g * block_rows, min(rows, (g + 1) * block_rows)):
                row = &scores[row_perm[i], 0]
                for c in range(cols):
                    column[c] += row[c]
            spfmt_keys_double(column, cols, keys)
            bound = _kth_bracketed(&b, keys, cols, kept)
            spfmt_largest(keys, cols, kept, bound, 0, best)
            _merge_sort(column, best, best + cols + 1, kept)
            memcpy(&order[g, 0], best, kept * sizeof(int32_t))
            memset(&norms[g, 0], 0, norms.shape[1] * sizeof(double))
            for c in range(kept):
                norms[g, c // block_cols] += column[best[c]]
    free(column)
