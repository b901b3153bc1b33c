"""A plain PyTorch loop on scikit-learn's digits with obsinfra added: the lines marked with (*).

python examples/plain_loop.py            # stop it with Ctrl-C or kill, at any moment
python examples/plain_loop.py            # goes on exactly where it was
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import obsinfra

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)

torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loader = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True)

run = obsinfra.observe(model, optimizer, run="plain-loop", resume="auto")  # (*)
for _ in run.epochs(epochs):  # (*)
    for image, label in run.steps(loader):  # (*)
        loss = nn.functional.cross_entropy(model(image), label)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.record(loss=loss, grad_norm=norm, samples=len(label))  # (*)
if run.stop is None:
    run.checkpoint("final")  # (*)
print(f"{run.stop.reason if run.stop else 'finished'} at epoch {run.position.epoch}, step {run.step}")
sys.exit(run.stop.exit_code if run.stop else 0)  # (*)
