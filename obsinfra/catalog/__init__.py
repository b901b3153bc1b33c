"""The tables on the ground floor: every metric, every alert, every action, once. Plain data."""
