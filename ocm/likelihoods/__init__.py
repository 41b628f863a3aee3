"""Likelihoods of diffusion and flow models by the divergence of their probability-flow ODE."""
