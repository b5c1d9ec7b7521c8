"""Figures of the papers and of the mathematics, from kept models, from a run, or from nothing; `catalogue` has their table."""
