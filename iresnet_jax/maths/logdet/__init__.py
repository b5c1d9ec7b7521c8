"""Log-determinants of residual blocks."""
