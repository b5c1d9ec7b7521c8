"""Parts of a training run around its loss: optimisers, devices, checkpoints, metrics and the
loop itself.
"""
