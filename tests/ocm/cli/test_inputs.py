"""What the commands make of pipelines of other families."""

import diffusers
import pytest
import torch
from families import FAMILIES

from ocm.cli.inputs import model_at


def saved(name, folder):
    FAMILIES[name].make().save_pretrained(folder / "transformer")
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text("{}")
    return folder


def test_packed_latents_have_their_own_channels(tmp_path):
    folder, place = saved("FluxTransformer2DModel", tmp_path), torch.device("cpu")
    model = model_at(folder, place, (4, 6))
    assert model.image_shape == (2, 4, 6)
    assert model.denoiser.prediction_type == "flow_prediction"
    with pytest.raises(ValueError, match=r"must state sample_size, and does not: only `ocm train`"):
        model_at(folder, place)


def test_pipelines_of_videos_are_refused(tmp_path):
    folder = saved("WanTransformer3DModel", tmp_path)
    with pytest.raises(ValueError, match="is a pipeline of videos, which the commands do not read"):
        model_at(folder, torch.device("cpu"), 4)
