"""Evaluation: greedy generation, scorers of answers, bits per byte of held-out text."""
