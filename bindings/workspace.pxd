"""Memory for the hot loops of the structure search."""

from libc.stdlib cimport malloc


cdef inline void *allocate(size_t n_bytes) except NULL:
    cdef void *block = malloc(n_bytes if n_bytes > 0 else 1)
    if block == NULL:
        raise MemoryError(f"structure search: {n_bytes} bytes of workspace are not available")
    return block
