"""The benchmark of convolutions: float64 checks, contenders, figures, ``spfmt bench --conv``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spfmt
from spfmt.bench import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    CONVOLUTIONS,
    LAYER,
    Case,
    ImageGeometry,
    Session,
    WrongResult,
    parse_spec,
    random_weight,
)
from spfmt.bench.conv import ImageSetting, ours
from spfmt.bench.exact import convolution
from spfmt.bench.record import layer_name, make_record, read_record, write_record
from spfmt.bench.work import image_work
from spfmt.cli import main
from spfmt.formats import FORMATS

SHAPE = (16, 8, 3, 3)
GEOMETRY = ImageGeometry((6, 5), 1, 1)
ALL = [parse_spec(name) for name in FORMATS]


# ------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("images", [3, 20])
@pytest.mark.parametrize("strip", [1 << 23, 100])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "groups"),
    [((3, 3), 1, 1, 1), ((3, 3), 2, 1, 2), ((1, 1), 2, 0, 1), ((2, 3), 1, 2, 4)],
)
def test_float64_products(
    kernel: tuple[int, int],
    stride: int,
    padding: int,
    groups: int,
    strip: int,
    images: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They agree with the reference, of many images at both ends."""
    monkeypatch.setattr("spfmt.bench.exact._STRIP_CELLS", strip)
    a = random_weight(parse_spec("csr"), (8, 8, *kernel), 0.3)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((images, 8 * groups, 7, 6), dtype="float32")
    options: dict[str, Any] = {"stride": stride, "padding": padding, "groups": groups}
    y = spfmt.conv2d(a, x, **options, backend="reference")
    dy = rng.standard_normal(y.shape, dtype="float32")
    wanted = {
        "conv2d": y,
        "conv2d_input": spfmt.conv2d_input(a, dy, (7, 6), **options, backend="reference"),
        "conv2d_weight": spfmt.conv2d_weight(a, dy, x, **options, backend="reference"),
    }
    for op, want in wanted.items():
        exact = convolution(op, a, x, dy, stride, padding, groups)
        exact.require(op, want.reshape(-1) if op == "conv2d_weight" else want)
        wrong = want.astype("float64").reshape((-1,) if op == "conv2d_weight" else want.shape)
        wrong[(-1,) * wrong.ndim] += 2 * exact.bound.max() + 1e-9
        with pytest.raises(WrongResult, match="1 of"):
            exact.require(op, wrong)
        with pytest.raises(WrongResult, match="shape"):
            exact.require(op, wrong[1:])


def test_gradients_of_dense_weights_have_their_shape() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 4, 3, 3), dtype="float32")
    dy = rng.standard_normal((2, 6, 3, 3), dtype="float32")
    w = rng.standard_normal((6, 4, 1, 1), dtype="float32")
    exact = convolution("conv2d_weight", w, x, dy, 1, 0, 1)
    want = np.einsum("nrhw,nchw->rc", dy.astype("float64"), x)
    np.testing.assert_allclose(exact.value, want[:, :, None, None])


# -------------------------------------------------------------------------------- contenders


def test_work_of_a_convolution_by_hand() -> None:
    a = spfmt.CSR.from_dense(np.ones((4, 2, 3, 3), "float32"))
    assert image_work(a, pixels=10, cells=50).flops == 2 * 72 * 10
    assert image_work(a, pixels=10, cells=50).nbytes == 4 * (72 + 50) + 72
    assert image_work(a.to_dense(), pixels=10, cells=50).nbytes == 4 * (72 + 50)


def test_cases_say_what_they_are() -> None:
    case = Case(SHAPE, 0.1, 4, op="conv2d", geometry=ImageGeometry((8, 6), 2, 1, 2))
    assert str(case) == "16 -> 16, 3x3, 8x6 maps, stride 2, 2 groups, conv2d, batch 4, 1 thread"


@pytest.mark.parametrize("op", CONVOLUTIONS)
def test_every_format_and_layout_is_measured(op: str) -> None:
    pytest.importorskip("torch")
    session = Session(0.0)
    case = Case(SHAPE, 0.25, 3, op=op, geometry=GEOMETRY)
    rows = session.measure(case, ALL, layouts=(CHANNELS_FIRST, CHANNELS_LAST))
    sparse = [row for row in rows if row.kind == "sparse"]
    assert {(row.name.split()[0], row.layout) for row in sparse} == {
        (name, layout) for name in FORMATS for layout in (CHANNELS_FIRST, CHANNELS_LAST)
    }
    dense = [row for row in rows if row.kind == "dense"]
    assert {row.layout for row in dense if row.name.startswith("torch")} == {"NCHW", "NHWC"}
    best = min(row.us for row in dense)
    passes = 3 if op == LAYER else 1
    for row in rows:
        assert row.speedup == pytest.approx(best / row.us)
        flops = passes * 2 * row.density * 16 * 72 * 3 * 30
        assert row.gflops * row.us * 1e3 == pytest.approx(flops)


def test_strides_and_groups_are_measured() -> None:
    pytest.importorskip("torch")
    session = Session(0.0)
    geometry = ImageGeometry((7, 7), 2, 1, 2)
    for op in CONVOLUTIONS:
        rows = session.measure(Case(SHAPE, 0.25, 2, op=op, geometry=geometry), ALL[:2])
        assert {row.geometry for row in rows} == {geometry}
        assert {row.layout for row in rows if row.kind == "sparse"} == {CHANNELS_FIRST}


def test_wrong_convolutions_are_not_timed() -> None:
    def broken(setting: Any) -> list[Any]:
        from dataclasses import replace

        good = ours(setting, random_weight(ALL[0], SHAPE, 0.25))
        return [replace(good, name="broken", call=lambda: good.call() + np.float32(0.01))]

    session = Session(0.0)
    case = Case(SHAPE, 0.25, 2, op="conv2d", geometry=GEOMETRY)
    with pytest.raises(WrongResult, match="broken, NCHW"):
        session.measure(case, extra=broken)
    assert session.rows == []


def test_results_of_one_weight_are_kept_until_the_next() -> None:
    setting = ImageSetting(Case(SHAPE, 0.25, 2, op="conv2d", geometry=GEOMETRY))
    a, b = (random_weight(ALL[0], SHAPE, 0.25, seed) for seed in (0, 1))
    first = setting.exact(a)
    assert setting.exact(a) is first
    setting.exact(b)
    assert setting.exact(a) is not first


def test_only_some_cases() -> None:
    session = Session(0.0, only="batch 2,")
    cases = [Case(SHAPE, 0.25, batch, op="conv2d", geometry=GEOMETRY) for batch in (1, 2)]
    rows = session.measure(cases, ALL[:1], dense=False)
    assert [row.batch for row in rows] == [2]
    assert session.measure(cases[0], ALL[:1]) == []


# ------------------------------------------------------------------- records, figures, command


def test_command_measures_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    path = tmp_path / "out.json"
    code = main([
        "bench", "--conv", "8x8x3x3,8x4x1x1", "--map", "6x5", "--stride", "2", "--format", "csr",
        "--sparsity", "0.5,0.75", "--batch", "2", "--op", "conv2d,layer", "--layout", "both",
        "--seconds", "0", "--json", str(path), "--figures", str(tmp_path / "figures"),
    ])  # fmt: skip
    assert code == 0
    rows = read_record(path)["results"]
    sparse = [r for r in rows if r["kind"] == "sparse"]
    assert {tuple(r["shape"]) for r in sparse} == {(8, 8, 3, 3), (8, 4, 1, 1)}
    assert {r["geometry"]["padding"] for r in sparse if r["shape"][2] == 3} == {1}
    assert {r["geometry"]["padding"] for r in sparse if r["shape"][2] == 1} == {0}
    assert {r["op"] for r in sparse} == {"conv2d", LAYER}
    assert {layer_name(r) for r in rows} == {
        "8 → 8, 3x3, 6x5, stride 2",
        "4 → 8, 1x1, 6x5, stride 2",
    }
    names = {p.name for p in (tmp_path / "figures").iterdir()}
    assert names == {"sparsity-8x8x3x3-6x5x2x1x1.png", "sparsity-8x4x1x1-6x5x2x0x1.png"}
    assert "8 -> 8, 3x3, 6x5 maps, stride 2, conv2d, batch 2, 1 thread" in capsys.readouterr().out


def test_figures_of_layers_and_blocks(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from spfmt.bench.figures import draw_blocks, draw_layers, save

    session = Session(0.0)
    for density in (0.5, 0.25):
        case = Case(SHAPE, density, 2, op="conv2d", geometry=GEOMETRY)
        session.measure(case, [parse_spec(f"shuffled_block:{n}x{n}") for n in (4, 8)])
    path = tmp_path / "record.json"
    write_record(make_record(session), path)
    rows = read_record(path)["results"]
    blocks = draw_blocks(rows, "here")
    assert [axes.get_title(loc="left") for axes in blocks.axes] == ["conv2d, batch 2"]
    labels = {line.get_label() for line in blocks.axes[0].lines}
    assert {"blocks of 4x4", "blocks of 8x8"} <= labels
    layers = draw_layers(rows, "here")
    assert len(layers.axes[0].patches) == 4
    assert save(layers, tmp_path / "layers").read_bytes().startswith(b"\x89PNG")
