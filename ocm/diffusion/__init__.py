"""Schedules, timesteps and backbones: what a denoiser says about x0 given x_t."""
