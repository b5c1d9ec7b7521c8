"""Operator norms of linear layers: estimates from below and guaranteed bounds from above."""
