"""A run's identity and its folder: the one place where everything about a run can be found."""
