"""A denoiser for Gaussian data, whose score and posterior are known in closed form."""

from types import SimpleNamespace

import torch
from torch import nn

from ocm.diffusion.backbones.families import UNET
from ocm.diffusion.denoiser import Denoiser


class GaussianUNet(nn.Module):
    """Predicts the noise for x0 ~ N(mean, covariance), through the interface of UNet2DModel.

    epsilon = -sqrt(beta_bar) score, score = -(alpha_bar covariance + beta_bar I)^-1 (x_t - mean_t)
    """

    def __init__(self, mean, covariance, schedule):
        super().__init__()
        self.config = SimpleNamespace(in_channels=1, out_channels=1, num_class_embeds=None)
        self.conv_norm_out = nn.Identity()
        self.conv_norm_out.num_channels, self.conv_norm_out.num_groups = 1, 1
        self.register_buffer("mean", mean.double())
        self.register_buffer("covariance", covariance.double())
        self.scale = nn.Parameter(torch.ones(()))
        self.schedule = schedule

    def forward(self, x, t, class_labels=None):
        t = torch.as_tensor(t).reshape(-1).expand(len(x)) + 1
        alpha_bar, beta_bar = (
            table[t][:, None] for table in (self.schedule.alpha_bar, self.schedule.beta_bar)
        )
        identity = torch.eye(len(self.mean), dtype=torch.float64)
        marginal = alpha_bar[..., None] * self.covariance + beta_bar[..., None] * identity
        flat = self.conv_norm_out(x).flatten(1).double() - alpha_bar.sqrt() * self.mean
        epsilon = beta_bar.sqrt() * torch.linalg.solve(marginal, flat)
        return SimpleNamespace(sample=(self.scale * epsilon).to(x.dtype).reshape(x.shape))


def gaussian_denoiser(mean, covariance, schedule):
    """The denoiser of N(mean, covariance); images are (1, 1, D)."""
    unet = GaussianUNet(mean, covariance, schedule)
    return Denoiser(unet, schedule, architecture=UNET).freeze()


def posterior_covariance(covariance, schedule, t):
    """Cov[x0 | x_t] = (covariance^-1 + (alpha_bar / beta_bar) I)^-1, from Bayes' rule."""
    snr = schedule.alpha_bar[t] / schedule.beta_bar[t]
    precision = torch.linalg.inv(covariance.double()) + snr * torch.eye(len(covariance)).double()
    return torch.linalg.inv(precision)
