"""The face for any loop: `observe()` wires monitoring, alerts, control and checkpoints for one run."""

from obsinfra.observation.observed_run import ObservedRun, observe

__all__ = ["ObservedRun", "observe"]
