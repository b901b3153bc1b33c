"""Recorder, exporter, samplers, tracing and logging: how a run is seen."""
