"""The files of image data sets: idx, npz, CIFAR's batches, and a folder of images per class.

Every reader returns images (n, channels, height, width) uint8 and classes (n,) int64, and says
which file is wrong and what was expected in it.
"""

from __future__ import annotations

import contextlib
import gzip
import math
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spfmt.errors import FormatError, MissingDependency, SpfmtError, format_error

__all__ = [
    "Split",
    "read_arrays",
    "read_cifar_binary",
    "read_cifar_pickle",
    "read_folder",
    "read_idx",
]

Array = NDArray[Any]
Split = tuple[NDArray[np.uint8], NDArray[np.int64]]

_CIFAR = (3, 32, 32)
_LARGEST = 2**31  # bytes of an idx file
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff")


def damaged(path: Path, got: str, expected: str) -> FormatError:
    """Build the error for a file that is not what it should be."""
    return format_error(f"{path}, which {got}", expected, "download the file again")


@contextlib.contextmanager
def whole(path: Path, expected: str) -> Iterator[None]:
    """Name the file that its reader failed on: damaged files fail in any way there is."""
    try:
        yield
    except (SpfmtError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        raise damaged(path, f"cannot be read: {error}", expected) from None


def checked(path: Path, images: Array, labels: Array, classes: int) -> Split:
    """Return images and classes that fit each other, or say which file is wrong."""
    if images.ndim == 3:  # grey
        images = images[:, None]
    if images.ndim != 4 or images.dtype != np.uint8 or len(images) == 0:
        got = f"holds images {images.shape} of {images.dtype}"
        raise damaged(path, got, "uint8 images, at least one")
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        got = f"holds labels {labels.shape} of {labels.dtype} for {len(images)} images"
        raise damaged(path, got, "one whole number for each")
    if labels.min() < 0 or labels.max() >= classes:
        got = f"holds the labels {labels.min()} to {labels.max()}"
        raise damaged(path, got, f"0 to {classes - 1}")
    return np.require(images, requirements=("C", "W")), labels.astype(
        np.int64
    )  # torch wants to write


# ------------------------------------------------------------------------------------------- idx


def read_idx(path: Path, ndim: int) -> NDArray[np.uint8]:
    """Read an MNIST file of 3 dimensions (images) or 1 (labels), gzipped where its name says so."""
    opened = gzip.open if path.suffix == ".gz" else open
    with whole(path, "a whole file"), opened(path, "rb") as file:
        head = file.read(4 + 4 * ndim)
        if len(head) < 4 + 4 * ndim or head[:4] != bytes((0, 0, 8, ndim)):
            got = f"begins with the bytes {head[:4].hex(' ') or 'of nothing'}"
            raise damaged(path, got, f"00 00 08 {ndim:02x}, an idx file of {ndim} dimensions")
        shape = tuple(int(n) for n in np.frombuffer(head, ">u4", ndim, 4))
        size = math.prod(shape)
        # One more than there may be, and no more: little can unpack to very much.
        data = file.read(min(size, _LARGEST) + 1)
    if len(data) != size:
        got = f"has {'more' if len(data) > size else len(data)} bytes"
        raise damaged(path, got, f"{size} for {' x '.join(map(str, shape))} values")
    return np.frombuffer(data, np.uint8).reshape(shape)


# ------------------------------------------------------------------------------------------- npz


def read_arrays(path: Path, names: Sequence[str] | None = None) -> dict[str, Array]:
    """Read arrays of an .npz file, all by default."""
    # Opened here: numpy forgets to close what it cannot read.
    with whole(path, "a whole .npz file"), path.open("rb") as raw:
        file = np.load(raw, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise damaged(path, "is a single array", "an .npz file")
        found = {name: file[name] for name in file if names is None or name in names}
    missing = [name for name in names or () if name not in found]
    if missing:
        got = f"has no {', '.join(missing)}, but {', '.join(found) or 'nothing'}"
        raise damaged(path, got, f"the arrays {', '.join(names or ())}")
    return found


# ----------------------------------------------------------------------------------------- CIFAR


class _Arrays(pickle.Unpickler):
    """Reads arrays, numbers, texts and containers; a pickle can name nothing else."""

    _ALLOWED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        """Return what an array needs, and refuse everything else."""
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        # numpy 2 keeps the old place of _reconstruct, with a warning.
        module = module.replace("numpy.core", "numpy._core") if hasattr(np, "_core") else module
        return super().find_class(module, name)


def read_cifar_pickle(path: Path, label: str) -> tuple[Array, Array]:
    """Read a batch of CIFAR's Python version, a pickled dictionary with the classes as `label`."""
    with whole(path, "a pickled batch of CIFAR"), path.open("rb") as file:
        found = _Arrays(file, encoding="latin1").load()
    data = found.get("data") if isinstance(found, dict) else None
    labels = found.get(label) if isinstance(found, dict) else None
    if not isinstance(data, np.ndarray) or labels is None or data.shape[1:] != (3072,):
        raise damaged(path, "is another pickle", f"'data' (n, 3072) and {label!r}")
    with whole(path, f"one number for each image in {label!r}"):
        return data.reshape(-1, *_CIFAR), np.array(labels)


def read_cifar_binary(path: Path, heads: int) -> tuple[Array, Array]:
    """Read CIFAR's binary version; the last of `heads` bytes before an image is its class."""
    data, record = np.fromfile(path, np.uint8), heads + math.prod(_CIFAR)
    if data.size == 0 or data.size % record:
        raise damaged(path, f"has {data.size} bytes", f"a multiple of {record}, that of an image")
    records = data.reshape(-1, record)
    return records[:, heads:].reshape(-1, *_CIFAR), records[:, heads - 1]


# ---------------------------------------------------------------------------------- image folders


def read_folder(
    path: Path, size: int | None, names: Sequence[str] | None = None
) -> tuple[Split, tuple[str, ...]]:
    """Read a folder with one directory of images for every class: (images, classes), names.

    Images are scaled to `size`, or must have one size. They have one channel where all of them are
    grey, else three. Other classes than `names` are refused.
    """
    found = tuple(sorted(p.name for p in path.iterdir() if p.is_dir() and p.name[0] != "."))
    if len(found) < 2 or (names is not None and found != tuple(names)):
        expected = f"the directories {', '.join(names)}" if names else "one for each of two classes"
        got = f"has the directories {', '.join(found) or 'of no class'}"
        raise format_error(f"{path}, which {got}", expected, "sort the images into classes")
    files, labels = [], []
    for label, name in enumerate(found):
        images = sorted(p for p in (path / name).iterdir() if p.suffix.lower() in _IMAGES)
        if not images:
            raise format_error(
                f"{path / name} without images", f"files of {', '.join(_IMAGES)}", "add some"
            )
        files += images
        labels += [label] * len(images)
    return (_images(files, size), np.array(labels)), found


def _images(files: Sequence[Path], size: int | None) -> NDArray[np.uint8]:
    grey = all(_open(path).mode in ("1", "L") for path in files)
    arrays = []
    for path in files:
        image = _open(path).convert("L" if grey else "RGB")
        if size is not None:
            image = image.resize((size, size))
        array = np.asarray(image, np.uint8)
        arrays.append(array[None] if grey else array.transpose(2, 0, 1))
        if arrays[-1].shape != arrays[0].shape:
            raise format_error(
                f"{path} of {array.shape[0]} x {array.shape[1]} pixels",
                f"{arrays[0].shape[1]} x {arrays[0].shape[2]}, as {files[0]}",
                "set data.size to scale all images to one size",
            )
    return np.stack(arrays)


def _open(path: Path) -> Any:
    """Open an image; its pixels are read where they are asked for."""
    try:
        from PIL import Image
    except ImportError:
        raise MissingDependency(
            "got no module PIL; expected it for folders of images; fix: pip install pillow (it "
            "comes with matplotlib, as in 'spfmt[demo]')"
        ) from None
    with whole(path, "a whole image"), Image.open(path) as image:
        image.load()
        if image.mode[0] in "IF":  # Pillow would clip them
            raise damaged(path, f"has pixels of mode {image.mode}", "8 bits for each colour")
        return image
