"""Whole models: their architecture, constraint, densities and classifiers."""
