"""Invertible residual networks in JAX (Behrmann et al., ICML 2019)."""
