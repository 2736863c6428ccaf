"""Writing with a trained model. Reads a checkpoint directory, never a trainer."""
