"""Faults of the kernels, their references and their launches."""

from __future__ import annotations

from faults.fault import Fault

NUMBERS = ("tests/kernels/test_random_numbers.py",)
STEP = ("tests/kernels/test_gaussian_step.py",)
FUNCTIONS = (*NUMBERS, "-k", "last_place")
UNIFORM = (*NUMBERS, "-k", "open_interval")
BOUNDS = (*STEP, "-k", "one_clamp")
MOMENTS = ("tests/kernels/test_probe_moments.py",)
LOSS = ("tests/kernels/test_ocm_loss.py",)
LAUNCH = ("tests/kernels/test_launch.py",)
SIGNS_AND_NORMALS = (*NUMBERS, "-k", "in_numpy_pytorch_and_triton")
KERNEL_STEP = (*STEP, "-k", "triton_kernel_is_the_reference or either_sign")
KERNEL_MOMENTS = (*MOMENTS, "-k", "tiles or split or everywhere or float32")
KERNEL_LOSS = (*LOSS, "-k", "against_autograd or everywhere")
# As compiled for a GPU.
COMPILED = ("--emulate", "tests/kernels/emulated/test_specialisations.py", "-k")
LARGE = ("--emulate", "tests/kernels/emulated/test_large.py", "-k")

DEVICE = "hessdiag/kernels/philox_triton.py"
RADEMACHER = "hessdiag/kernels/rademacher.py"
NORMAL = "hessdiag/kernels/normal.py"
GAUSSIAN_STEP = "hessdiag/kernels/gaussian_step.py"
PROBE_MOMENTS = "hessdiag/kernels/probe_moments.py"
OCM_LOSS = "hessdiag/kernels/ocm_loss.py"

FAULTS = [
    # The random-number contract in Triton.
    Fault("another multiplier", DEVICE, "* 0xCD9E8D57", "* 0xCD9E8D59", SIGNS_AND_NORMALS),
    Fault("nine rounds", DEVICE, "tl.static_range(10)", "tl.static_range(9)", SIGNS_AND_NORMALS),
    Fault("another key", DEVICE, "0xBB67AE85", "0xBB67AE86", SIGNS_AND_NORMALS),
    Fault(
        "low halves exchanged",
        DEVICE,
        "c1 = product1.to(tl.uint32)",
        "c1 = product0.to(tl.uint32)",
        SIGNS_AND_NORMALS,
    ),
    Fault(
        "high word of the seed ignored",
        DEVICE,
        "k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)",
        "k1 = (seed & 0).to(tl.uint32)",
        SIGNS_AND_NORMALS,
    ),
    Fault(
        "signs turned round", DEVICE, "return w0 ^ 0xFFFFFFFF, ", "return w0, ", SIGNS_AND_NORMALS
    ),
    Fault("a probe in the next word", DEVICE, "probe < 12", "probe <= 12", SIGNS_AND_NORMALS),
    Fault(
        "bits in another order",
        DEVICE,
        "shifted = word[:, None] << (31 -",
        "shifted = word[:, None] << (24 +",
        SIGNS_AND_NORMALS,
    ),
    Fault("uniform numbers from 0", DEVICE, "tl.constexpr(2.0**-33)", "tl.constexpr(0.0)", UNIFORM),
    Fault(
        "uniform numbers up to 1",
        DEVICE,
        "tl.constexpr(1.0 - 2.0**-24)",
        "tl.constexpr(1.0)",
        UNIFORM,
    ),
    Fault(
        "a coefficient of the logarithm",
        DEVICE,
        "0.08333306014537811",
        "0.08334306014537811",
        FUNCTIONS,
    ),
    Fault("the mantissa's range", DEVICE, "0x3F2AAAAB", "0x3F000000", FUNCTIONS),
    Fault(
        "a coefficient of the sine",
        DEVICE,
        "6.2831854820251465",
        "6.2832854820251465",
        FUNCTIONS,
    ),
    Fault(
        "the cosine's sign",
        DEVICE,
        "(negative + 0x40000000)",
        "(negative + 0x80000000)",
        FUNCTIONS,
    ),
    Fault(
        "odd quarters not swapped",
        DEVICE,
        "(quarters & 1) != 0",
        "(quarters & 4) != 0",
        FUNCTIONS,
    ),
    # Which elements a program reads and writes.
    Fault(
        "one group too many",
        DEVICE,
        "exists = index < batch * groups_per_sample",
        "exists = index <= batch * groups_per_sample",
        (*COMPILED, "test_signs and 72"),
    ),
    Fault(
        "one feature too many",
        DEVICE,
        "left = tl.minimum(features - first, FEATURES)",
        "left = tl.minimum(features - first + 1, FEATURES)",
        (*COMPILED, "test_signs and 3x7"),
    ),
    Fault(
        "one feature too few",
        DEVICE,
        "return room > 0 if ALIGNED else feature < room",
        "return room > 0 if ALIGNED else feature + 1 < room",
        KERNEL_LOSS,
    ),
    Fault(
        "offsets of whole groups in int32",
        DEVICE,
        "offset = index.to(tl.int64)[:, None] * FEATURES",
        "offset = (index[:, None] * FEATURES).to(tl.int64)",
        (*LARGE, "test_signs"),
    ),
    Fault(
        "offsets within a sample in int32",
        DEVICE,
        "first = group.to(tl.int64) * FEATURES",
        "first = (group * FEATURES).to(tl.int32).to(tl.int64)",
        (*LARGE, "test_signs"),
    ),
    Fault(
        "offsets of samples in int32",
        DEVICE,
        "offset = (sample.to(tl.int64) * features + first)",
        "offset = ((sample.to(tl.int32) * features.to(tl.int32)).to(tl.int64) + first)",
        (*LARGE, "test_signs"),
    ),
    Fault(
        "wide programs in int32",
        DEVICE,
        "index = program.to(tl.int64) * GROUPS",
        "index = (program * GROUPS).to(tl.int64)",
        (*LARGE, "test_signs"),
    ),
    Fault(
        "2**32 samples are none",
        DEVICE,
        "(number.to(tl.uint32) - 1).to(tl.int64) + 1",
        "number.to(tl.uint32).to(tl.int64)",
        (*LARGE, "as_many"),
    ),
    Fault(
        "rows one sample apart",
        DEVICE,
        "length = whole_number(batch) * whole_number(features)",
        "length = whole_number(features)",
        SIGNS_AND_NORMALS,
    ),
    Fault(
        "the second half where the first is",
        DEVICE,
        "tl.store(place + width, high, mask=exists_at(room, feature + width, ALIGNED))",
        "tl.store(place, high, mask=exists_at(room, feature + width, ALIGNED))",
        KERNEL_MOMENTS,
    ),
    Fault(
        "the mask of the first half for the second",
        DEVICE,
        "high = tl.load(place + width, mask=exists_at(room, feature + width, ALIGNED))",
        "high = tl.load(place + width, mask=exists_at(room, feature, ALIGNED))",
        (*COMPILED, "test_moments and (3x7 or 1x1x1)"),
    ),
    Fault(
        "the sign bit of float64",
        DEVICE,
        "(signs.to(tl.uint64) << 32)",
        "(signs.to(tl.uint64) << 31)",
        KERNEL_MOMENTS,
    ),
    # Layouts, tiles and launches.
    Fault(
        "wide from 2**32 on",
        "hessdiag/kernels/_layout.py",
        "num_groups + groups_per_program > 2**31",
        "num_groups + groups_per_program > 2**32",
        LAUNCH,
    ),
    Fault(
        "wide without the last program's groups",
        "hessdiag/kernels/_layout.py",
        "num_groups + groups_per_program > 2**31",
        "num_groups > 2**31",
        LAUNCH,
    ),
    Fault(
        "the reciprocal rounded down",
        "hessdiag/kernels/_layout.py",
        "return -(-(2 ** (31 + shift)) // divisor), shift",
        "return 2 ** (31 + shift) // divisor, shift",
        LAUNCH,
    ),
    Fault(
        "more rows than CUDA takes",
        "hessdiag/kernels/_layout.py",
        "min(count, 65_535)",
        "min(count, 65_536)",
        (*LARGE, "fill"),
    ),
    Fault(
        "a kernel for another alignment",
        "hessdiag/kernels/_launch.py",
        "aligned = aligned << 1 | (tensor.data_ptr() & 15 == 0)",
        "aligned = 1",
        LAUNCH,
    ),
    Fault(
        "a kernel for other types",
        "hessdiag/kernels/_launch.py",
        ", *[tensor.dtype for tensor in tensors])",
        ")",
        LAUNCH,
    ),
    Fault(
        "a kernel for other constants",
        "hessdiag/kernels/_launch.py",
        "num_warps, constants, *",
        "num_warps, *",
        LAUNCH,
    ),
    Fault(
        "tiles without the first probe's place",
        "hessdiag/kernels/philox.py",
        "num_tiles = -(-(first_probe + num_probes) // PROBES_PER_SIGN_TILE)",
        "num_tiles = -(-num_probes // PROBES_PER_SIGN_TILE)",
        LAUNCH,
    ),
    Fault(
        "whole tiles from the middle",
        "hessdiag/kernels/philox.py",
        "whole = first_probe == 0 and num_probes",
        "whole = num_probes",
        LAUNCH,
    ),
    # Signs and normals.
    Fault(
        "probes beyond the last",
        RADEMACHER,
        "tl.minimum(rows_left, 16).to(tl.int32)",
        "tl.minimum(rows_left + 1, 16).to(tl.int32)",
        (*COMPILED, "test_signs and 5x2x12"),
    ),
    Fault(
        "filling programs write",
        RADEMACHER,
        "if rows_left > 0:",
        "if rows_left > -16:",
        (*LARGE, "fill"),
    ),
    Fault(
        "half in place of one", RADEMACHER, "0x3C000000", "0x38000000", (*NUMBERS, "-k", "dtype")
    ),
    Fault(
        "steps that only fill the grid",
        NORMAL,
        "if step < philox_triton.whole_number(num_steps):",
        "if step <= philox_triton.whole_number(num_steps):",
        (*LARGE, "fill"),
    ),
    Fault(
        "every step the first",
        NORMAL,
        "(first_step + step).to(tl.uint32)",
        "first_step.to(tl.uint32)",
        (*NUMBERS, "-k", "normal_probes"),
    ),
    # The Gaussian step.
    Fault(
        "NaN clamped away",
        GAUSSIAN_STEP,
        ", propagate_nan=tl.PropagateNan.ALL",
        "",
        (*COMPILED, "nan"),
    ),
    Fault(
        "no clamp at 0 of the noise's variance",
        GAUSSIAN_STEP,
        "min(max(low, 0.0), most)",
        "low",
        BOUNDS,
    ),
    Fault(
        "no clamp at 0 for samples of their own",
        GAUSSIAN_STEP,
        "noise_variance = _clamp(noise_variance, 0.0, noise_variance_high)",
        "noise_variance = _clamp(noise_variance, -1.0, noise_variance_high)",
        KERNEL_STEP,
    ),
    Fault(
        "a factor of 0 lets the variance in",
        GAUSSIAN_STEP,
        "k, low, high = 1.0, c, c",
        "k, low, high = 1.0, c, c + 1.0",
        BOUNDS,
    ),
    Fault("bounds of a negative factor", GAUSSIAN_STEP, "if k < 0.0:", "if k < -1.0:", BOUNDS),
    Fault(
        "no upper bound of the noise",
        GAUSSIAN_STEP,
        "min(max(high, 0.0), most)",
        "max(high, 0.0)",
        BOUNDS,
    ),
    Fault(
        "x0_hat unclamped",
        GAUSSIAN_STEP,
        "x0_hat = _clamp(p * x_t + q * prediction, x0_low, x0_high)",
        "x0_hat = p * x_t + q * prediction",
        KERNEL_STEP,
    ),
    Fault(
        "coefficients of the next row",
        GAUSSIAN_STEP,
        "b = tl.load(row + 3",
        "b = tl.load(row + 2",
        KERNEL_STEP,
    ),
    Fault(
        "the variance of the wrong sample",
        GAUSSIAN_STEP,
        "place = variance_ptr + sample.to(tl.int64)[:, None]",
        "place = variance_ptr + group.to(tl.int64)[:, None]",
        (*COMPILED, "test_step and sample and 3x7"),
    ),
    # Moments.
    Fault(
        "the weight of one probe less",
        PROBE_MOMENTS,
        "mean += delta * (1.0 / (before + 1).to(mean.dtype))",
        "mean += delta * (1.0 / tl.maximum(before, 1).to(mean.dtype))",
        KERNEL_MOMENTS,
    ),
    Fault(
        "deviations from the old mean",
        PROBE_MOMENTS,
        "return mean, deviations + delta * (y - mean)\n\n\ndef probe",
        "return mean, deviations + delta * delta\n\n\ndef probe",
        KERNEL_MOMENTS,
    ),
    Fault(
        "the probes before forgotten",
        PROBE_MOMENTS,
        "before = count.to(tl.uint32).to(tl.int64) + row",
        "before = row",
        KERNEL_MOMENTS,
    ),
    Fault(
        "tiles of 15 taken for whole",
        PROBE_MOMENTS,
        "end - first == 16",
        "end - first >= 15",
        KERNEL_MOMENTS,
    ),
    Fault(
        "the sign of another probe",
        PROBE_MOMENTS,
        "word = words[probe // 4] >> (8 * (probe % 4))",
        "word = words[probe // 4] >> (8 * (3 - probe % 4))",
        KERNEL_MOMENTS,
    ),
    Fault(
        "long rows from the mean before",
        PROBE_MOMENTS,
        "add(mean, share, mean)\n        subtract(y, mean, y)",
        "subtract(y, mean, y)\n        add(mean, share, mean)",
        (*MOMENTS, "-k", "operators_of_pytorch"),
    ),
    # The loss.
    Fault("a sum in place of a mean", OCM_LOSS, "scale / num_probes,", "scale,", KERNEL_LOSS),
    Fault(
        "features that do not exist counted",
        OCM_LOSS,
        "tl.sum(tl.where(exists, square, 0.0))",
        "tl.sum(square)",
        (*COMPILED, "test_loss and 3x7"),
    ),
    Fault(
        "the gradient halved",
        OCM_LOSS,
        "(2.0 if backward else 1.0) / head.numel()",
        "1.0 / head.numel()",
        KERNEL_LOSS,
    ),
    Fault(
        "weights of samples ignored",
        OCM_LOSS,
        "square = weight * square",
        "square = 1.0 * square",
        KERNEL_LOSS,
    ),
    Fault(
        "the shift forgotten",
        OCM_LOSS,
        "residual = head.to(tl.float32) - scale * total - offset_of_target",
        "residual = head.to(tl.float32) - scale * total",
        KERNEL_LOSS,
    ),
]
