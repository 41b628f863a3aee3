"""Several heads trained side by side, on the same passes through their frozen denoiser.

Heads of one seed see the same noisy images, so that an evaluation of the denoiser, and a product
with its Jacobian, serve all of them. Every head has its own loss and its own weights: a sum of
losses trains each as if it were alone, without clipping of gradients, whose norm they would share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import hessdiag
from ocm.covariances.learned.base import LearnedCovariance
from ocm.covariances.learned.parameterisation import Parameterisation
from ocm.diffusion.conditions import Condition
from ocm.diffusion.denoiser import Denoiser, Prediction


@dataclass(frozen=True)
class Remembering(Denoiser):
    """A denoiser that remembers the last prediction and the last Jacobian without conditions.

    Attributes:
        last: What it remembers, by kind: x_t, t and the result.
    """

    last: dict[str, tuple[Tensor, Tensor, Any]] = field(default_factory=dict, compare=False)

    def predict(self, x_t: Tensor, t: Any, **options: Any) -> Prediction:
        """Return the prediction, the last one where x_t and t are the same."""
        result: Prediction = self._again("predict", x_t, t, super().predict, options)
        return result

    def jacobian(self, x_t: Tensor, t: Any, condition: Any = None, **ways: Any) -> Any:
        """Return J, the last one where x_t and t are the same."""
        return self._again("jacobian", x_t, t, super().jacobian, ways)

    def _again(self, kind: str, x_t: Tensor, t: Any, make: Any, options: Any) -> Any:
        kept = self.last.get(kind)
        if kept is not None and torch.equal(kept[0], x_t) and torch.equal(kept[1], t):
            return kept[2]
        result = make(x_t, t, **options)
        if kind == "jacobian":
            result = _Products(result)
        self.last[kind] = x_t, t, result
        return result


@dataclass(frozen=True, eq=False)
class _Products:
    """A Jacobian that remembers its products with the last v."""

    J: hessdiag.Jacobian
    last: dict[str, Any] = field(default_factory=dict)

    @property
    def aux(self) -> Any:
        return self.J.aux

    def products(self, v: Tensor) -> Tensor:
        if "v" not in self.last or not torch.equal(self.last["v"], v):
            self.last.update(v=v, products=self.J.products(v))
        result: Tensor = self.last["products"]
        return result


@dataclass(frozen=True)
class Together:
    """Learned covariances of one denoiser as one, whose loss is the sum of theirs.

    Attributes:
        covariances: By name; those that share a denoiser's evaluation one after another.
    """

    covariances: Mapping[str, LearnedCovariance]

    @cached_property
    def _shared(self) -> dict[str, LearnedCovariance]:
        known = {f.name: getattr(self.denoiser, f.name) for f in fields(Denoiser)}
        denoiser = Remembering(**known)
        return {name: replace(c, denoiser=denoiser) for name, c in self.covariances.items()}

    @property
    def denoiser(self) -> Denoiser:
        """The frozen denoiser of all of them."""
        return next(iter(self.covariances.values())).denoiser

    @property
    def parameterisation(self) -> Parameterisation:
        """That of the first."""
        return next(iter(self.covariances.values())).parameterisation

    @cached_property
    def head(self) -> nn.ModuleDict:
        """All heads."""
        return nn.ModuleDict({name: c.head for name, c in self.covariances.items()})

    def loss(
        self,
        x0: Tensor,
        t: Tensor,
        *,
        seed: int,
        sample_offset: int,
        condition: Condition | None = None,
        head: nn.Module | None = None,
    ) -> Tensor:
        """Return the sum of the losses; ``head`` is :attr:`head`."""
        losses = [
            c.loss(x0, t, seed=seed, sample_offset=sample_offset) for c in self._shared.values()
        ]
        return torch.stack(losses).sum()
