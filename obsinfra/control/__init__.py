"""The control channel and the sidecar: how somebody outside tells a run what to do. Never imports torch."""
