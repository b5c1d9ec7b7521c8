"""Invertible maps on explicit weights, and how they combine."""
