"""What is done with the alert table: evaluated in-process, rendered as Prometheus rules. No torch."""
