"""Optional packages, imported where they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from spfmt.errors import MissingDependency

__all__ = ["require"]


def require(module: str) -> Any:
    """Import a package that spfmt does not depend on, or say how to get it.

    Parameters
    ----------
    module : str
        Dotted name, such as ``"onnx.helper"``.

    Returns
    -------
    module

    Raises
    ------
    MissingDependency
        When it cannot be imported; the message names the pip command.
    """
    package = module.partition(".")[0]
    try:
        importlib.import_module(package)
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependency(
            f"got no module {package!r} ({error}); spfmt.onnx needs it here; "
            "run: pip install 'spfmt[onnx]'"
        ) from error
