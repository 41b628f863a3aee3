"""The losses and the loops: gradients, what is learned, and what is left alone."""

import math

import pytest
import torch
from gaussian_denoiser import gaussian_denoiser, posterior_covariance
from path_denoiser import FEATURES, SHAPE, Mixture, combinations, path_denoiser
from safetensors.torch import load_file, save_file

import hessdiag
import ocm
from ocm.covariances.names import LEARNED
from ocm.diffusion.noise import chosen, noisy
from ocm.diffusion.predictions import PREDICTION_TYPES
from ocm.training.batches import batch_of_step
from ocm.training.objectives import denoising_loss, train_denoiser, train_head
from ocm.training.small_unet import small_unet


def test_training_images_have_the_moments_of_the_forward_process():
    schedule = ocm.cosine()
    x0 = torch.full((5000, 1, 2, 2), 0.5)
    t = torch.full((5000,), 400)
    x_t, noise = noisy(schedule, x0, t, seed=0, sample_offset=0)
    alpha_bar, beta_bar = schedule.alpha_bar[400].item(), schedule.beta_bar[400].item()
    assert x_t.mean().item() == pytest.approx(0.5 * alpha_bar**0.5, abs=0.03)
    assert x_t.var().item() == pytest.approx(beta_bar, rel=0.05)
    torch.testing.assert_close(x_t, alpha_bar**0.5 * x0 + beta_bar**0.5 * noise)


def test_the_ocm_target_is_the_hutchinson_estimate_of_the_scaled_hessian(unet):
    schedule = ocm.linear()
    denoiser = ocm.Denoiser(unet, schedule).freeze()
    x0, t = torch.rand(3, 2, 8, 8) * 2 - 1, torch.tensor([5, 300, 900])
    covariance = ocm.OptimalCovarianceMatching(
        denoiser, ocm.make_head(denoiser), ocm.PAPER, num_probes=2
    )
    loss = covariance.loss(x0, t, seed=4, sample_offset=9)

    x_t, _ = noisy(schedule, x0, t, seed=4, sample_offset=9)
    target = torch.zeros_like(x_t)
    for image in range(3):
        beta_bar = schedule.beta_bar[t[image]].item()

        def score(x, t=t[image], beta_bar=beta_bar):
            return -unet(x, t - 1).sample / beta_bar**0.5

        target[image] = beta_bar * hessdiag.hutchinson(
            score, x_t[image : image + 1], 2, seed=4, sample_offset=9 + image
        )
    torch.testing.assert_close(loss, target.square().mean(), rtol=1e-4, atol=1e-6)


def test_the_ocm_loss_reaches_the_head_alone(unet):
    denoiser = ocm.Denoiser(unet, ocm.linear()).freeze()
    head = ocm.make_head(denoiser, "simple")
    x0, t = torch.rand(2, 2, 8, 8), torch.tensor([5, 300])
    covariance = ocm.OptimalCovarianceMatching(denoiser, head)
    covariance.loss(x0, t, seed=0, sample_offset=0).backward()
    assert head.conv.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in unet.parameters())
    assert not unet.training


def test_a_head_learns_the_variance_of_independent_pixels():
    """On independent Gaussian pixels h depends on t alone, and one probe gives it exactly."""
    schedule, variance = ocm.linear(), 0.09
    denoiser = gaussian_denoiser(torch.zeros(4), variance * torch.eye(4), schedule)
    head = torch.nn.Conv2d(1, 1, 1)
    head.weight.data.zero_()
    head.bias.data.zero_()
    t = torch.full((64,), 300)
    covariance = ocm.OptimalCovarianceMatching(denoiser, head)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.2)
    for step in range(100):
        x0 = variance**0.5 * torch.randn(64, 1, 1, 4)
        loss = covariance.loss(x0, t, seed=0, sample_offset=64 * step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x_t = torch.randn(8, 1, 1, 4)
    with torch.no_grad():
        learned = covariance.at(denoiser.predict(x_t, 300)).diagonal()
    expected = posterior_covariance(variance * torch.eye(4), schedule, 300)[0, 0].float()
    torch.testing.assert_close(learned, expected.expand_as(learned), rtol=2e-2, atol=0)


@pytest.fixture
def images():
    return torch.rand(32, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1


def train(images, **changes):
    denoiser = ocm.Denoiser(small_unet((1, 4, 4)), ocm.cosine())
    settings = ocm.TrainingSettings(
        **{"num_steps": 12, "batch_size": 8, "warmup_steps": 2, **changes}
    )
    losses = train_denoiser(denoiser, images, settings, progress=False)
    head = ocm.make_head(denoiser)
    covariance = ocm.OptimalCovarianceMatching(denoiser, head, ocm.PAPER)
    head_losses = train_head(covariance, images, settings, progress=False)
    return denoiser, head, losses, head_losses


def test_training_lowers_the_losses_and_leaves_a_frozen_model(images):
    denoiser, head, losses, head_losses = train(images, num_steps=40)
    assert sum(losses[-5:]) < sum(losses[:5])
    assert sum(head_losses[-5:]) < sum(head_losses[:5])
    for module in (denoiser.backbone, head):
        assert not module.training
        assert all(not p.requires_grad and torch.isfinite(p).all() for p in module.parameters())


def test_training_is_the_same_again_for_the_same_seed(images):
    first, second = train(images), train(images)
    assert first[2:] == second[2:]
    for one, other in zip(first[1].parameters(), second[1].parameters(), strict=True):
        assert torch.equal(one, other)
    assert train(images, seed=1)[2] != first[2]


class NormalisedBackbone(torch.nn.Module):
    """With a BatchNorm, whose counter has no dimensions, and a gain that is one number."""

    def __init__(self):
        super().__init__()
        self.conv_in = torch.nn.Conv2d(1, 4, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(4)
        self.conv_out = torch.nn.Conv2d(4, 1, 3, padding=1)
        self.gain = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return self.gain * self.conv_out(self.norm(self.conv_in(x)))


def test_a_backbone_with_tensors_of_no_dimensions_trains_and_goes_on(images, tmp_path):
    """The state of a head tells denoisers apart by all of their tensors, whatever their shape."""
    backbone = NormalisedBackbone()
    assert {x.dim() for x in backbone.state_dict().values()} == {0, 1, 4}
    denoiser = ocm.Denoiser(
        backbone,
        ocm.cosine(),
        architecture=ocm.Architecture("N", "norm", lambda b, x_t, level, labels: b(x_t)),
    ).freeze()
    settings = ocm.TrainingSettings(3, batch_size=4)
    losses = []
    for directory in (None, tmp_path, tmp_path):  # the last reads what the one before wrote
        covariance = ocm.OptimalCovarianceMatching(denoiser, ocm.CovarianceHead(4, 1, 2))
        losses.append(train_head(covariance, images, settings, directory=directory, progress=False))
    assert losses[0] == losses[1] == losses[2]
    for tensor in (backbone.norm.num_batches_tracked, backbone.gain):
        with torch.no_grad():
            tensor += 1
        with pytest.raises(ValueError, match="is of another training: denoiser was"):
            train_head(covariance, images, settings, directory=tmp_path, progress=False)
        with torch.no_grad():
            tensor -= 1


def test_without_a_directory_nothing_is_digested(images, monkeypatch):
    from ocm.training import objectives

    denoiser = ocm.Denoiser(small_unet((1, 4, 4), width=8), ocm.cosine()).freeze()
    monkeypatch.setattr(objectives, "_digest", None)
    covariance = ocm.OptimalCovarianceMatching(denoiser, ocm.make_head(denoiser))
    settings = ocm.TrainingSettings(1, batch_size=4)
    assert len(train_head(covariance, images, settings, progress=False)) == 1


def test_training_stops_at_a_loss_that_is_not_finite(images):
    denoiser = ocm.Denoiser(small_unet((1, 4, 4)), ocm.cosine())
    with pytest.raises(FloatingPointError, match=r"loss of the denoiser is (nan|inf) at step"):
        train_denoiser(denoiser, images * math.inf, ocm.TrainingSettings(3), progress=False)


def test_a_backbone_that_predicts_something_else_is_refused():
    from diffusers import UNet2DModel

    unet = UNet2DModel(
        sample_size=4,
        in_channels=1,
        out_channels=3,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    with pytest.raises(ValueError, match="in_channels = 1, out_channels = 3"):
        ocm.Denoiser(unet, ocm.linear())


@pytest.mark.parametrize("method", LEARNED)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_mixed_precision_trains_what_full_precision_does(images, method, prediction_type):
    denoiser = ocm.Denoiser(small_unet((1, 4, 4), width=8), ocm.cosine(), prediction_type)
    losses = {}
    for precision in ("no", "bf16"):
        covariance = LEARNED[method](denoiser, ocm.make_head(denoiser))
        settings = ocm.TrainingSettings(4, batch_size=8, mixed_precision=precision)
        losses[precision] = train_head(covariance, images, settings, progress=False)
    torch.testing.assert_close(losses["bf16"], losses["no"], rtol=0.05, atol=0.02)
    assert losses["bf16"] != losses["no"]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_denoiser_learns_what_it_predicts(prediction_type):
    """On a single image every prediction type knows x0, and so the output, from x_t alone."""
    image = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    denoiser = ocm.Denoiser(small_unet((1, 4, 4), width=8), ocm.cosine(), prediction_type)
    settings = ocm.TrainingSettings(100, batch_size=16, learning_rate=5e-3, ema_decay=0.9)
    losses = train_denoiser(denoiser, image, settings, progress=False)
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    x_t, _ = noisy(denoiser.schedule, image, torch.tensor([300]), seed=9, sample_offset=0)
    with torch.no_grad():
        x0_hat = denoiser.predict(x_t, 300).x0_hat
    assert (x0_hat - image).square().mean() < 0.1


@pytest.mark.parametrize(("path", "prediction_type"), combinations())
def test_the_network_that_knows_the_data_has_no_loss(path, prediction_type):
    """Of data that are one point, which every family predicts in its own units."""
    mean = torch.linspace(-0.5, 0.5, FEATURES).double()
    point = Mixture(torch.ones(1).double(), mean[None], 1e-16 * torch.eye(FEATURES)[None].double())
    denoiser = path_denoiser(point, path, prediction_type)
    x0, t = mean.reshape(1, *SHAPE).expand(4, *SHAPE), torch.tensor([20, 300, 700, 990])
    loss = denoising_loss(denoiser, x0, t, seed=0, sample_offset=0)
    assert loss.item() < 1e-12
    assert denoising_loss(denoiser, x0 + 0.1, t, seed=0, sample_offset=0).item() > 1e-4


def test_every_step_has_noise_of_its_own(monkeypatch):
    """That of the samples seen before would be learned by heart."""
    from ocm.training import objectives

    offsets, denoising, of_head = [], objectives.denoising_loss, ocm.NPR.loss

    def denoised(*arguments, sample_offset, **options):
        offsets.append(sample_offset)
        return denoising(*arguments, sample_offset=sample_offset, **options)

    def head_loss(*arguments, sample_offset, **options):
        offsets.append(sample_offset)
        return of_head(*arguments, sample_offset=sample_offset, **options)

    monkeypatch.setattr(objectives, "denoising_loss", denoised)
    monkeypatch.setattr(ocm.NPR, "loss", head_loss)
    denoiser = ocm.Denoiser(small_unet((1, 4, 4), width=8), ocm.cosine())
    settings = ocm.TrainingSettings(3, batch_size=6, gradient_accumulation_steps=2)
    images = torch.zeros(9, 1, 4, 4)
    train_denoiser(denoiser, images, settings, progress=False)
    train_head(ocm.NPR(denoiser, ocm.make_head(denoiser)), images, settings, progress=False)
    assert offsets == 2 * [0, 3, 6, 9, 12, 15]


# Conditions


class Told(torch.nn.Module):
    """A backbone that keeps what it is told of each sample."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Conv2d(1, 4, 1)
        self.last = torch.nn.Conv2d(4, 1, 1)
        self.weight = torch.nn.Linear(3, 4)
        self.told = []

    def forward(self, x, labels, text, sizes):
        self.told += zip(labels.tolist(), text.tolist(), sizes["height"].tolist(), strict=True)
        h = self.first(x) + self.weight(text)[:, :, None, None] * labels[:, None, None, None]
        return self.last(h.sin() * sizes["height"][:, None, None, None])


ARCHITECTURE = ocm.Architecture(
    "Told",
    "last",
    lambda net, x, time, labels, **given: net(x, labels, **given),
    null_label=lambda net: 7,
)
# What image i is conditioned on: label i % 5, text (i, i + 1/2, 0) and height i + 1.
TEXTS = torch.stack([torch.arange(40.0), torch.arange(40.0) + 0.5, torch.zeros(40)], dim=1)
CONDITIONS = {"text": TEXTS / 40, "sizes.height": torch.arange(40) + 1.0}
LABELS = torch.arange(40) % 5
NULLS = {"text": torch.full((1, 3), -1.0), "sizes.height": torch.tensor([-1.0])}


def told_denoiser():
    return ocm.Denoiser(Told(), ocm.cosine(), architecture=ARCHITECTURE)


def images_told():
    return torch.linspace(-1, 1, 40)[:, None, None, None].expand(40, 1, 2, 2)


def train_told_head(denoiser, num_steps=3, conditions=CONDITIONS, **options):
    covariance = ocm.NPR(denoiser, ocm.CovarianceHead(4, 1, 2), ocm.Parameterisation(0.5))
    settings = ocm.TrainingSettings(num_steps, batch_size=100, seed=3, num_workers=1)
    given = {"labels": LABELS, "conditions": conditions, "null_conditions": NULLS, **options}
    losses = train_head(covariance, images_told(), settings, progress=False, **given)
    return losses, covariance.head.conv.weight.detach().clone()


def test_the_same_tenth_of_the_samples_has_no_condition_of_any_kind():
    denoiser = told_denoiser()
    train_told_head(denoiser)
    settings = ocm.TrainingSettings(3, batch_size=100, seed=3)
    indices = torch.cat([batch_of_step(s, settings, 40, 1000).indices for s in range(3)])
    few = chosen(300, 3, 0, torch.device("cpu"))
    assert 15 < few.sum() < 50
    assert len(denoiser.backbone.told) == 300
    for told, index, none in zip(denoiser.backbone.told, indices.tolist(), few, strict=True):
        own = (index % 5, CONDITIONS["text"][index].tolist(), index + 1.0)
        assert told == ((7, [-1.0, -1.0, -1.0], -1.0) if none else own)


def test_a_denoiser_is_trained_with_conditions_and_without():
    denoiser = told_denoiser()
    settings = ocm.TrainingSettings(1, batch_size=100, seed=3)
    given = {"labels": LABELS, "conditions": CONDITIONS}
    few = chosen(100, 3, 0, torch.device("cpu")).tolist()
    for nulls in ({}, NULLS, NULLS | {"labels": torch.tensor([6])}):
        denoiser.backbone.told.clear()
        train_denoiser(
            denoiser, images_told(), settings, **given, null_conditions=nulls, progress=False
        )
        heights = [height for *_, height in denoiser.backbone.told]
        labels = [label for label, *_ in denoiser.backbone.told]
        assert [height == -1 for height in heights] == [none and bool(nulls) for none in few]
        assert [label == 6 for label in labels] == [none and "labels" in nulls for none in few]


def test_a_head_with_conditions_goes_on_to_the_same_bits_and_only_with_them(tmp_path, monkeypatch):
    expected = train_told_head(told_denoiser())
    loss = ocm.NPR.loss

    def stopping(self, *arguments, sample_offset, **options):
        if sample_offset == 200:
            raise KeyboardInterrupt
        return loss(self, *arguments, sample_offset=sample_offset, **options)

    every = ocm.TrainingSettings(3, batch_size=100, seed=3, checkpoint_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(ocm, "TrainingSettings", lambda *_, **__: every)
        patch.setattr(ocm.NPR, "loss", stopping)
        with pytest.raises(KeyboardInterrupt):
            train_told_head(told_denoiser(), directory=tmp_path)
    other = CONDITIONS | {"text": CONDITIONS["text"] + 1}
    for changed, name in (
        ({"conditions": other}, r"conditions\.text"),
        ({"labels": LABELS.flip(0)}, r"conditions\.labels"),
        ({"null_conditions": NULLS | {"text": torch.zeros(1, 3)}}, r"conditions\.null\.text"),
        ({"null_conditions": {}}, r"conditions\.null"),
    ):
        with pytest.raises(ValueError, match=f"is of another training: {name}.* was"):
            train_told_head(told_denoiser(), directory=tmp_path, **changed)
    losses, weight = train_told_head(told_denoiser(), directory=tmp_path)
    assert losses == expected[0]
    assert torch.equal(weight, expected[1])


def test_conditions_on_the_disk_train_as_those_in_memory(tmp_path):
    expected = train_told_head(told_denoiser())
    save_file(CONDITIONS, tmp_path / "conditions.safetensors")
    mapped = load_file(tmp_path / "conditions.safetensors")
    assert train_told_head(told_denoiser(), conditions=mapped)[0] == expected[0]

    class Source:
        def __init__(self, rows):
            self.rows = rows

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, indices):
            return self.rows[indices]

    sources = {name: Source(rows) for name, rows in CONDITIONS.items()}
    assert train_told_head(told_denoiser(), conditions=sources)[0] == expected[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"null_conditions": {"txt": torch.zeros(1, 3)}}, r"none for 'txt', got \(1, 3\)"),
        ({"null_conditions": {"text": torch.zeros(3)}}, r"\(1, 3\) for 'text', got \(3,\)"),
        ({"conditions": {"text": torch.zeros(3, 3)}}, "each of 40 images, got 3 of 'text'"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        train_told_head(told_denoiser(), **{"null_conditions": {}, **options})
