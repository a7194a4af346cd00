"""Take over a model that was pruned elsewhere: its zeros stay, nothing else changes."""

import torch
from torch import nn
from torch.nn.utils import prune

from spfmt.torch import densify, sparsify

torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(128, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
).eval()

# Stands for a pretrained, pruned checkpoint: torch's own pruning, made permanent.
for layer in (model[0], model[2]):
    prune.l1_unstructured(layer, "weight", amount=0.9)
    prune.remove(layer, "weight")

x = torch.randn(32, 128)
before = model(x)

# CSR holds any pattern. Coarser formats take only what they can hold exactly or with few padding
# zeros; layers that they cannot hold are left, and the report says why.
report = sparsify(model, "csr", density="keep")
print(report)
print("left:", {layer.name: layer.reason for layer in report.left})

torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
print("same outputs; state_dict:", {k: tuple(v.shape) for k, v in model.state_dict().items()})

densify(model)  # and back, for tools that know nn.Linear only
torch.testing.assert_close(model(x), before)
