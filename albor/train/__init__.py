"""Training: the step, its cadence, and what is seen of it."""
