"""Memory by kind against Table 3 of DSB, and the measure itself."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from spfmt.train import DSB, RigL, workspace  # noqa: E402

R = C = 512
DENSE = R * C * 4


def trained(method: type, steps: int = 1):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(C, R))
    optimizer = torch.optim.Adam(model.parameters())
    trainer = method(model, optimizer, density=0.1, format="shuffled_block", delta_t=2, t_end=100)
    assert trainer.memory().gradients == 0
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, C)).square().mean().backward()
        optimizer.step()
        if step < steps - 1:
            trainer.step()
    return trainer


def test_what_training_holds_is_nd_of_each_kind():
    trainer = trained(DSB)
    memory, nnz = trainer.memory(), trainer.layers["0"].nnz
    assert nnz == pytest.approx(0.1 * R * C, rel=0.01)
    assert (memory.weights, memory.gradients, memory.dense) == (4 * nnz, 4 * nnz, DENSE)
    assert memory.optimizer_state == 8 * nnz + 4  # two moments, and a count of steps
    assert memory.structure < nnz  # a block of 16 x 16 has 16 columns
    assert "weights 0.10 MiB (0.101)" in str(memory)


def test_an_update_of_dsb_takes_no_gradient_of_all_weights_and_one_of_rigl_does():
    """Table 3, "Model adaptation": N·d gradients and N."""
    taken = {}
    for method in (DSB, RigL):
        trainer = trained(method, 4)
        trainer.update()  # caches are filled
        taken[method] = workspace(trainer.step)
        assert trainer.updates == 3
    nnz = trainer.layers["0"].nnz
    assert taken[RigL][0] >= DENSE
    assert taken[DSB][0] < 20 * nnz < DENSE  # int64 sources, and the values that move
    assert taken[DSB][1] < 3 * R * C + 80 * nnz  # a mask, column sums of groups
    assert taken[RigL][1] > DENSE  # scores


def test_the_peak_is_that_of_what_lives_at_a_time():
    def one_after_the_other():
        for _ in range(3):
            torch.ones(250_000).sum()
            np.ones(125_000).sum()

    tracing = tracemalloc.is_tracing()
    torch_bytes, numpy_bytes = workspace(one_after_the_other)
    assert 1_000_000 <= torch_bytes < 1_010_000
    assert 1_000_000 <= numpy_bytes < 1_100_000
    assert tracemalloc.is_tracing() is tracing
    with pytest.raises(ZeroDivisionError):
        workspace(lambda: 1 / 0)
    assert tracemalloc.is_tracing() is tracing


def test_the_summary_tells_what_is_stored_and_zero():
    trainer = trained(DSB, 2)
    (row,) = trainer.summary()
    assert row.fill == 1.0
    trainer.update()
    (row,) = trainer.summary()
    values = trainer.layers["0"].tensor().values
    assert row.fill == (values != 0).mean() < 1.0
