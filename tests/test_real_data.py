"""Real patterns and trained weights; they are not part of the project (see CONTRIBUTING.md)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import spfmt

DATA = os.environ.get("SPFMT_DATA", "")


def archive(name: str) -> dict[str, np.ndarray]:
    """Arrays of an .npz file of the data directory, or skip."""
    if not DATA:
        pytest.skip("SPFMT_DATA names no directory with real data")
    path = Path(DATA) / name
    if not path.exists():
        pytest.skip(f"SPFMT_DATA has no {name}")
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def patterns(name: str, every: int) -> Iterator[tuple[str, spfmt.CSR]]:
    """Every n-th pattern of a Deep Learning Matrix Collection archive, with random values."""
    arrays = archive(name)
    names = sorted({key.rpartition("/")[0] for key in arrays})
    for layer in names[::every]:
        indices = arrays[f"{layer}/indices"]
        values = np.random.default_rng(0).standard_normal(indices.size).astype("float32")
        yield (
            layer,
            spfmt.CSR(arrays[f"{layer}/shape"], arrays[f"{layer}/indptr"], indices, values),
        )


@pytest.mark.parametrize(
    "name", ["dlmc_rn50_magnitude_0.90.npz", "dlmc_transformer_magnitude_0.95.npz"]
)
def test_products_on_pruned_networks(name: str) -> None:
    rng = np.random.default_rng(1)
    for layer, a in patterns(name, every=12):
        rows, cols = a.matrix_shape
        for batch in (1, 33):
            x = rng.standard_normal((batch, cols)).astype("float32")
            dy = rng.standard_normal((batch, rows)).astype("float32")
            for product, right in ((spfmt.spmm, x), (spfmt.spmm_t, dy)):
                got = product(a, right, batch_first=True)
                want = product(a, right, batch_first=True, backend="reference")
                np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3, err_msg=layer)
            got = spfmt.sddmm(a, dy, x, batch_first=True)
            want = spfmt.sddmm(a, dy, x, batch_first=True, backend="reference")
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3, err_msg=layer)


def test_pruned_networks_project_to_every_format() -> None:
    for layer, a in patterns("dlmc_transformer_magnitude_0.95.npz", every=40):
        scores = np.abs(a.to_dense())
        for cls in (spfmt.Condensed, spfmt.NM, spfmt.ShuffledBlock, spfmt.HRBP, spfmt.CSR):
            options = {"method": "fast"} if cls in (spfmt.ShuffledBlock, spfmt.HRBP) else {}
            b = cls.from_scores(scores, a.density, values=a.to_dense(), **options)
            b.validate()
            kept = np.abs(b.to_dense()).sum() / scores.sum()
            assert kept > a.density, (layer, cls)  # better than keeping positions at random
            assert abs(b.density - a.density) < 0.02, (layer, cls)


def test_trained_convolutions_become_hrbp_and_nm() -> None:
    for name, weight in archive("cifar10_resnet20_weights.npz").items():
        if weight.ndim != 4 or weight.shape[0] < 16 or weight.shape[1] < 16:
            continue
        hrbp = spfmt.HRBP.from_scores(np.abs(weight), 0.25, values=weight)
        hrbp.validate()
        assert abs(hrbp.density - 0.25) < 0.06, name
        np.testing.assert_array_equal(hrbp.to_dense(), np.where(hrbp.mask(), weight, 0))
        nm = spfmt.NM.from_scores(np.abs(weight), n=2, m=4, values=weight)
        kept = nm.mask().transpose(0, 2, 3, 1).reshape(-1, 4).sum(1)  # groups run along C_in
        assert (kept == 2).all(), name
        assert spfmt.convert(nm, "csr").density == 0.5
