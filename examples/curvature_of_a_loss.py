"""
Which weights does a loss need?
===============================

Which weights of a trained network can be set to zero with the least harm? The curvature of the loss
tells. This script takes the Gauss-Newton diagonal over a data set, and prunes a classifier of
handwritten digits by it.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import hessdiag

plt.style.use("tableau-colorblind10")

# %%
# A classifier
# ------------

images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
images, labels = (images / 16).float(), labels.long()
train, test = slice(0, 1200), slice(1200, None)

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
criterion = torch.nn.CrossEntropyLoss()
optimiser = torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=1e-4)
for _ in range(300):
    optimiser.zero_grad()
    criterion(model(images[train]), labels[train]).backward()
    optimiser.step()


def accuracy(parameters: dict[str, torch.Tensor]) -> float:
    """Return the share of the test images that the model classifies right with these parameters."""
    outputs = torch.func.functional_call(model, parameters, (images[test],))
    return float((outputs.argmax(dim=1) == labels[test]).float().mean())


weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
print(f"{sum(w.numel() for w in weights.values())} parameters, accuracy {accuracy(weights):.1%}")

# %%
# The curvature over a data set
# -----------------------------
# ``gauss_newton_over_data`` takes a module, a loss and a ``DataLoader``. For a cross entropy the
# Gauss-Newton matrix is the Fisher matrix, so its diagonal is never negative. By default it is
# exact: one backward pass of each batch for each of the ten outputs. With ``max_probes`` it is
# estimated from fewer passes.

loader = DataLoader(TensorDataset(images[train], labels[train]), batch_size=200)
exact = hessdiag.gauss_newton_over_data(model, criterion, loader).diagonal
estimated = hessdiag.gauss_newton_over_data(model, criterion, loader, max_probes=2).diagonal
error = torch.cat([(estimated[n] - exact[n]).flatten() for n in exact]).norm()
size = torch.cat([exact[n].flatten() for n in exact]).norm()
print(f"2 backward passes in place of 10: relative error {error / size:.3f}")

# %%
# Pruning
# -------
# Near a minimum, setting the weight w to zero raises the loss by about g w² / 2, where g is its
# entry of the diagonal (LeCun et al., *Optimal Brain Damage*). The weights with the smallest values
# go first. Pruning by size alone assumes that the curvature is the same everywhere.

scores = {
    "curvature, g w²": {n: exact[n] * weights[n] ** 2 for n in weights},
    "size, |w|": {n: weights[n].abs() for n in weights},
    "at random": {n: torch.rand_like(weights[n]) for n in weights},
}
shares = torch.linspace(0, 0.99, 34)
curves = {}
for name, score in scores.items():
    ranked = torch.cat([values.flatten() for values in score.values()]).sort().values
    curves[name] = []
    for share in shares:
        limit = ranked[int(share * (len(ranked) - 1))]
        kept = {n: weights[n] * (score[n] > limit) for n in weights}
        curves[name].append(accuracy(kept))

# %%
# The picture
# -----------

figure, axis = plt.subplots(figsize=(5, 3.5), layout="constrained")
for (name, values), style in zip(curves.items(), ("-", "--", ":"), strict=True):
    axis.plot(shares, values, style, linewidth=2, label=name)
axis.set(xlabel="share of the weights set to zero", ylabel="accuracy on held-out digits")
axis.legend()
figure.savefig("curvature_of_a_loss.png", dpi=150)
print("the picture is curvature_of_a_loss.png")
