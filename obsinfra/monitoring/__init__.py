"""Seeing: the recorder on the step path, samplers, the metrics server and its page, traces, logs."""
