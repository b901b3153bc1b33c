"""obsinfra: a PyTorch training stack in which what is observed is acted on.

The public face is re-exported lazily, so `import obsinfra` costs nothing until a name is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from obsinfra.backup.backup_system import BackupSystem as BackupSystem
    from obsinfra.backup.backup_system import create_backup_system as create_backup_system
    from obsinfra.monitoring.training_monitor import TrainingMetrics as TrainingMetrics
    from obsinfra.monitoring.training_monitor import TrainingMonitor as TrainingMonitor
    from obsinfra.observation import ObservedRun as ObservedRun
    from obsinfra.observation import observe as observe
    from obsinfra.optimization.data_loading import (
        create_memory_efficient_dataloader as create_memory_efficient_dataloader,
    )
    from obsinfra.optimization.gpu_optimizer import GpuOptimizer as GpuOptimizer
    from obsinfra.optimization.gpu_optimizer import create_gpu_optimizer as create_gpu_optimizer
    from obsinfra.optimization.memory_optimizer import MemoryOptimizer as MemoryOptimizer
    from obsinfra.optimization.memory_optimizer import create_memory_optimizer as create_memory_optimizer

__version__ = "0.1.0"

_FACE = {
    "observe": "obsinfra.observation",
    "ObservedRun": "obsinfra.observation",
    "TrainingMonitor": "obsinfra.monitoring.training_monitor",
    "TrainingMetrics": "obsinfra.monitoring.training_monitor",
    "BackupSystem": "obsinfra.backup.backup_system",
    "create_backup_system": "obsinfra.backup.backup_system",
    "GpuOptimizer": "obsinfra.optimization.gpu_optimizer",
    "create_gpu_optimizer": "obsinfra.optimization.gpu_optimizer",
    "MemoryOptimizer": "obsinfra.optimization.memory_optimizer",
    "create_memory_optimizer": "obsinfra.optimization.memory_optimizer",
    "create_memory_efficient_dataloader": "obsinfra.optimization.data_loading",
}

__all__ = ["__version__", *_FACE]


def __getattr__(name: str) -> Any:
    if name in _FACE:
        return getattr(importlib.import_module(_FACE[name]), name)
    raise AttributeError(f"module 'obsinfra' has no attribute {name!r}")
