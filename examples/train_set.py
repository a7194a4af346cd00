"""Train a sparse network in plain torch: SparseLinear layers, and SET moving their weights."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from spfmt.torch import SparseLinear, decay_groups
from spfmt.train import SET

torch.manual_seed(0)
x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
x, y = x.float() / 16, y.long()
order = torch.randperm(len(x))
train, test = order[:1500], order[1500:]

# A sparse layer is an ordinary module: `values` is a Parameter, the structure is a buffer.
model = nn.Sequential(
    nn.Linear(64, 512),
    nn.ReLU(),
    SparseLinear(512, 512, format="shuffled_block", density=0.1, block_shape=(16, 16)),
    nn.ReLU(),
    nn.Linear(512, 10),
)
print(model)

epochs, batch_size = 12, 50
steps = epochs * len(train) // batch_size
optimizer = torch.optim.AdamW(decay_groups(model, 0.01), lr=2e-3)  # sparse values are weights
method = SET(model, optimizer, total_steps=steps, delta_t=20)

for epoch in range(epochs):
    for batch in torch.split(train[torch.randperm(len(train))], batch_size):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        method.step()  # every delta_t steps: drop the smallest weights, grow others
    with torch.no_grad():
        accuracy = (model(x[test]).argmax(1) == y[test]).float().mean()
    print(f"epoch {epoch + 1:2}: loss {loss:.3f}, test accuracy {100 * accuracy:.1f} %")

print(method.summary())
assert accuracy > 0.9
