"""Log-likelihoods by the probability-flow ODE: probes, time, and the bound beside it."""
