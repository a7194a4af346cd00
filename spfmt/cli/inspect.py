"""``spfmt inspect FILE``: what is in a saved tensor."""

from __future__ import annotations

from pathlib import Path

from spfmt.formats import load, read_metadata

__all__ = ["describe"]


def describe(path: Path) -> str:
    """Check a file of `spfmt.SparseTensor.save` and describe it.

    Parameters
    ----------
    path : Path

    Returns
    -------
    str
        One line per field and per array.

    Raises
    ------
    FormatError
        For a file that is truncated, corrupt or foreign.
    OSError
        For a file that cannot be opened.
    """
    tensor = load(path)
    size = path.stat().st_size
    dense = tensor.dtype.itemsize * tensor.matrix_shape[0] * tensor.matrix_shape[1]
    lines = [
        str(path),
        repr(tensor),
        _line("format", tensor.format),
        _line("shape", " x ".join(map(str, tensor.shape))),
        *(_line(name, value) for name, value in tensor.params().items()),
        _line("nnz", f"{tensor.nnz} ({100 * tensor.density:.2f} %)"),
        _line("file", f"{size} bytes (dense values alone: {dense})"),
    ]
    for name, array in {**tensor.structure(), "values": tensor.values}.items():
        lines.append(_line(name, f"{array.dtype.name} {' x '.join(map(str, array.shape))}"))
    lines += [_line("metadata", f"{name}: {text}") for name, text in read_metadata(path).items()]
    return "\n".join(lines)


def _line(name: str, value: object) -> str:
    return f"  {name:<16}{value}"
