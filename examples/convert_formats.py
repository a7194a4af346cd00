"""One pruned weight in every format: what each can hold, what it costs, and that products agree."""

import tempfile
from pathlib import Path

import numpy as np

import spfmt

rng = np.random.default_rng(0)
weight = rng.standard_normal((256, 512)).astype("float32")
x = rng.standard_normal((512, 32)).astype("float32")

# Prune to 3 of every 32 columns: the format searches the best legal structure, exactly.
nm = spfmt.NM.from_scores(np.abs(weight), n=3, m=32, values=weight)
pruned = nm.to_dense()
print(f"start: {nm!r}")

# A conversion is exact, or adds stored zeros and reports them, or raises. It never drops a value.
for name in ("csr", "condensed", "scipy_csr", "torch_csr", "dense"):
    other, report = spfmt.convert(nm, name, return_report=True)
    assert np.array_equal(spfmt.convert(other, "dense"), pruned)
    print(f"to {name}: exact, {report.padding} zeros added")

# Random columns make no good blocks. The error names the worst place and the way out …
try:
    spfmt.convert(nm, "shuffled_block", block_shape=(16, 16))
except spfmt.FormatError as error:
    print(f"to shuffled_block: refused. {error}")

# … which is to choose another structure: the best blocks that the density allows.
blocks = spfmt.ShuffledBlock.from_scores(np.abs(weight), 0.1, block_shape=(16, 16), values=weight)
kept = np.abs(blocks.to_dense()).sum() / np.abs(weight).sum()
print(f"projected: {blocks!r} keeps {100 * kept:.0f} % of the weight's magnitude")

# Files are checked when they are read, and written whole or not at all.
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "weight.safetensors"
    blocks.save(path)
    assert spfmt.load(path) == blocks
    print(f"file: {path.stat().st_size} bytes instead of {weight.nbytes}")

# The three products of a layer: its output, the gradients of its input and of its values.
y = blocks @ x
dx = blocks.T @ y
dvalues = spfmt.sddmm(blocks, y, x)
np.testing.assert_allclose(y, blocks.to_dense() @ x, rtol=1e-4, atol=1e-4)
np.testing.assert_allclose(dx, blocks.to_dense().T @ y, rtol=1e-4, atol=1e-3)
print(f"products: {y.shape}, {dx.shape}, and a gradient of the values' shape {dvalues.shape}")
