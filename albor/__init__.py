"""albor: from raw text to a published small language model, on one GPU, from one YAML file."""

__version__ = "0.1.0"
