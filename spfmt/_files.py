"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets

__all__ = ["replace_file"]


def replace_file(path: str, data: bytes) -> None:
    """Replace the file `path` by `data` in one step; a failure leaves what was there."""
    folder = os.path.dirname(path)
    # A name of its own: with the file's name in it, it could become longer than names may be.
    temporary = os.path.join(folder, f".spfmt-{secrets.token_hex(8)}.tmp")
    try:
        # "x" obeys the umask, which tempfile's own files would not.
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
