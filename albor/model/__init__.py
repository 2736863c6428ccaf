"""The transformer: each part with its forward and its backward, written by hand, side by side."""
