"""Chains of maps along a trajectory: shadowing, products of Jacobians, and how far a point or a margin can move."""
