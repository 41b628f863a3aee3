"""A learned covariance diagonal in cosines of colours, after K-DCT (Xia et al., TMLR 2026)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

import hessdiag
from ocm.covariances.base import over_branches
from ocm.covariances.learned.heads import outside_autocast, start_at_zero
from ocm.covariances.learned.maximum_likelihood import MaximumLikelihood
from ocm.covariances.operators import Eigenbasis, SpectralCovariance, cosine_diagonal
from ocm.diffusion.denoiser import Branch, Denoiser, Prediction
from ocm.diffusion.schedules import at_least_float32, full_precision, per_sample

# Of a coefficient's variance, so that the logarithm of its energy is finite.
_LEAST_ENERGY = 1e-3
# Of the ends of a path, which hold no noise or no signal.
_MOST_LOG_SNR = 12.0


class FrequencyHead(nn.Module):
    """Two convolutions over the plane of frequencies, modulated by pooled features and log SNR.

    They read the log-energies of the coefficients of x0_hat: what an image shows much of is what
    x0_hat may have got wrong. Their output starts at zero.

    Args:
        in_channels: Channels of the backbone's features.
        coefficients: Shape (C, H, W) of the coefficients of an image.
        hidden: Channels of the convolutions.

    Example:
        >>> import torch, ocm
        >>> head = ocm.FrequencyHead(32, (3, 16, 16))
        >>> head(torch.randn(2, 32, 8, 8), torch.randn(2, 3, 16, 16), torch.zeros(2)).shape
        torch.Size([2, 3, 16, 16])
    """

    def __init__(
        self, in_channels: int, coefficients: tuple[int, int, int], hidden: int = 32
    ) -> None:
        super().__init__()
        colours, *plane = coefficients
        self.norm = nn.LayerNorm(2 * in_channels)
        self.inner = nn.Sequential(
            *(nn.Linear(2 * in_channels + 4, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU())
        )
        self.modulation = nn.Linear(128, 2 * hidden)
        self.first = nn.Conv2d(colours, hidden, kernel_size=3, padding=1)
        self.second = nn.Conv2d(hidden, hidden, kernel_size=3, padding=1)
        self.out = nn.Conv2d(hidden, colours, kernel_size=3, padding=1)
        self.frequency = nn.Parameter(torch.zeros(hidden, *plane))
        start_at_zero(self.modulation)
        start_at_zero(self.out)

    def forward(self, features: Tensor, log_energies: Tensor, log_snr: Tensor) -> Tensor:
        """Return o, of the shape (B, C, H, W) of the log-energies; log SNRs are of shape (B,)."""
        features, log_energies, level = (
            given.to(self.out.weight.dtype) for given in (features, log_energies, log_snr / 5.0)
        )
        with outside_autocast(features):
            places, level = features.flatten(2), level[:, None]
            moments = torch.cat([places.mean(2), places.std(2, correction=0)], dim=1)
            levels = [level, level.square(), level.sin(), (2.0 * level).sin()]
            inner = self.inner(torch.cat([self.norm(moments), *levels], dim=1))
            gain, shift = self.modulation(inner)[:, :, None, None].chunk(2, dim=1)
            first = (1.0 + gain) * self.first(log_energies) + shift + self.frequency
            first = functional.silu(first)
            o: Tensor = self.out(first + functional.silu(self.second(first)))
        return o


@dataclass(frozen=True, eq=False)
class FrequencyLikelihood(MaximumLikelihood):
    """Cov[x0 | x_t] = F^T diag(c_tk ratio(o_k)) F, with F the cosines of each colour.

    After K-DCT (Xia et al., TMLR 2026). The errors of natural images are correlated over pixels and
    channels, and little over frequencies of uncorrelated colours. The unit of coefficient k of
    variance v_k in the data is::

        c_tk = sigma_t^2 / (alpha_t^2 + sigma_t^2 / v_k),

    exact for Gaussian data with these axes. The loss is that of :class:`ocm.MaximumLikelihood`,
    with F (x0 - x0_hat) for x0 - x0_hat; of ``parameterisation`` only the sign counts.

    Attributes:
        denoiser: As in :class:`ocm.MaximumLikelihood`, as are the other attributes of that class.
        head: An :class:`ocm.FrequencyHead`.
        variances: v, shape (C, H, W).
        colours: Orthonormal, shape (C, C): a row holds the weights of the channels in a colour.
        fold: Side of the square of pixels that x_t keeps as channels of one place
            (``pixel_unshuffle``): x_t is of shape (B, C fold^2, H / fold, W / fold).

    Raises:
        ValueError: As :class:`ocm.MaximumLikelihood`.

    Example:
        >>> import torch, ocm
        >>> from ocm.training.small_unet import small_unet
        >>> denoiser = ocm.Denoiser(small_unet((1, 8, 8), width=8), ocm.linear()).freeze()
        >>> images = torch.linspace(-1.0, 1.0, 256).reshape(4, 1, 8, 8)
        >>> covariance = ocm.FrequencyLikelihood.for_images(denoiser, images, in_channels=8)
        >>> C = covariance.at(denoiser.predict(images, 500))
        >>> C.noise(torch.ones(4, 1, 8, 8)).shape    # correlated over pixels
        torch.Size([4, 1, 8, 8])
    """

    _: KW_ONLY
    variances: Tensor
    colours: Tensor
    fold: int = 1

    @staticmethod
    def for_images(
        denoiser: Denoiser,
        images: Tensor,
        in_channels: int,
        *,
        fold: int = 1,
        seed: int = 0,
        **options: Any,
    ) -> FrequencyLikelihood:
        """Return it untrained, with the principal colours of some thousands of training images.

        Args:
            denoiser: The frozen denoiser.
            images: Shape (n, ...) of x_t.
            in_channels: Channels of the denoiser's features.
            fold: As above.
            seed: Seed of the head; the global generator stays as it was.
            options: Further attributes.

        Example:
            >>> import torch, ocm
            >>> images = torch.linspace(-1.0, 1.0, 384).reshape(2, 3, 8, 8)
            >>> denoiser = ocm.Denoiser(lambda x, time: x, ocm.linear())
            >>> ocm.FrequencyLikelihood.for_images(denoiser, images, 32).variances.shape
            torch.Size([3, 8, 8])
        """
        images = full_precision(images)
        channels = pixel_shuffle(images, fold).transpose(0, 1).flatten(1)
        colours = torch.linalg.eigh(channels.cov().reshape(len(channels), -1))[1].T.flip(0)
        coefficients = _basis(colours, fold).analyse(images)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _, channel_count, height, width = coefficients.shape
            head = FrequencyHead(in_channels, (channel_count, height, width))
        device = denoiser.device
        return FrequencyLikelihood(
            denoiser,
            head.to(device),
            variances=coefficients.var(0).to(device),
            colours=colours.to(device),
            fold=fold,
            **options,
        )

    def at(self, prediction: Prediction) -> SpectralCovariance:
        """Return the covariance, by the variance of each coefficient."""
        own = prediction.by(self.denoiser)
        variances = over_branches(own, lambda branch: self._variance(branch, self.head))
        basis = _basis(self.colours, self.fold)
        return SpectralCovariance(variances, prediction.x_t.shape, basis)

    def _scaled(self, branch: Branch, output: Tensor) -> Tensor:
        schedule, t, x_t = self.denoiser.schedule, branch.t, branch.x_t
        dtype = at_least_float32(x_t.dtype)
        scales = schedule.alpha(t), schedule.sigma(t)
        if isinstance(t, Tensor):
            alpha, sigma = (per_sample(of, full_precision(x_t)) for of in scales)
        else:  # numbers of the host, that operators take with their arguments
            alpha, sigma = (of.to(dtype) for of in scales)
        variances = self.variances.to(torch.promote_types(self.variances.dtype, dtype))
        unit = sigma.square() / (alpha.square() + sigma.square() / variances)
        return unit * self.parameterisation.ratio(output)

    def _output(self, branch: Branch, head: nn.Module) -> Tensor:
        x0_hat = full_precision(branch.x0_hat)
        if self.x0_range is not None:
            x0_hat = x0_hat.clamp(*self.x0_range)
        energies = self._analysed(x0_hat).square() / self.variances + _LEAST_ENERGY
        log_snr = self.denoiser.schedule.log_snr(branch.t).clamp(-_MOST_LOG_SNR, _MOST_LOG_SNR)
        levels = per_sample(log_snr, x0_hat).flatten().expand(len(x0_hat))
        output: Tensor = head(branch.features, energies.log(), levels)
        return output

    def _analysed(self, error: Tensor) -> Tensor:
        return _basis(self.colours, self.fold).analyse(error)

    def _decoded(self, x0: Tensor, x0_hat: Tensor, variance: Tensor) -> Tensor:
        basis = _basis(self.colours, self.fold)
        if self.levels is None:
            x0, x0_hat = basis.analyse(x0), basis.analyse(x0_hat)
        else:  # grey levels are of pixels
            variance = basis.diagonal(variance)
        return super()._decoded(x0, x0_hat, variance).reshape(len(x0), *self.variances.shape)


def _basis(colours: Tensor, fold: int) -> Eigenbasis:
    def mixed(weights: Tensor, images: Tensor) -> Tensor:
        return torch.einsum("kc,bchw->bkhw", weights.to(images), images)

    def diagonal(variances: Tensor) -> Tensor:
        of_pixels = cosine_diagonal(variances, variances.shape).diagonal()
        return pixel_unshuffle(mixed(colours.T.square(), of_pixels), fold)

    dct = hessdiag.dct()
    return Eigenbasis(
        analyse=lambda v: dct.analyse(mixed(colours, pixel_shuffle(v, fold))),
        synthesise=lambda b: pixel_unshuffle(mixed(colours.T, dct.synthesise(b)), fold),
        diagonal=diagonal,
    )
