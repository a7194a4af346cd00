"""Exceptions of spfmt.

Every message names three things: what was got, what was expected, and how to fix it.
"""

from __future__ import annotations

__all__ = [
    "DeviceError",
    "FormatError",
    "KernelNotFound",
    "MissingDependency",
    "SpfmtError",
    "format_error",
]


class SpfmtError(Exception):
    """Base class of every error that spfmt raises on purpose."""


class FormatError(SpfmtError, ValueError):
    """A shape, dtype, index, file or parameter does not describe a legal sparse tensor."""


class KernelNotFound(SpfmtError, NotImplementedError):
    """No kernel of the table runs the product that was asked for."""


class DeviceError(SpfmtError, RuntimeError):
    """A device, or its driver, failed at a product."""


class MissingDependency(SpfmtError, ImportError):
    """An optional package is needed for what was asked."""


def format_error(got: str, expected: str, fix: str) -> FormatError:
    """Build a `FormatError` in the form that all of spfmt uses.

    Parameters
    ----------
    got, expected, fix : str
        The offending input, the rule that it breaks, and what the caller can do about it.
    """
    return FormatError(f"got {got}; expected {expected}; fix: {fix}")
