"""The trainer: one loop for every workload."""
