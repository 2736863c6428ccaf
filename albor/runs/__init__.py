"""Runs as a reader finds them: what a run directory says, whether its process lives, and how runs compare.

Nothing here writes into a run, takes its lock, or imports torch: looking never disturbs.
"""
