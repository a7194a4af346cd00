# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, embedsignature=True
"""Hot loops over the positions of a structure, and the hash by which a structure is known again.

Every function fills arrays that the Python side has allocated and checked; nothing here checks
shapes or values. The GIL is released inside every loop.
"""

from libc.stdint cimport int16_t, int32_t, int64_t, uint8_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset

from workspace cimport allocate

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>

    #define SPFMT_PRIME 0x9E3779B97F4A7C15ULL

    /* One link of a chain. It is a bijection of the state for every word and of the word for every
       state, so that one changed word always changes the result; the shift lets high bits reach the
       low ones. */
    static inline uint64_t spfmt_link(uint64_t state, uint64_t word)
    {
        state = (state ^ word) * SPFMT_PRIME;
        return state ^ (state >> 32);
    }

    /* Four chains hide the latency of a multiplication: five times the speed of one. */
    static uint64_t spfmt_content_hash(const int32_t *words, int64_t n)
    {
        uint64_t chain[4] = {1, 2, 3, 4}, w[4], last = 0, result = (uint64_t)n;
        int64_t i = 0;
        for (; i + 8 <= n; i += 8) {
            memcpy(w, words + i, 32);
            for (int k = 0; k < 4; ++k) chain[k] = spfmt_link(chain[k], w[k]);
        }
        for (int k = 0; i < n; i += 2, ++k, last = 0) {
            memcpy(&last, words + i, i + 2 <= n ? 8 : 4);
            chain[k] = spfmt_link(chain[k], last);
        }
        for (int k = 0; k < 4; ++k) result = spfmt_link(result, chain[k]);
        return result;
    }
    """
    uint64_t spfmt_content_hash(const int32_t *words, int64_t n) noexcept nogil


ctypedef fused element:  # of values, whatever they mean: only moved
    int16_t
    int32_t
    int64_t


def content_hash(const int32_t[::1] words):
    """A 64-bit hash that one changed word always changes."""
    cdef uint64_t found
    cdef Py_ssize_t n = words.shape[0]
    with nogil:
        found = spfmt_content_hash(&words[0] if n else NULL, n)
    return found


def flat_indices(const int32_t[::1] rows, const int64_t[:, ::1] runs, const int32_t[::1] columns,
                 int64_t n_cols, int64_t[::1] out):
    """out[place] = rows[i] * n_cols + column of every value; for `runs` see structure/moves.py."""
    cdef Py_ssize_t i, j
    cdef int64_t base, place, step
    cdef const int32_t *mine
    if columns.shape[0] == 0 or out.shape[0] == 0:
        return
    with nogil:
        for i in range(rows.shape[0]):
            base, place, step = rows[i] * n_cols, runs[2, i], runs[3, i]
            mine = &columns[0] + runs[0, i]
            for j in range(runs[1, i]):
                out[place] = base + mine[j]
                place += step


def mark(const int32_t[::1] rows, const int64_t[:, ::1] runs, const int32_t[::1] columns,
         int64_t n_cols, uint8_t[::1] bits):
    """Set the bit of every value's row-major flat index, the first of a byte its highest."""
    cdef Py_ssize_t i, j
    cdef int64_t base, at
    cdef const int32_t *mine
    if columns.shape[0] == 0 or bits.shape[0] == 0:
        return
    with nogil:
        for i in range(rows.shape[0]):
            base = rows[i] * n_cols
            mine = &columns[0] + runs[0, i]
            for j in range(runs[1, i]):
                at = base + mine[j]
                bits[at >> 3] |= <uint8_t> (0x80 >> (at & 7))


def gather(const int32_t[::1] rows, const int64_t[:, ::1] runs, const int32_t[::1] columns,
           int64_t n_cols, const element[::1] dense, element[::1] out):
    """out[place] = dense[rows[i] * n_cols + column] of every value; for `runs` see moves.py."""
    cdef Py_ssize_t i, j
    cdef int64_t place, step
    cdef const int32_t *mine
    cdef const element *row
    if columns.shape[0] == 0 or out.shape[0] == 0:
        return
    with nogil:
        for i in range(rows.shape[0]):
            place, step = runs[2, i], runs[3, i]
            mine, row = &columns[0] + runs[0, i], &dense[0] + rows[i] * n_cols
            for j in range(runs[1, i]):
                out[place + j * step] = row[mine[j]]


def scatter(const int32_t[::1] rows, const int64_t[:, ::1] runs, const int32_t[::1] columns,
            int64_t n_cols, const element[::1] values, element[::1] dense):
    """dense[rows[i] * n_cols + column] = values[place] of every value; the way back of `gather`."""
    cdef Py_ssize_t i, j
    cdef int64_t place, step
    cdef const int32_t *mine
    cdef element *row
    if columns.shape[0] == 0 or values.shape[0] == 0:
        return
    with nogil:
        for i in range(rows.shape[0]):
            place, step = runs[2, i], runs[3, i]
            mine, row = &columns[0] + runs[0, i], &dense[0] + rows[i] * n_cols
            for j in range(runs[1, i]):
                row[mine[j]] = values[place + j * step]


def sources(const int32_t[::1] rows, const int64_t[:, ::1] runs, const int32_t[::1] columns,
            const int64_t[:, ::1] old_runs, const int32_t[::1] old_columns, Py_ssize_t n_cols,
            int64_t[::1] out):
    """out[place] = the place in the old structure, or -1; old_runs[:, i] are those of rows[i].

    A table over one row's columns says which of its old values stands there: no search, no branch.
    """
    cdef Py_ssize_t i, j
    cdef int64_t place, step, first, old_step, at
    cdef int32_t *table
    cdef const int32_t *mine
    cdef const int32_t *old
    if columns.shape[0] == 0 or out.shape[0] == 0:
        return
    table = <int32_t *> allocate(n_cols * sizeof(int32_t))
    with nogil:
        memset(table, 0xFF, n_cols * sizeof(int32_t))
        for i in range(rows.shape[0]):
            mine = &columns[0] + runs[0, i]
            old = &old_columns[0] + old_runs[0, i]
            for j in range(old_runs[1, i]):
                table[old[j]] = <int32_t> j
            place, step, first, old_step = runs[2, i], runs[3, i], old_runs[2, i], old_runs[3, i]
            for j in range(runs[1, i]):
                at = table[mine[j]]
                out[place] = (first + at * old_step) | (at >> 63)  # -1 for -1, without a branch
                place += step
            for j in range(old_runs[1, i]):
                table[old[j]] = -1
    free(table)
