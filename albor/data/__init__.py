"""From raw text to batches of token ids: sources -> tokenizer -> shards -> prepare, and the loader over
shards.

No torch here: a batch is a NumPy array, and what a run may read is known before a device is touched.
"""
