"""Optimal Covariance Matching (Ou et al., ICLR 2025): a head that learned the diagonal itself."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import hessdiag
from hessdiag import kernels
from hessdiag.kernels.philox import seed_tensor
from hessdiag.products import JacobianProducts, Mode
from ocm.covariances.base import from_branches, loss_weight, scaled_ratio
from ocm.covariances.learned.parameterisation import PAPER, Parameterisation
from ocm.covariances.operators import SpectralCovariance
from ocm.diffusion.denoiser import Denoiser, Prediction
from ocm.diffusion.noise import noisy


@dataclass(frozen=True)
class OptimalCovarianceMatching:
    """Var[x0 | x_t] = c_t ratio(o), with the ratio regressed on an unbiased estimate of it.

    The loss is

        mean w_t (ratio - (1/M) sum_m v_m * (C v_m) / c_t)^2,    C v = c v + k J^T v,

    with C = Cov[x0 | x_t] of the denoiser (:mod:`ocm.diffusion.denoiser`), w_t of
    :func:`ocm.covariances.base.loss_weight`. In the paper's parameterisation, for a network that
    predicts the noise, ratio = 1 + h and this is its (h - v * (beta_bar H v))^2. The gradient is
    unbiased for every number of probes, since the minimiser is the conditional mean.

    Attributes:
        denoiser: The frozen denoiser, whose features the head reads.
        head: The head.
        parameterisation: What its output means.
        num_probes: Probes M in each target.
        probes: Their design; M is a multiple of its block.
        mode: "vjp" takes the features and all products from one pass; "jvp" keeps no activations,
            for one pass more and M of forward mode.
        network_error: Relative error of the network's Jacobian, in w_t; 0 for a true score.
    """

    denoiser: Denoiser
    head: nn.Module
    parameterisation: Parameterisation = PAPER
    num_probes: int = 1
    probes: hessdiag.ProbeDesign = field(default_factory=hessdiag.Rademacher)
    mode: Mode = "vjp"
    network_error: float = 0.02

    def at(self, prediction: Prediction, *, s: int | None = None) -> SpectralCovariance:
        """Return the variance of each dimension; no pass through the backbone."""
        return from_branches(prediction, lambda branch: scaled_ratio(self, branch))

    def loss(
        self,
        x0: Tensor,
        t: Tensor,
        *,
        seed: int,
        sample_offset: int,
        labels: Tensor | None = None,
        head: nn.Module | None = None,
    ) -> Tensor:
        """Return the loss; the arguments are those of :meth:`ocm.LearnedCovariance.loss`.

        Raises:
            ValueError: If ``num_probes`` is no multiple of the design's block.
        """
        denoiser, schedule = self.denoiser, self.denoiser.schedule
        if labels is not None:
            denoiser = denoiser.conditioned(labels)
        x_t, _ = noisy(schedule, x0, t, seed, sample_offset)
        size, weight = (of(tuple(x_t.shape[1:])) for of in (self._block, self.probes.weight))
        v = self.probes.draw(
            (self.num_probes, *x_t.shape),
            seed_tensor(seed, x_t.device),
            probe_offset=0,
            sample_offset=sample_offset,
            dtype=x_t.dtype,
            device=x_t.device,
        )
        features, products = self._features_and_products(denoiser, x_t, t, v)
        ratio = self.parameterisation.ratio((head or self.head)(features))

        unit = self.parameterisation.scale(schedule, t, x_t)
        c, k = (number / unit for number in denoiser.covariance_coefficients(t, x_t))
        w = loss_weight(self.parameterisation, denoiser, t, self.network_error).to(x_t)
        if isinstance(self.probes, hessdiag.Rademacher):
            return kernels.ocm_loss(
                ratio,
                products,
                seed,
                weight=w,
                scale=k.flatten(),
                shift=c.flatten(),
                sample_offset=sample_offset,
            )
        estimate = (v * products).sum(dim=0) * (weight * size / self.num_probes)
        residual = ratio - (c + k * estimate)
        return (w.reshape(c.shape) * residual.square()).mean()

    def _block(self, sample_shape: tuple[int, ...]) -> int:
        size = self.probes.block_size(sample_shape)
        if self.num_probes < 1 or self.num_probes % size:
            raise ValueError(
                f"num_probes must be a multiple of {size}, a block of {self.probes}, got "
                f"{self.num_probes}"
            )
        return size

    def _features_and_products(
        self, denoiser: Denoiser, x_t: Tensor, t: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.mode == "jvp":
            with torch.no_grad():
                features = denoiser.predict(x_t, t).features
            return features, JacobianProducts(denoiser.output_at(t), x_t, "jvp", "loop")(v)
        predictions: list[Prediction] = []

        def output(x: Tensor) -> Tensor:
            predictions.append(denoiser.predict(x, t))
            return predictions[-1].output

        # One plain evaluation, whose features the head reads.
        products = JacobianProducts(output, x_t, "vjp", "loop")(v)
        return predictions[-1].features, products
