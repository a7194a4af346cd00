"""Data sets by name, from the layouts in which their files are usually found."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spfmt.errors import FormatError, MissingDependency, format_error
from spfmt.recipes.readers import (
    Split,
    checked,
    damaged,
    read_arrays,
    read_cifar_binary,
    read_cifar_pickle,
    read_folder,
    read_idx,
)

if TYPE_CHECKING:
    from spfmt.recipes.tables import Data

__all__ = ["DATA_SETS", "DataSet", "Images", "load_images"]

Reader = Callable[[Path, "Data"], tuple[Split, Split, int]]
_SPLIT_SEED = 0  # of what is held back: one test set for all runs, so that seeds compare


@dataclass(frozen=True)
class Images:
    """A data set in memory.

    Attributes
    ----------
    x, x_test : ndarray (n, channels, height, width), uint8
    y, y_test : ndarray (n,), int64
    classes : int
    top : float
        The largest value that a pixel can have.
    mean, std : ndarray (channels,), float32
        Of pixels over `top`: those that were asked for, or those of the training images.
    """

    x: NDArray[np.uint8]
    y: NDArray[np.int64]
    x_test: NDArray[np.uint8]
    y_test: NDArray[np.int64]
    classes: int
    top: float
    mean: NDArray[np.float32]
    std: NDArray[np.float32]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        channels, height, width = self.x.shape[1:]
        return channels, height, width

    def checksum(self) -> int:
        """Return a number that another data set does not have, whatever file it came from."""
        crc = 0
        for array in (self.x, self.y, self.x_test, self.y_test):
            crc = zlib.crc32(array.reshape(-1).view(np.uint8).data, crc)
        return crc


@dataclass(frozen=True)
class DataSet:
    """How a data set is read.

    Attributes
    ----------
    augments : bool
        Whether a shifted or mirrored image is still one of its class.
    built_in : bool
        Whether no directory is needed.
    top : float
        The largest value that a pixel can have.
    """

    read: Reader
    augments: bool = True
    built_in: bool = False
    top: float = 255.0


def load_images(data: Data) -> Images:
    """Read a data set.

    Parameters
    ----------
    data : Data
        Table of a recipe. Its directory comes first, then that of the environment's SPFMT_DATA.

    Raises
    ------
    FormatError
        Where no directory is known, files are not there, or one of them is damaged.
    MissingDependency
        Where scikit-learn (digits) or Pillow (folders) is not installed.
    OSError
    """
    known = DATA_SETS[data.name]
    directory = Path() if known.built_in else _directory(data)
    (x, y), (x_test, y_test), classes = known.read(directory, data)
    if x.shape[1:] != x_test.shape[1:]:
        raise format_error(
            f"training images of {x.shape[1:]} and test images of {x_test.shape[1:]}",
            "one shape (channels, height, width)",
            "check the files" + (", or set data.size" if data.name == "folder" else ""),
        )
    mean, std = _moments(x, known.top)
    if data.mean is not None and data.std is not None:
        mean, std = np.array(data.mean, np.float32), np.array(data.std, np.float32)
    if len(mean) != x.shape[1] or len(std) != x.shape[1]:
        raise format_error(
            f"data.mean and data.std of {len(mean)} and {len(std)} numbers",
            f"one for each of {x.shape[1]} channels",
            "change them, or leave both out",
        )
    return Images(x, y, x_test, y_test, classes, known.top, mean, std)


def _moments(x: NDArray[np.uint8], top: float) -> tuple[Any, Any]:
    """Return mean and deviation of every channel, exactly: from how often each value occurs."""
    counts = np.zeros((x.shape[1], 256), np.int64)
    for part in np.array_split(x, -(-len(x) // 1000)):  # bincount takes eight bytes for each of x
        for channel, pixels in zip(counts, part.transpose(1, 0, 2, 3), strict=True):
            channel += np.bincount(pixels.reshape(-1), minlength=256)
    shares, values = counts / counts.sum(1, keepdims=True), np.arange(256) / top
    mean = shares @ values
    std = np.sqrt(shares @ values**2 - mean**2)
    return np.float32(mean), np.float32(np.where(std > 1e-6, std, 1.0))


def _directory(data: Data) -> Path:
    named = data.dir or os.environ.get("SPFMT_DATA", "")
    if not named:
        raise format_error(
            f"the data set {data.name} without a directory",
            "the one with its files",
            "pass --data DIR, set SPFMT_DATA, or write data.dir",
        )
    path = Path(os.path.expanduser(named))
    if not path.is_dir():
        raise format_error(f"the data directory {path}", "a directory that exists", "check --data")
    return path


def _first(directory: Path, names: Sequence[str]) -> Path | None:
    """Return the first of some files that is there."""
    return next((p for p in (directory / name for name in names) if p.is_file()), None)


def _absent(name: str, directory: Path, layouts: str) -> FormatError:
    return format_error(
        f"no {name} in {directory}", layouts, "pass the directory that holds them: --data DIR"
    )


# ------------------------------------------------------------------------------- scikit-learn


def _digits(directory: Path, data: Data) -> tuple[Split, Split, int]:
    """Read the 1797 digits of 8 x 8 pixels; one fifth of each class is the test."""
    try:
        from sklearn import datasets, model_selection
    except ImportError:
        raise MissingDependency(
            "got no module sklearn; expected it for the digits; fix: pip install 'spfmt[search]'"
        ) from None
    x, y = datasets.load_digits(return_X_y=True)
    parts = model_selection.train_test_split(
        x.astype(np.uint8).reshape(-1, 1, 8, 8), y.astype(np.int64),
        test_size=0.2, stratify=y, random_state=_SPLIT_SEED,
    )  # fmt: skip
    return (parts[0], parts[2]), (parts[1], parts[3]), 10


# -------------------------------------------------------------------------------------- MNIST


def _mnist(title: str, npz: Sequence[str], folders: Sequence[str]) -> Reader:
    """Return the reader of MNIST or of a data set in its files."""

    def read(directory: Path, data: Data) -> tuple[Split, Split, int]:
        archive = _first(directory, npz)
        if archive is not None:
            names = ("x_train", "y_train", "x_test", "y_test")
            x, y, x_test, y_test = map(read_arrays(archive, names).__getitem__, names)
            train = checked(archive, x, y, 10)
            return train, checked(archive, x_test, y_test, 10), 10
        train = _idx_split(title, directory, folders, npz, "train")
        return train, _idx_split(title, directory, folders, npz, "t10k"), 10

    return read


def _idx_split(
    title: str, directory: Path, folders: Sequence[str], npz: Sequence[str], split: str
) -> Split:
    paths = []
    for kind, ndim in (("images", 3), ("labels", 1)):
        # Unpacked by some, the first hyphen of the last part becomes a dot.
        stems = (f"{split}-{kind}-idx{ndim}-ubyte", f"{split}-{kind}.idx{ndim}-ubyte")
        names = [f"{folder}{stem}{end}" for folder in (*folders, "") for stem in stems
                 for end in ("", ".gz")]  # fmt: skip
        path = _first(directory, names)
        if path is None:
            layouts = f"{npz[0]}, or {stems[0]} (also .gz) there or in {', '.join(folders)}"
            raise _absent(title, directory, layouts)
        paths.append(path)
    images, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
    return checked(paths[0], images, labels, 10)


# -------------------------------------------------------------------------------------- CIFAR


_Layout = tuple[str, Callable[[Path], list[str]], str, Callable[[Path], tuple[Any, Any]]]


def _cifar(title: str, classes: int, layouts: Sequence[_Layout]) -> Reader:
    """Return the reader of CIFAR-10 or CIFAR-100.

    A layout is a folder, the names of its training files and of its test file, and how to read one.
    """

    def read(directory: Path, data: Data) -> tuple[Split, Split, int]:
        for folder, training, test, load in layouts:
            for place in (directory / folder, directory):
                names = training(place)
                if names and _first(place, (*names, test)):
                    paths = [_there(place / name) for name in (*names, test)]
                    parts = [checked(path, *load(path), classes) for path in paths]
                    return _joined(paths[:-1], parts[:-1]), parts[-1], classes
        folders = ", ".join(folder for folder, *_ in layouts)
        raise _absent(title, directory, f"its files there or in {folders}")

    return read


def _archives(place: Path) -> list[str]:
    return [f"train_{i}.npz" for i in range(len(list(place.glob("train_*.npz"))))]


def _archive(path: Path) -> tuple[Any, Any]:
    arrays = read_arrays(path, ("images", "labels"))
    images = arrays["images"]
    if images.ndim == 4 and images.shape[-1] == 3:  # channels last
        images = images.transpose(0, 3, 1, 2)
    return images, arrays["labels"]


def _there(path: Path) -> Path:
    if not path.is_file():
        raise format_error(
            f"no file {path}", f"it beside the others of {path.parent}", "download it again"
        )
    return path


def _joined(paths: Sequence[Path], parts: Sequence[Split]) -> Split:
    for path, (x, _) in zip(paths, parts, strict=True):
        if x.shape[1:] != parts[0][0].shape[1:]:
            got = f"holds images of {x.shape[1:]}"
            raise damaged(path, got, f"{parts[0][0].shape[1:]}, as {paths[0].name}")
    return np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])


_BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
_CIFAR10: list[_Layout] = [
    ("cifar10", _archives, "test.npz", _archive),
    ("cifar-10-batches-py", lambda _: _BATCHES, "test_batch",
     partial(read_cifar_pickle, label="labels")),
    ("cifar-10-batches-bin", lambda _: [f"{name}.bin" for name in _BATCHES], "test_batch.bin",
     partial(read_cifar_binary, heads=1)),
]  # fmt: skip
_CIFAR100: list[_Layout] = [
    ("cifar100", _archives, "test.npz", _archive),
    ("cifar-100-python", lambda _: ["train"], "test",
     partial(read_cifar_pickle, label="fine_labels")),
    ("cifar-100-binary", lambda _: ["train.bin"], "test.bin", partial(read_cifar_binary, heads=2)),
]  # fmt: skip


# ------------------------------------------------------------------------------------- folders


def _folder(directory: Path, data: Data) -> tuple[Split, Split, int]:
    """Read a directory per class, in ``train`` and ``test`` (or ``val``), or all in one."""
    tests = [directory / name for name in ("test", "val") if (directory / name).is_dir()]
    if (directory / "train").is_dir() and tests:
        train, names = read_folder(directory / "train", data.size)
        return train, read_folder(tests[0], data.size, names)[0], len(names)
    (x, y), names = read_folder(directory, data.size)
    held = _held_back(y, 0.2 if data.test_share is None else data.test_share)
    return (x[~held], y[~held]), (x[held], y[held]), len(names)


def _held_back(y: NDArray[np.int64], share: float) -> NDArray[np.bool_]:
    """Choose the test images: of every class the same share, and at least one."""
    held, generator = np.zeros(len(y), np.bool_), np.random.default_rng(_SPLIT_SEED)
    for label in range(int(y.max()) + 1):
        places = np.flatnonzero(y == label)
        if len(places) < 2:
            raise format_error(
                "a class of one image", "two or more: for training and for the test", "add some"
            )
        count = min(len(places) - 1, max(1, round(share * len(places))))
        held[generator.permutation(places)[:count]] = True
    return held


DATA_SETS: dict[str, DataSet] = {
    "digits": DataSet(_digits, augments=False, built_in=True, top=16.0),
    "mnist": DataSet(_mnist("MNIST", ("mnist.npz",), ("mnist/", "MNIST/raw/")), augments=False),
    "fashion_mnist": DataSet(
        _mnist(
            "Fashion-MNIST",
            ("fashion_mnist.npz", "fashion-mnist.npz"),
            ("fashion_mnist/", "fashion-mnist/", "FashionMNIST/raw/"),
        )
    ),
    "cifar10": DataSet(_cifar("CIFAR-10", 10, _CIFAR10)),
    "cifar100": DataSet(_cifar("CIFAR-100", 100, _CIFAR100)),
    "folder": DataSet(_folder),
}
"""Every data set that a recipe can name."""
