"""Image data sets in every layout of their files, on tiny generated ones; damaged files."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from spfmt.errors import FormatError, MissingDependency

pytest.importorskip("torch")

import torch

from spfmt.recipes.batches import Batches, augment, held_back
from spfmt.recipes.data import DATA_SETS, Images, load_images
from spfmt.recipes.tables import Data

Array = NDArray[Any]
RNG = np.random.default_rng(0)
X, Y = RNG.integers(0, 256, (7, 28, 28), np.uint8), np.arange(7, dtype=np.uint8)
X_TEST, Y_TEST = RNG.integers(0, 256, (3, 28, 28), np.uint8), np.arange(3, dtype=np.uint8)


def read(name: str, folder: Path, **options: Any) -> Images:
    return load_images(Data(name, dir=str(folder), **options))


# -------------------------------------------------------------------------------------- digits


def test_digits_are_built_in() -> None:
    pytest.importorskip("sklearn")
    found = load_images(Data("digits"))
    assert found.x.shape == (1437, 1, 8, 8)
    assert found.x_test.shape == (360, 1, 8, 8)
    assert (found.x.max(), found.top, found.classes) == (16, 16.0, 10)
    np.testing.assert_allclose(found.mean, [(found.x / 16).mean()], rtol=1e-6)
    np.testing.assert_allclose(found.std, [(found.x / 16).std()], rtol=1e-6)
    assert found.checksum() == load_images(Data("digits")).checksum()  # one split for all runs
    per_class = np.bincount(found.y_test)
    assert per_class.min() >= 34
    assert per_class.max() <= 37


# --------------------------------------------------------------------------------------- MNIST


def idx(array: Array) -> bytes:
    """The bytes of an idx file."""
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return head + array.tobytes()


def write_idx(folder: Path, *, gz: bool = False, dots: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, x, y in (("train", X, Y), ("t10k", X_TEST, Y_TEST)):
        for kind, array in (("images", x), ("labels", y)):
            hyphen = "." if dots else "-"
            path = folder / f"{split}-{kind}{hyphen}idx{array.ndim}-ubyte{'.gz' if gz else ''}"
            path.write_bytes(gzip.compress(idx(array)) if gz else idx(array))


MNIST_LAYOUTS: dict[str, Callable[[Path], None]] = {
    "idx": write_idx,
    "gz": lambda folder: write_idx(folder, gz=True),
    "dots": lambda folder: write_idx(folder, dots=True),
    "npz": lambda folder: np.savez(
        folder / "NAME.npz", x_train=X, y_train=Y, x_test=X_TEST, y_test=Y_TEST
    ),
}


@pytest.mark.parametrize("layout", MNIST_LAYOUTS)
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_mnist_in_every_layout(name: str, layout: str, tmp_path: Path) -> None:
    MNIST_LAYOUTS[layout](tmp_path)
    if layout == "npz":
        (tmp_path / "NAME.npz").rename(tmp_path / f"{name}.npz")
    found = read(name, tmp_path)
    np.testing.assert_array_equal(found.x, X[:, None])
    np.testing.assert_array_equal(found.y, Y)
    np.testing.assert_array_equal(found.x_test, X_TEST[:, None])
    np.testing.assert_array_equal(found.y_test, Y_TEST)
    assert found.classes == 10
    assert found.shape == (1, 28, 28)
    Batches(found, 4, seed=0, augmented=False)  # torch warns of arrays that it must not write


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")]
)
def test_folders_of_torchvision_are_found(name: str, folder: str, tmp_path: Path) -> None:
    write_idx(tmp_path / folder / "raw", gz=True)
    assert read(name, tmp_path).x.shape == (7, 1, 28, 28)


def test_directory_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_idx(tmp_path)
    monkeypatch.setenv("SPFMT_DATA", str(tmp_path))
    assert len(load_images(Data("mnist")).x) == 7
    monkeypatch.setenv("SPFMT_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(FormatError, match=r"elsewhere; expected a directory that exists"):
        load_images(Data("mnist"))
    assert len(read("mnist", tmp_path).x) == 7  # what the recipe says comes first
    monkeypatch.delenv("SPFMT_DATA")
    with pytest.raises(FormatError, match=r"the data set mnist without a directory.*--data DIR"):
        load_images(Data("mnist"))


# --------------------------------------------------------------------------------------- CIFAR


def cifar(n: int, classes: int) -> tuple[Array, Array]:
    return RNG.integers(0, 256, (n, 3, 32, 32), np.uint8), RNG.integers(0, classes, n)


def write_cifar10_npz(folder: Path, batches: list[tuple[Array, Array]]) -> None:
    (folder / "cifar10").mkdir()
    names = [*(f"train_{i}" for i in range(len(batches) - 1)), "test"]
    for name, (x, y) in zip(names, batches, strict=True):
        images, labels = x.transpose(0, 2, 3, 1), y.astype(np.uint8)
        np.savez(folder / "cifar10" / f"{name}.npz", images=images, labels=labels)


def write_cifar10_pickles(folder: Path, batches: list[tuple[Array, Array]]) -> None:
    (folder / "cifar-10-batches-py").mkdir()
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name, (x, y) in zip(names, batches, strict=True):
        content = {b"data": x.reshape(-1, 3072), b"labels": y.tolist(), b"batch_label": b"a"}
        (folder / "cifar-10-batches-py" / name).write_bytes(old_pickle(content))


def write_cifar10_binary(folder: Path, batches: list[tuple[Array, Array]]) -> None:
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    for name, (x, y) in zip(names, batches, strict=True):  # the directory itself
        records = np.concatenate([y[:, None].astype(np.uint8), x.reshape(-1, 3072)], 1)
        (folder / name).write_bytes(records.tobytes())


class _OldPickler(pickle._Pickler):  # type: ignore[name-defined, misc]
    """Writes bytes as Python 2 wrote its texts."""

    def _text(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch: ClassVar[dict[type, Any]] = {**pickle._Pickler.dispatch, bytes: _text}  # type: ignore[attr-defined]


def old_pickle(content: dict[bytes, Any]) -> bytes:
    """Pickle as Python 2 and an old numpy did."""
    file = io.BytesIO()
    _OldPickler(file, protocol=2).dump(content)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


@pytest.mark.parametrize("write", [write_cifar10_npz, write_cifar10_pickles, write_cifar10_binary])
def test_cifar10_in_every_layout(write: Callable[..., None], tmp_path: Path) -> None:
    batches = [cifar(3, 10) for _ in range(6)]
    write(tmp_path, batches)
    found = read("cifar10", tmp_path)
    np.testing.assert_array_equal(found.x, np.concatenate([x for x, _ in batches[:5]]))
    np.testing.assert_array_equal(found.y, np.concatenate([y for _, y in batches[:5]]))
    np.testing.assert_array_equal(found.x_test, batches[5][0])
    np.testing.assert_array_equal(found.y_test, batches[5][1])
    np.testing.assert_allclose(found.mean, (found.x / 255).mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(found.std, (found.x / 255).std((0, 2, 3)), rtol=1e-6)


@pytest.mark.parametrize("kind", ["python", "binary"])
def test_cifar100_has_fine_labels(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / f"cifar-100-{kind}"
    folder.mkdir()
    parts = {"train": cifar(4, 100), "test": cifar(2, 100)}
    for name, (x, y) in parts.items():
        flat, coarse = x.reshape(-1, 3072), y // 5
        if kind == "python":
            content = {b"data": flat, b"fine_labels": y.tolist(), b"coarse_labels": coarse.tolist()}
            (folder / name).write_bytes(old_pickle(content))
        else:
            heads = np.stack([coarse, y], 1).astype(np.uint8)
            (folder / f"{name}.bin").write_bytes(np.concatenate([heads, flat], 1).tobytes())
    found = read("cifar100", tmp_path)
    np.testing.assert_array_equal(found.x, parts["train"][0])
    np.testing.assert_array_equal(found.y, parts["train"][1])
    np.testing.assert_array_equal(found.y_test, parts["test"][1])
    assert found.classes == 100


class _Harm:
    """What a hostile pickle asks for."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


def test_pickles_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_cifar10_pickles(tmp_path, [cifar(1, 10) for _ in range(6)])
    path = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(pickle.dumps({"data": _Harm(), "labels": [0]}))
    with pytest.raises(FormatError, match=r"data_batch_2, which cannot be read: .*mkdir"):
        read("cifar10", tmp_path)
    assert not (tmp_path / "harm").exists()


# ------------------------------------------------------------------------------ damaged files


def damage_idx(folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    write_idx(folder, gz=name.endswith(".gz"))
    (folder / name).write_bytes(change((folder / name).read_bytes()))


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (IMAGES, lambda b: b[:100], "has 84 bytes; expected 5488 for 7 x 28 x 28 values"),
        (IMAGES, lambda b: b + b"x", "has more bytes; expected 5488"),
        (IMAGES, lambda b: b[:3], "begins with the bytes 00 00 08; expected 00 00 08 03"),
        (IMAGES, lambda b: b"", "begins with the bytes of nothing"),
        (IMAGES, lambda b: b"<html>" + b, "3c 68 74 6d; expected 00 00 08 03, an idx file of 3"),
        (IMAGES, lambda b: idx(X[:6]), r"holds labels \(7,\) of uint8 for 6 images"),
        (IMAGES, lambda b: idx(X[:0]), "at least one"),
        (LABELS, lambda b: idx(Y + 9), "holds the labels 9 to 15; expected 0 to 9"),
        (IMAGES, lambda b: b[:4] + b"\xff" * 12, "has 0 bytes; expected 792281624"),
        (IMAGES + ".gz", lambda b: b[:-9], "cannot be read"),
        (IMAGES + ".gz", lambda b: b"no gzip", "cannot be read"),
        (IMAGES + ".gz", lambda b: b[:40] + bytes(40) + b[80:], "cannot be read"),
        (IMAGES + ".gz", lambda b: gzip.compress(idx(X) + bytes(10**6)), "has more bytes"),
    ],
)
def test_damaged_idx_files_are_named(
    name: str, change: Callable[[bytes], bytes], said: str, tmp_path: Path
) -> None:
    damage_idx(tmp_path, name, change)
    with pytest.raises(FormatError, match=f"{tmp_path}/train-.*{said}.*fix: download"):
        read("mnist", tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no archive", "mnist.npz, which cannot be read"),
        (b"", "mnist.npz, which cannot be read"),
        (X, "mnist.npz, which is a single array"),
        ({"x_train": X}, "has no y_train, x_test, y_test, but x_train"),
        ({"x_train": X.astype(float), "y_train": Y, "x_test": X, "y_test": Y}, "of float64"),
        ({"x_train": X, "y_train": Y[:5], "x_test": X, "y_test": Y}, "for 7 images"),
        ({"x_train": X[:, 0, 0], "y_train": Y, "x_test": X, "y_test": Y}, "holds images"),
        ({"x_train": X, "y_train": Y, "x_test": X[:, 1:], "y_test": Y}, "one shape"),
        ({"x_train": X, "y_train": Y, "x_test": np.array([{}]), "y_test": Y}, "cannot be read"),
        ({"x_train": np.uint8(3), "y_train": Y, "x_test": X, "y_test": Y}, r"holds images \(\)"),
    ],
)
def test_damaged_npz_files_are_named(content: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mnist.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, np.ndarray):
        with path.open("wb") as file:
            np.save(file, content)
    else:
        np.savez(path, **content)
    with pytest.raises(FormatError, match=said):
        read("mnist", tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|u1', 'fortran_order': False, 'shape': (999999999999999, 28, 28)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999999999999999,)}",
        "{'descr': '|u1'",
    ],
)
def test_headers_that_lie_are_refused(header: str, tmp_path: Path) -> None:
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(100)
    with zipfile.ZipFile(tmp_path / "mnist.npz", "w") as archive:
        archive.writestr("x_train.npy", data)
    with pytest.raises(FormatError, match=r"mnist.npz, which cannot be read"):
        read("mnist", tmp_path)


def test_an_encrypted_npz_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "mnist.npz", x_train=X)
    content = (tmp_path / "mnist.npz").read_bytes()
    for magic, flags in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        at = content.index(magic) + flags
        content = content[:at] + bytes([content[at] | 1]) + content[at + 1 :]
    (tmp_path / "mnist.npz").write_bytes(content)
    with pytest.raises(FormatError, match=r"cannot be read: .*encrypted"):
        read("mnist", tmp_path)


def test_batches_of_other_sizes_are_named(tmp_path: Path) -> None:
    write_cifar10_npz(tmp_path, [cifar(3, 10) for _ in range(4)])
    path = tmp_path / "cifar10" / "train_1.npz"
    np.savez(path, images=np.zeros((3, 16, 16, 3), np.uint8), labels=np.zeros(3, int))
    with pytest.raises(FormatError, match=r"train_1.npz, which holds .*16\); expected \(3, 32, 32"):
        read("cifar10", tmp_path)


def test_truncated_npz_is_named(tmp_path: Path) -> None:
    write_cifar10_npz(tmp_path, [cifar(3, 10) for _ in range(6)])
    path = tmp_path / "cifar10" / "train_3.npz"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(FormatError, match=r"cifar10/train_3.npz, which cannot be read"):
        read("cifar10", tmp_path)
    path.unlink()
    with pytest.raises(FormatError, match=r"no file .*cifar10/train_3.npz"):
        read("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cannot be read"),
        (b"\x80\x04garbage", "cannot be read"),
        (pickle.dumps([1, 2]), "is another pickle; expected 'data'"),
        (pickle.dumps({"data": np.zeros((2, 3), np.uint8), "labels": [0, 0]}), "another pickle"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}), "for 2 images"),
        (pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}), "10 to 10"),
        (pickle.dumps({"data": np.zeros((1, 3072)), "labels": [1]}), "of float64"),
        (pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": ["a"]}), "labels"),
        (pickle.dumps({"data": np.zeros((2, 3072)), "labels": [[1], [1, 2]]}), "cannot be read"),
    ],
)
def test_damaged_pickles_are_named(content: bytes, said: str, tmp_path: Path) -> None:
    write_cifar10_pickles(tmp_path, [cifar(1, 10) for _ in range(6)])
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    with pytest.raises(FormatError, match=f"cifar-10-batches-py/test_batch.*{said}"):
        read("cifar10", tmp_path)


def test_damaged_binary_is_named(tmp_path: Path) -> None:
    write_cifar10_binary(tmp_path, [cifar(2, 10) for _ in range(6)])
    path = tmp_path / "data_batch_4.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"data_batch_4.bin, which has 6145 bytes; expected"):
        read("cifar10", tmp_path)


@pytest.mark.parametrize("name", [n for n, known in DATA_SETS.items() if not known.built_in])
def test_an_empty_directory_says_what_is_looked_for(name: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=f"{tmp_path}.*expected"):
        read(name, tmp_path)


# ------------------------------------------------------------------------------------- folders


def write_images(folder: Path, sizes: dict[str, tuple[int, int]], mode: str = "RGB") -> None:
    image = pytest.importorskip("PIL.Image")
    for path, (height, width) in sizes.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        array = RNG.integers(0, 256, (height, width) if mode == "L" else (height, width, 3))
        image.fromarray(array.astype(np.uint8), mode=None).save(folder / path)


def test_folder_with_test_images(tmp_path: Path) -> None:
    sizes = {f"{split}/{name}/{i}.png": (5, 4) for split in ("train", "val") for name in "ab"
             for i in range(2)}  # fmt: skip
    write_images(tmp_path, sizes)
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    found = read("folder", tmp_path)
    image = pytest.importorskip("PIL.Image")
    want = np.asarray(image.open(tmp_path / "train" / "b" / "1.png")).transpose(2, 0, 1)
    assert found.shape == (3, 5, 4)
    np.testing.assert_array_equal(found.x[3], want)
    np.testing.assert_array_equal(found.y, [0, 0, 1, 1])
    np.testing.assert_array_equal(found.y_test, [0, 0, 1, 1])
    assert found.classes == 2


def test_folder_holds_images_back(tmp_path: Path) -> None:
    write_images(tmp_path, {f"{name}/{i}.png": (6, 6) for name in "abc" for i in range(10)}, "L")
    found = read("folder", tmp_path, test_share=0.3)
    assert found.shape == (1, 6, 6)  # all are grey
    np.testing.assert_array_equal(np.bincount(found.y), [7, 7, 7])
    np.testing.assert_array_equal(np.bincount(found.y_test), [3, 3, 3])
    every = np.concatenate([found.x, found.x_test]).reshape(30, -1)
    assert len(np.unique(every, axis=0)) == 30  # none twice
    assert read("folder", tmp_path, test_share=0.3).checksum() == found.checksum()


def test_folder_scales_images(tmp_path: Path) -> None:
    write_images(
        tmp_path, {"a/1.png": (6, 6), "a/2.jpg": (9, 7), "b/1.bmp": (6, 6), "b/2.png": (3, 3)}
    )
    assert read("folder", tmp_path, size=8).shape == (3, 8, 8)
    with pytest.raises(FormatError, match=r"a/2.jpg of 9 x 7 pixels; expected 6 x 6.*data.size"):
        read("folder", tmp_path)


def test_folder_names_what_is_wrong(tmp_path: Path) -> None:
    write_images(tmp_path, {"a/1.png": (6, 6), "a/2.png": (6, 6), "b/1.png": (6, 6)})
    with pytest.raises(FormatError, match="a class of one image"):
        read("folder", tmp_path)
    whole = (tmp_path / "a" / "2.png").read_bytes()
    (tmp_path / "a" / "2.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError, match=r"a/2.png, which cannot be read"):
        read("folder", tmp_path)
    (tmp_path / "b" / "1.png").unlink()
    with pytest.raises(FormatError, match="/b without images"):
        read("folder", tmp_path)
    (tmp_path / "b").rmdir()
    with pytest.raises(FormatError, match="the directories a; expected one for each of two"):
        read("folder", tmp_path)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_images_of_more_than_eight_bits_are_refused(dtype: Any, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    write_images(tmp_path, {"a/1.png": (6, 6), "b/1.png": (6, 6)}, "L")
    image.fromarray(np.full((6, 6), 7, dtype)).save(tmp_path / "b" / "2.tif")
    with pytest.raises(FormatError, match=r"2.tif, which has pixels of mode [IF]"):
        read("folder", tmp_path)


def test_folder_of_other_classes_in_the_test(tmp_path: Path) -> None:
    write_images(
        tmp_path, {"train/a/1.png": (6, 6), "train/b/1.png": (6, 6), "test/a/1.png": (6, 6)}
    )
    with pytest.raises(FormatError, match=r"test, which has the directories a; expected .*a, b"):
        read("folder", tmp_path)


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, {"a/1.png": (6, 6), "b/1.png": (6, 6)})
    for module, name, said in (("PIL", "folder", "pip install pillow"),
                               ("sklearn", "digits", "pip install 'spfmt")):  # fmt: skip
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingDependency, match=f"no module {module}.*{said}"):
            load_images(Data(name, dir=str(tmp_path)))


def test_moments_can_be_given(tmp_path: Path) -> None:
    write_idx(tmp_path)
    found = read("mnist", tmp_path, mean=(0.5,), std=(0.25,))
    assert (found.mean.tolist(), found.std.tolist()) == ([0.5], [0.25])
    with pytest.raises(FormatError, match="one for each of 1 channels"):
        read("mnist", tmp_path, mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0))


# ------------------------------------------------------------------------------------- batches


def images(n: int = 10, size: int = 6) -> Images:
    x = RNG.integers(0, 256, (n, 2, size, size), np.uint8)
    y, mean = np.arange(n, dtype=np.int64), np.zeros(2, np.float32)
    return Images(x, y, x[:3], y[:3], n, 255.0, mean, np.ones(2, np.float32))


def test_every_epoch_is_a_permutation() -> None:
    batches = Batches(images(), 4, seed=0, augmented=False)
    epochs = []
    for epoch in range(3):
        taken = [batches.take() for _ in range(batches.per_epoch)]
        assert [len(y) for _, y in taken] == [4, 4, 2]
        assert (batches.epoch, batches.position) == (epoch + 1, 0)
        epochs.append(torch.cat([y for _, y in taken]).tolist())
        assert sorted(epochs[-1]) == list(range(10))
    assert epochs[0] != epochs[1] != epochs[2]


def test_pixels_are_scaled() -> None:
    data = images()
    data = Images(**{**vars(data), "mean": np.float32([0.5, 0.25]), "std": np.float32([2, 4])})
    x, y = Batches(data, 10, seed=0, augmented=False).take()
    want = (data.x[y] / 255 - [[[0.5]], [[0.25]]]) / [[[2]], [[4]]]
    np.testing.assert_allclose(x.numpy(), want, rtol=1e-5, atol=1e-6)
    parts = list(held_back(data, 2))
    assert [len(y) for _, y in parts] == [2, 1]
    want = (data.x_test / 255 - [[[0.5]], [[0.25]]]) / [[[2]], [[4]]]
    np.testing.assert_allclose(torch.cat([x for x, _ in parts]), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("after", range(8))
def test_order_and_augmentation_go_on(after: int) -> None:
    data = images()
    whole, stopped = (Batches(data, 4, seed=5, augmented=True) for _ in range(2))
    for _ in range(after):
        whole.take()
        stopped.take()
    resumed = Batches(data, 4, seed=6, augmented=True)
    resumed.load_state_dict(stopped.state_dict())
    for _ in range(7):
        for a, b in zip(whole.take(), resumed.take(), strict=True):
            assert torch.equal(a, b)
    assert whole.epoch == resumed.epoch


def crops(image: Array) -> list[bytes]:
    """All 81 crops of a padded image, and their mirror images, from the definition."""
    channels, height, width = image.shape
    padded = np.zeros((channels, height + 8, width + 8), np.uint8)
    padded[:, 4:-4, 4:-4] = image
    found = []
    for top in range(9):
        for left in range(9):
            crop = padded[:, top : top + height, left : left + width]
            found += [crop.tobytes(), crop[:, :, ::-1].tobytes()]
    return found


def test_augmentation_crops_and_mirrors() -> None:
    n = 400
    image = RNG.integers(1, 256, (3, 6, 5), np.uint8)
    x = torch.from_numpy(image).expand(n, 3, 6, 5)
    known = {crop: i for i, crop in enumerate(crops(image))}
    seen = [known[crop.numpy().tobytes()] for crop in augment(x, torch.Generator().manual_seed(0))]
    assert len(set(seen)) > 120  # of 162 in 400 draws
    assert 0.4 < np.mean(np.array(seen) % 2) < 0.6


# ----------------------------------------------------------------------------------- real data


def real(name: str) -> Images:
    if not os.environ.get("SPFMT_DATA"):
        pytest.skip("SPFMT_DATA names no directory with real data")
    try:
        return load_images(Data(name))
    except FormatError as error:
        if "got no " not in str(error):
            raise
        pytest.skip(f"SPFMT_DATA has no {name}")


def test_real_mnist() -> None:
    found = real("mnist")
    assert (found.x.shape, found.x_test.shape) == ((60000, 1, 28, 28), (10000, 1, 28, 28))
    np.testing.assert_allclose([found.mean[0], found.std[0]], [0.1307, 0.3081], atol=1e-4)
    assert found.y[:5].tolist() == [5, 0, 4, 1, 9]


def test_real_cifar10() -> None:
    found = real("cifar10")
    assert (found.x.shape, found.x_test.shape) == ((50000, 3, 32, 32), (10000, 3, 32, 32))
    np.testing.assert_allclose(found.mean, [0.4914, 0.4822, 0.4465], atol=1e-4)
    np.testing.assert_allclose(found.std, [0.2470, 0.2435, 0.2616], atol=1e-4)
    assert found.y[:5].tolist() == [6, 9, 9, 4, 1]
