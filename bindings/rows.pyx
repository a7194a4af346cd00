# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, embedsignature=True
"""Hot loops over similar rows: overlaps, distances, minhash, the fast clusterer.

Every function fills arrays that the Python side has allocated and checked; nothing here checks
shapes or values. Arrays are typed memoryviews, so the extension needs no numpy headers. The GIL is
released inside every loop. Masks are rows of
64-bit words, least significant bit first.
"""

from libc.math cimport INFINITY, sqrt
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset

from workspace cimport allocate

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>

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

    /* AVX-512 is left out: it would fuse multiplications and additions, and the order of rows must
       not depend on the machine. */
    #if defined(__x86_64__) && defined(__GLIBC__)
    #define SPFMT_CLONES __attribute__((target_clones("avx2", "default")))
    #else
    #define SPFMT_CLONES
    #endif

    SPFMT_CLONES static void spfmt_jaccard_distances(const int32_t *common, int32_t count,
                                                     const int32_t *counts, int64_t n, double *out)
    {
        for (int64_t i = 0; i < n; ++i)
            out[i] = 1.0 - common[i] / ((double)count + (double)counts[i] - common[i]);
    }

    /* The first smallest of n distances; where dead has all bits set, there is none. Bits of
       positive numbers are ordered as the numbers are, and integers vectorise. */
    SPFMT_CLONES static int64_t spfmt_nearest(const double *distances, const uint64_t *dead,
                                              int64_t n)
    {
        uint64_t least = UINT64_MAX, bits;
        int64_t i;
        for (i = 0; i < n; ++i) {
            memcpy(&bits, distances + i, sizeof bits);
            bits |= dead[i];
            least = bits < least ? bits : least;
        }
        for (i = 0; i < n - 1; ++i) {
            memcpy(&bits, distances + i, sizeof bits);
            if ((bits | dead[i]) == least) break;
        }
        return i;
    }

    /* Lance and Williams: y becomes the distances of the union of two clusters. */
    SPFMT_CLONES static void spfmt_average(const double *x, double *y, double n_x, double n_y,
                                           int64_t n)
    {
        for (int64_t i = 0; i < n; ++i) y[i] = (n_x * x[i] + n_y * y[i]) / (n_x + n_y);
    }
    SPFMT_CLONES static void spfmt_maximum(const double *x, double *y, int64_t n)
    {
        for (int64_t i = 0; i < n; ++i) y[i] = x[i] > y[i] ? x[i] : y[i];
    }
    """
    void spfmt_jaccard_distances(const int32_t *common, int32_t count, const int32_t *counts,
                                 int64_t n, double *out) noexcept nogil
    int64_t spfmt_nearest(const double *distances, const uint64_t *dead, int64_t n) noexcept nogil
    void spfmt_average(const double *x, double *y, double n_x, double n_y,
                       int64_t n) noexcept nogil
    void spfmt_maximum(const double *x, double *y, int64_t n) noexcept nogil
    void spfmt_intersections(const uint64_t *one, const uint64_t *many, const int32_t *rows,
                             int64_t n_rows, int64_t n_words, int32_t *out) noexcept nogil
    int popcount "__builtin_popcountll"(uint64_t word) noexcept nogil
    int count_trailing_zeros "__builtin_ctzll"(uint64_t word) noexcept nogil


# ---- row similarity --------------------------------------------------------------------------


cdef bint _overlaps(const uint64_t[:, ::1] bits, const int32_t[::1] counts, int32_t i,
                    const int32_t *others, Py_ssize_t n, double fraction, int32_t *common,
                    uint8_t[::1] out) noexcept nogil:
    """Whether row i overlaps one of the others; marks those that overlap it on the way."""
    cdef Py_ssize_t begin, j, size
    for begin in range(0, n, 64):
        size = min(<Py_ssize_t> 64, n - begin)
        spfmt_intersections(&bits[i, 0], &bits[0, 0], others + begin, size, bits.shape[1], common)
        for j in range(size):
            if others[begin + j] != i:
                out[i] |= common[j] > fraction * counts[i]
                out[others[begin + j]] |= common[j] > fraction * counts[others[begin + j]]
        if out[i]:
            return True
    return False


def overlapping(const uint64_t[:, ::1] bits, const int32_t[::1] counts, double fraction,
                uint8_t[::1] out):
    """out[i] = whether row i shares more than the fraction of its columns with another row.

    A row that was compared with all others in vain is not compared again.
    """
    cdef Py_ssize_t n = bits.shape[0], i, place, n_left = n
    cdef int32_t *left = <int32_t *> allocate((2 * n + 64) * sizeof(int32_t))
    cdef int32_t *where = left + n
    with nogil:
        for i in range(n):
            left[i] = where[i] = <int32_t> i
            out[i] = 0
        for i in range(n):
            if not out[i] and not _overlaps(bits, counts, <int32_t> i, left, n_left, fraction,
                                            where + n, out):
                n_left -= 1
                place = where[i]
                left[place] = left[n_left]
                where[left[place]] = <int32_t> place
    free(left)


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


cdef inline int32_t _root(int32_t *parent, int32_t i) noexcept nogil:
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


cdef enum:
    MIRROR = 8  # rows whose distances are mirrored together: a cache line of each other row


def row_distances(const uint64_t[:, ::1] bits, const int32_t[::1] counts,
                  const int32_t[::1] chosen, bint cosine, double[:, ::1] out):
    """out[:, :n] = 1 - similarity over the n chosen (non-empty) rows; infinite on the diagonal."""
    cdef Py_ssize_t n = chosen.shape[0], words = bits.shape[1], i, j, first = 0, end
    cdef int32_t *common
    cdef int32_t *own
    if n == 0 or words == 0:
        return
    common = <int32_t *> allocate(2 * n * sizeof(int32_t))
    own = common + n
    with nogil:
        for i in range(n):
            own[i] = counts[chosen[i]]
        while first < n:
            end = min(n, first + MIRROR)
            for i in range(first, end):
                spfmt_intersections(&bits[chosen[i], 0], &bits[0, 0], &chosen[first], n - first,
                                    words, common)
                if cosine:
                    for j in range(first, n):
                        out[i, j] = 1.0 - _similarity(common[j - first], own[i], own[j], True)
                else:
                    spfmt_jaccard_distances(common, own[i], own + first, n - first, &out[i, first])
                out[i, i] = INFINITY
            for j in range(end, n):
                for i in range(first, end):
                    out[j, i] = out[i, j]
            first = end
    free(common)


cdef void _merge(double[:, ::1] distance, Py_ssize_t x, Py_ssize_t y, const int32_t *size,
                 const int32_t *alive, Py_ssize_t n_alive, bint complete) noexcept nogil:
    """Cluster y takes in cluster x."""
    cdef Py_ssize_t n = distance.shape[0], i
    if complete:
        spfmt_maximum(&distance[x, 0], &distance[y, 0], n)
    else:
        spfmt_average(&distance[x, 0], &distance[y, 0], size[x], size[y], n)
    distance[y, y] = INFINITY
    for i in range(n_alive):
        distance[alive[i], y] = distance[y, alive[i]]


cdef Py_ssize_t _grow_chain(const double[:, ::1] distance, const uint64_t *dead, int32_t *chain,
                            Py_ssize_t length) noexcept nogil:
    """Go on to the nearest cluster until its nearest is the one before; returns the new length."""
    cdef Py_ssize_t x, y
    while True:
        x = chain[length - 1]
        y = spfmt_nearest(&distance[x, 0], dead, distance.shape[0])
        if length > 1 and distance[x, chain[length - 2]] <= distance[x, y]:
            return length
        chain[length] = <int32_t> y
        length += 1


def nearest_neighbour_chain(double[:, ::1] distance, bint complete, int32_t[:, ::1] pairs,
                            double[::1] heights):
    """Agglomerative clustering (Murtagh 1983): pairs[k] are members of the k-th clusters joined.

    The chain runs from cluster to nearest cluster, ties to the one it came from and then to the
    first, and joins the two it ends at. Heights are not ascending. `distance` is overwritten.
    """
    cdef Py_ssize_t n = distance.shape[0], k, length = 0, x, y, i, kept
    cdef int32_t *chain = <int32_t *> allocate(n * (3 * sizeof(int32_t) + sizeof(uint64_t)))
    cdef uint64_t *dead = <uint64_t *> chain
    chain = <int32_t *> (dead + n)
    cdef int32_t *size = chain + n
    cdef int32_t *alive = size + n
    with nogil:
        for i in range(n):
            dead[i], size[i], alive[i] = 0, 1, <int32_t> i
        for k in range(n - 1):
            if length == 0:
                chain[0] = alive[0]
                length = 1
            length = _grow_chain(distance, dead, chain, length) - 2
            x, y = min(chain[length], chain[length + 1]), max(chain[length], chain[length + 1])
            heights[k] = distance[x, y]
            pairs[k, 0], pairs[k, 1] = <int32_t> x, <int32_t> y
            kept = 0
            for i in range(n - k):
                alive[kept] = alive[i]
                kept += alive[i] != x
            _merge(distance, x, y, size, alive, kept, complete)
            dead[x] = ~(<uint64_t> 0)
            size[y] += size[x]
    free(dead)


def leaf_order(const int32_t[:, ::1] pairs, int32_t[::1] leaves):
    """Leaves of a dendrogram from left to right; a pair's cluster that is older stands left.

    Single leaves are older than all clusters, the lowest first. `pairs` ascend in height.
    """
    cdef Py_ssize_t n = leaves.shape[0], k
    cdef int32_t a, b
    cdef int32_t *parent = <int32_t *> allocate(4 * n * sizeof(int32_t))
    cdef int32_t *age = parent + n
    cdef int32_t *last = age + n
    cdef int32_t *next_leaf = last + n
    with nogil:
        for k in range(n):
            parent[k] = age[k] = last[k] = <int32_t> k
        for k in range(n - 1):
            a, b = _root(parent, pairs[k, 0]), _root(parent, pairs[k, 1])
            if age[a] > age[b]:
                a, b = b, a
            next_leaf[last[a]] = b  # a root is the first leaf of its cluster
            last[a] = last[b]
            parent[b] = a
            age[a] = <int32_t> (n + k)
        a = _root(parent, 0)
        for k in range(n):
            leaves[k] = a
            if k + 1 < n:
                a = next_leaf[a]
    free(parent)


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
    size = <int32_t *> allocate(rows * sizeof(int32_t))
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
    g.centre = <uint64_t *> allocate(words * sizeof(uint64_t) + sizeof(int32_t) * (
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
