"""A Hugging Face Accelerate loop on scikit-learn's digits with obsinfra added: the lines marked with (*).

pip install 'obsinfra[integrations,examples]'
python examples/accelerate_loop.py            # stop it with Ctrl-C or kill, at any moment
python examples/accelerate_loop.py            # goes on exactly where it was

One process: Accelerate prepares model, optimizer, schedule and data, obsinfra saves them through their state
dicts, the schedule's and the gradient accumulation's place among them.
"""

import sys

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import obsinfra

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)

torch.manual_seed(0)
accelerator = Accelerator()
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9995)
loader = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True)
model, optimizer, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader)

run = obsinfra.observe(  # (*)
    model, optimizer, scheduler=schedule, scaler=accelerator.scaler, run="accelerate-loop", resume="auto"
)
for _ in run.epochs(epochs):  # (*)
    for image, label in run.steps(loader):  # (*)
        loss = nn.functional.cross_entropy(model(image), label)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        run.record(loss=loss, grad_norm=norm, samples=len(label))  # (*)
if run.stop is None:
    run.checkpoint("final")  # (*)
print(f"{run.stop.reason if run.stop else 'finished'} at epoch {run.position.epoch}, step {run.step}")
sys.exit(run.stop.exit_code if run.stop else 0)  # (*)
