"""ocm inside other libraries: diffusers, its autoencoders, k-diffusion."""
