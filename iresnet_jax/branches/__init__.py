"""Residual branches as values: one kind a file."""
