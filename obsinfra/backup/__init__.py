"""Checkpoints: host snapshots, the content-addressed store, and the backup system over them."""
