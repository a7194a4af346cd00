# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, embedsignature=True
"""Hot loops of HRBP: nonzeros and scores of kernels, channels and kernel cells.

Every function fills arrays that the Python side has allocated and checked; nothing here checks
shapes or values. The GIL is released inside every loop. Masks are uint8 (0 or 1).
"""

from libc.stdint cimport int32_t, int64_t, uint8_t

ctypedef fused real:
    float
    double


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


def kernel_sums(const real[:, ::1] scores, Py_ssize_t cells, const int64_t[::1] kernels,
                double[::1] out):
    """out[i] = sum of the kernel whose number among all kernels is kernels[i]."""
    cdef Py_ssize_t i, k
    cdef double total
    cdef const real *kernel
    with nogil:
        for i in range(kernels.shape[0]):
            kernel = &scores[0, 0] + kernels[i] * cells
            total = 0.0
            for k in range(cells):
                total += kernel[k]
            out[i] = total


def channel_totals(const uint8_t[:, ::1] kernel_mask, const uint8_t[:, ::1] mask,
                   const real[:, ::1] scores, const int32_t[::1] rows, Py_ssize_t cells,
                   int64_t[:, ::1] counts, double[::1] sums):
    """Kernels, nonzeros and score of every input channel over the rows (added to what is there)."""
    cdef Py_ssize_t r, i, k
    cdef int64_t count
    cdef double total
    cdef const uint8_t *active
    cdef const real *score
    with nogil:
        for r in range(rows.shape[0]):
            active, score = &mask[rows[r], 0], &scores[rows[r], 0]
            for i in range(sums.shape[0]):
                count, total = 0, 0.0
                for k in range(i * cells, (i + 1) * cells):
                    count += active[k]
                    total += score[k]
                counts[0, i] += kernel_mask[rows[r], i]
                counts[1, i] += count
                sums[i] += total


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
