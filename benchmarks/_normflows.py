"""Residual flows of normflows (PyTorch): their parts and their training step, as its examples have them."""

import normflows as nf  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]

POISSON = {"n_dist": "poisson", "lamb": 2.0, "n_exact_terms": 2}  # the settings of Residual Flows (Chen et al. 2019)


def block(shape, net, **settings):
    """ActNorm and a residual block, in the order of the data's way.

    Args:
        shape: Shape of the ActNorm's parameters, such as ``(c, 1, 1)``.
        net: Branch.
        settings: Estimator of the block's log-determinant, such as `POISSON`, in its memory-saving form.
    """
    return [nf.flows.ActNorm(shape), nf.flows.Residual(net, reduce_memory=True, **settings)]


def take_step(model, optimizer, x, *, num_dims, clip_norm, power_iterations):
    """One step of a training by maximum likelihood; the norms of the layers are kept up with afterwards."""
    optimizer.zero_grad()
    loss = model.forward_kld(x) / num_dims
    loss.backward()
    if torch.isfinite(torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)):  # as its example goes on after NaN
        optimizer.step()
    nf.utils.update_lipschitz(model, power_iterations)
    return loss
