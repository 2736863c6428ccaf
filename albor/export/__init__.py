"""Writes a trained model as files that other programs load, and checks that they compute the same."""
