"""How many threads the kernels use."""

from __future__ import annotations

from . import _kernels
from .errors import FormatError

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
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int)):
        raise FormatError(f"threads: got {threads!r}, expected an int or None. Pass e.g. 4.")
    if threads is not None and not 1 <= threads <= 1024:
        raise FormatError(f"threads: got {threads}, expected 1 to 1024. None means OpenMP's default.")
    _override = threads


def get_num_threads() -> int:
    """Return the number of threads the next product may use (1 in a forked child process)."""
    available: int = _kernels.available_threads()
    if _override is None or available == 1:
        return available if _override is None else min(available, _override)
    return _override
