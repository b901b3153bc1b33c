"""Hardware choices that work in anybody's loop: device, precision, compilation, activation checkpointing."""
