"""Preprocessing as bijections: integer levels to [0, 1), and [0, 1) to where a flow starts."""
