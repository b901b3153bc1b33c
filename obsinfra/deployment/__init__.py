"""Running the whole on a machine: the native stack beside the trainer, and what the machine has for it."""
