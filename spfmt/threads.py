"""How many threads the kernels use."""

from __future__ import annotations

import spfmt._kernels as _kernels

from .errors import format_error

_override: int | None = None


def set_num_threads(threads: int | None) -> None:
    """Set the number of threads for all products; results do not depend on it, bit for bit.

    Parameters
    ----------
    threads : int or None
        At least 1. None returns to the default: OpenMP's own setting (``OMP_NUM_THREADS``, and
        ``torch.set_num_threads``, because torch and spfmt share one OpenMP runtime).

    Raises
    ------
    FormatError
        If `threads` is not a positive integer.
    """
    global _override
    whole = isinstance(threads, int) and not isinstance(threads, bool)
    if threads is not None and not (whole and 1 <= threads <= 1024):
        raise format_error(
            f"{threads!r} threads", "an int from 1 to 1024, or None", "None is OpenMP's default"
        )
    _override = threads


def get_num_threads() -> int:
    """Return the number of threads the next product may use (1 in a forked child process)."""
    if _kernels.in_forked_child():
        return 1
    return _kernels.openmp_threads() if _override is None else _override
