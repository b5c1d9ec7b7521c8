"""Guarantees for computed numbers of whole models."""
