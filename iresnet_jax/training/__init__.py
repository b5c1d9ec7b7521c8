"""What a training run needs around its loss: optimisers, devices, checkpoints, metrics and the loop itself."""
