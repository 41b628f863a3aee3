"""ocm.attach on every family, called as its pipeline calls it, and the way to disk and back."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from families import FAMILIES

import ocm
from ocm.integrations.attached import CovarianceModel


def attached(name):
    model = ocm.attach(FAMILIES[name].make(), parameterisation=ocm.Parameterisation(0.7, True))
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.normal_(std=0.3)
    return model


def half_of(model, number):
    """One half of what the model puts out, as a model that a pipeline's way of calling can take."""

    class Half(SimpleNamespace):
        def __call__(self, *args, **kwargs):
            output = model(*args, **kwargs)[0]
            x_t = kwargs.get("hidden_states", args[0] if args else None)
            assert output.shape == (len(x_t), 2 * x_t.shape[1], *x_t.shape[2:])
            return (output.chunk(2, dim=1)[number],)

    return Half(config=model.config)


def given_to(name):
    family = FAMILIES[name]
    labels = {} if family.classes is None else {"class_labels": family.labels()}
    return {**family.tensors(), **labels}


@pytest.mark.parametrize("name", FAMILIES)
def test_it_states_prediction_and_variance_and_is_saved(name, tmp_path):
    family, model, x = FAMILIES[name], attached(name), FAMILIES[name].x_t()
    t = 500  # sigma = 0.5, of which bfloat16 loses nothing
    is_flow = family.prediction_type == "flow_prediction"
    scheduler = FlowMatchEulerDiscreteScheduler() if is_flow else DDPMScheduler()
    covariance = model.covariance(scheduler)
    denoiser = covariance.denoiser
    assert denoiser.prediction_type == family.prediction_type
    prediction = denoiser.predict(x, t, condition=family.condition(denoiser))
    time = torch.tensor(float(t)) if is_flow else torch.tensor(t - 1)
    passes = []
    model.backbone.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        stated = [family.native(half_of(model, i), x, time, **given_to(name)) for i in range(2)]
    assert len(passes) == 2
    torch.testing.assert_close(stated[0], prediction.output, atol=1e-5, rtol=1e-5)
    unit = model.parameterisation.scale(denoiser.schedule, t).float()
    variance = covariance.at(prediction).diagonal()
    assert variance.std() > 0.01 * variance.mean()
    torch.testing.assert_close(stated[1] * unit, variance, atol=1e-5, rtol=1e-4)

    model.save_pretrained(tmp_path)
    loaded = CovarianceModel.from_pretrained(tmp_path)
    assert type(loaded) is CovarianceModel
    with torch.no_grad():
        for i in range(2):
            again = family.native(half_of(loaded, i), x, time, **given_to(name))
            torch.testing.assert_close(again, stated[i], atol=1e-5, rtol=1e-5)
    half = CovarianceModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    kept = type(model.backbone)._keep_in_fp32_modules or []
    for key, parameter in half.named_parameters():
        stays = key.startswith("head.") or any(part in kept for part in key.split("."))
        assert parameter.dtype == (torch.float32 if stays else torch.bfloat16), key
    lower = {k: v.bfloat16() if v.is_floating_point() else v for k, v in given_to(name).items()}
    with torch.no_grad():
        for i in range(2):
            again = family.native(half_of(half, i), x.bfloat16(), time, **lower)
            assert again.dtype == torch.bfloat16
            torch.testing.assert_close(again.float(), stated[i], atol=0.1, rtol=0.1)


def test_what_is_missing_from_a_call_is_named():
    model = attached("SD3Transformer2DModel")
    with pytest.raises(ValueError, match=r"sample \(or hidden_states\) and timestep must be given"):
        model(torch.zeros(1, 2, 2, 6))


def test_a_timestep_for_each_token_reaches_the_backbone():
    """Wan's and LTX-Video's pipelines that start from an image tell some tokens another time."""
    family, model = FAMILIES["WanTransformer3DModel"], attached("WanTransformer3DModel")
    x, times = family.x_t(), torch.tensor([[0.0, 500.0, 500.0, 0.0]]).expand(2, 4)
    output = model(hidden_states=x, timestep=times, **family.tensors()).sample
    alone = model.backbone(x, timestep=times, **family.tensors()).sample
    assert torch.equal(output[:, :2], alone)
