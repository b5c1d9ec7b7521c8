"""Arithmetic whose results hold the exact numbers: balls, double-double, upward rounding."""
