"""Settings that cannot be are refused."""

import pytest

from ocm.training.settings import TrainingSettings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"ema_decay": 1.0}, r"ema_decay must lie in \[0, 1\), got 1.0"),
        ({"timestep_exponent": 0.0}, "timestep_exponent must be positive and finite, got 0.0"),
        ({"warmup_steps": -1}, "warmup_steps must be finite and not negative, got -1"),
        ({"weight_decay": -0.5}, "weight_decay must be finite and not negative, got -0.5"),
        ({"weight_decay": float("nan")}, "weight_decay must be finite and not negative, got nan"),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0"),
        ({"learning_rate": float("inf")}, "learning_rate must be positive and finite, got inf"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive and finite, got nan"),
        ({"max_gradient_norm": 0.0}, "max_gradient_norm must be positive, got 0.0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be one of no, bf16, fp16, got 'fp8'"),
        ({"num_workers": -1}, "num_workers must be finite and not negative, got -1"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingSettings(**{"num_steps": 1, **changes})


def test_an_infinite_norm_scales_no_gradient_down():
    assert TrainingSettings(num_steps=1, max_gradient_norm=float("inf")).max_gradient_norm > 1e300
