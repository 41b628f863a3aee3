"""Where a denoiser is unsure: maps of the standard deviation of x0, and whether to believe them.

Takes any pipeline of diffusers; here one of a small U-Net that is trained on scikit-learn's digits
for some seconds, so that nothing is downloaded. Writes ``uncertainty_maps.png`` and
``uncertainty_calibration.png``. ``python examples/uncertainty_map.py``
"""

from diffusers import DDPMPipeline, DDPMScheduler

import hessdiag
import ocm
from ocm.data import digits
from ocm.evaluation.maps import draw_maps, draw_reliability, reliability
from ocm.training.small_unet import small_unet

TIMESTEPS = (100, 500)
images = digits()

# pipeline = DiffusionPipeline.from_pretrained("path/to/your/pipeline")
unet = small_unet((1, 8, 8), width=8)
scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
pipeline = DDPMPipeline(unet, scheduler)

denoiser = ocm.Denoiser(unet, ocm.from_scheduler(scheduler), "v_prediction")
settings = ocm.TrainingSettings(num_steps=100, learning_rate=3e-3, warmup_steps=10)
ocm.train_denoiser(denoiser, images.train, settings, progress=False)

held_out = images.test[:24]
found = [ocm.uncertainty(pipeline, t, image=held_out[:4]) for t in TIMESTEPS]
draw_maps(found, "uncertainty_maps.png")

# The maps' own errors are known here; two numbers for each noise level make them honest.
plain = reliability(pipeline, held_out, TIMESTEPS, batch_size=24)
coloring = ocm.Hutchinson(denoiser, 48, probes=hessdiag.Coloring(48))
calibrated = ocm.calibrate(denoiser, coloring, images.train[:24], TIMESTEPS)
rows = {"plain": plain, "calibrated": reliability(calibrated, held_out, TIMESTEPS, batch_size=24)}
for name, levels in rows.items():
    errors = ", ".join(f"{row.standardised_error.mean:.2f} at t = {row.t}" for row in levels)
    print(f"{name:10}  standardised error {errors} (1 is right)")
draw_reliability(rows, "uncertainty_calibration.png")
print("uncertainty_maps.png and uncertainty_calibration.png are written")
