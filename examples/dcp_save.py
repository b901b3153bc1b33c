"""A sharded training saved with torch.distributed.checkpoint into obsinfra's store: each rank its own shards.

torchrun --nproc-per-node 2 examples/dcp_save.py runs/dcp    # start, or go on from the newest sound one
torchrun --nproc-per-node 1 examples/dcp_save.py runs/dcp    # on another number of ranks: load reshards
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from obsinfra.backup.dcp import ObsinfraReader, ObsinfraWriter

store = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/dcp")
dist.init_process_group("gloo")
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)


def training_state(step):
    """DTensors of this rank's shards, and plain values; DCP loads into them."""
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer, "step": step}


step = 0
if any(store.glob("manifests/*.json")):
    state = training_state(0)
    dcp.load(state, storage_reader=ObsinfraReader(store))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    step = state["step"]

started_at = step
while step < started_at + 10:
    loss = model(torch.randn(32, 64)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    step += 1

saved = dcp.save(training_state(step), storage_writer=ObsinfraWriter(store, step=step))
if dist.get_rank() == 0:
    ranks = dist.get_world_size()
    print(f"steps {started_at + 1} to {step} on {ranks} ranks: {saved.storage_meta.checkpoint_id}")
dist.destroy_process_group()
