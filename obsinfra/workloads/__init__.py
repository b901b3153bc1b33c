"""Real, small models to train, and the protocol by which one brings one's own."""
