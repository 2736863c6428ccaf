"""TensorBoard, trackio and wandb as copies of a run's metrics: `metrics.jsonl` stays the truth."""
