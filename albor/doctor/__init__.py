"""`albor doctor`: what this machine is, what is wrong with it, and what would make it faster.

It neither imports torch nor creates a CUDA context: it answers at once, and where torch does not load.
"""
