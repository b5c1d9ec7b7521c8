"""Inverses of residual blocks by fixed-point iteration."""
