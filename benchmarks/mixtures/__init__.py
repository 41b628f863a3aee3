"""The experiment on mixtures of Gaussians, where the true covariance is known."""
