"""A trained model behind OpenAI's HTTP interface. Reads a checkpoint directory, never a trainer."""
