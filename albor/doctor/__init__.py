"""`albor doctor`: what this machine is, what is wrong with it, and what would make it faster.

It creates no CUDA context, and imports torch in another process only: it answers where torch does not load.
"""
