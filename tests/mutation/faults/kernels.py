"""Faults of the kernels, their references and their launches."""

from __future__ import annotations

from faults.fault import in_file

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
    *in_file(
        DEVICE,
        SIGNS_AND_NORMALS,
        ("another multiplier", "* 0xCD9E8D57", "* 0xCD9E8D59"),
        ("nine rounds", "tl.static_range(10)", "tl.static_range(9)"),
        ("another key", "0xBB67AE85", "0xBB67AE86"),
        ("low halves exchanged", "c1 = product1.to(tl.uint32)", "c1 = product0.to(tl.uint32)"),
        (
            "high word of the seed ignored",
            "k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)",
            "k1 = (seed & 0).to(tl.uint32)",
        ),
        ("signs turned round", "return w0 ^ 0xFFFFFFFF, ", "return w0, "),
        ("a probe in the next word", "probe < 12", "probe <= 12"),
        (
            "bits in another order",
            "shifted = word[:, None] << (31 -",
            "shifted = word[:, None] << (24 +",
        ),
    ),
    *in_file(
        DEVICE,
        UNIFORM,
        ("uniform numbers from 0", "tl.constexpr(2.0**-33)", "tl.constexpr(0.0)"),
        ("uniform numbers up to 1", "tl.constexpr(1.0 - 2.0**-24)", "tl.constexpr(1.0)"),
    ),
    *in_file(
        DEVICE,
        FUNCTIONS,
        ("a coefficient of the logarithm", "0.08333306014537811", "0.08334306014537811"),
        ("the mantissa's range", "0x3F2AAAAB", "0x3F000000"),
        ("a coefficient of the sine", "6.2831854820251465", "6.2832854820251465"),
        ("the cosine's sign", "(negative + 0x40000000)", "(negative + 0x80000000)"),
        ("odd quarters not swapped", "(quarters & 1) != 0", "(quarters & 4) != 0"),
    ),
    # Which elements a program reads and writes.
    *in_file(
        DEVICE,
        (*COMPILED, "test_signs and 72"),
        (
            "one group too many",
            "exists = index < batch * groups_per_sample",
            "exists = index <= batch * groups_per_sample",
        ),
    ),
    *in_file(
        DEVICE,
        (*COMPILED, "test_signs and 3x7"),
        (
            "one feature too many",
            "left = tl.minimum(features - first, FEATURES)",
            "left = tl.minimum(features - first + 1, FEATURES)",
        ),
    ),
    *in_file(
        DEVICE,
        KERNEL_LOSS,
        (
            "one feature too few",
            "return room > 0 if ALIGNED else feature < room",
            "return room > 0 if ALIGNED else feature + 1 < room",
        ),
    ),
    *in_file(
        DEVICE,
        (*LARGE, "test_signs"),
        (
            "offsets of whole groups in int32",
            "offset = index.to(tl.int64)[:, None] * FEATURES",
            "offset = (index[:, None] * FEATURES).to(tl.int64)",
        ),
        (
            "offsets within a sample in int32",
            "first = group.to(tl.int64) * FEATURES",
            "first = (group * FEATURES).to(tl.int32).to(tl.int64)",
        ),
        (
            "offsets of samples in int32",
            "offset = (sample.to(tl.int64) * features + first)",
            "offset = ((sample.to(tl.int32) * features.to(tl.int32)).to(tl.int64) + first)",
        ),
        (
            "wide programs in int32",
            "index = program.to(tl.int64) * GROUPS",
            "index = (program * GROUPS).to(tl.int64)",
        ),
    ),
    *in_file(
        DEVICE,
        (*LARGE, "as_many"),
        (
            "2**32 samples are none",
            "(number.to(tl.uint32) - 1).to(tl.int64) + 1",
            "number.to(tl.uint32).to(tl.int64)",
        ),
    ),
    *in_file(
        DEVICE,
        SIGNS_AND_NORMALS,
        (
            "rows one sample apart",
            "length = whole_number(batch) * whole_number(features)",
            "length = whole_number(features)",
        ),
    ),
    *in_file(
        DEVICE,
        KERNEL_MOMENTS,
        (
            "the second half where the first is",
            "tl.store(place + width, high, mask=exists_at(room, feature + width, ALIGNED))",
            "tl.store(place, high, mask=exists_at(room, feature + width, ALIGNED))",
        ),
        ("the sign bit of float64", "(signs.to(tl.uint64) << 32)", "(signs.to(tl.uint64) << 31)"),
    ),
    *in_file(
        DEVICE,
        (*COMPILED, "test_moments and (3x7 or 1x1x1)"),
        (
            "the mask of the first half for the second",
            "high = tl.load(place + width, mask=exists_at(room, feature + width, ALIGNED))",
            "high = tl.load(place + width, mask=exists_at(room, feature, ALIGNED))",
        ),
    ),
    # Layouts, tiles and launches.
    *in_file(
        "hessdiag/kernels/_layout.py",
        LAUNCH,
        (
            "wide from 2**32 on",
            "num_groups + groups_per_program > 2**31",
            "num_groups + groups_per_program > 2**32",
        ),
        (
            "wide without the last program's groups",
            "num_groups + groups_per_program > 2**31",
            "num_groups > 2**31",
        ),
        (
            "the reciprocal rounded down",
            "return -(-(2 ** (31 + shift)) // divisor), shift",
            "return 2 ** (31 + shift) // divisor, shift",
        ),
    ),
    *in_file(
        "hessdiag/kernels/_layout.py",
        (*LARGE, "fill"),
        ("more rows than CUDA takes", "min(count, 65_535)", "min(count, 65_536)"),
    ),
    *in_file(
        "hessdiag/kernels/_launch.py",
        LAUNCH,
        (
            "a kernel for another alignment",
            "aligned = aligned << 1 | (tensor.data_ptr() & 15 == 0)",
            "aligned = 1",
        ),
        ("a kernel for other types", ", *[tensor.dtype for tensor in tensors])", ")"),
        ("a kernel for other constants", "num_warps, constants, *", "num_warps, *"),
    ),
    *in_file(
        "hessdiag/kernels/philox.py",
        LAUNCH,
        (
            "tiles without the first probe's place",
            "num_tiles = -(-(first_probe + num_probes) // PROBES_PER_SIGN_TILE)",
            "num_tiles = -(-num_probes // PROBES_PER_SIGN_TILE)",
        ),
        (
            "whole tiles from the middle",
            "whole = first_probe == 0 and num_probes",
            "whole = num_probes",
        ),
    ),
    # Signs and normals.
    *in_file(
        RADEMACHER,
        (*COMPILED, "test_signs and 5x2x12"),
        (
            "probes beyond the last",
            "tl.minimum(rows_left, 16).to(tl.int32)",
            "tl.minimum(rows_left + 1, 16).to(tl.int32)",
        ),
    ),
    *in_file(
        RADEMACHER,
        (*LARGE, "fill"),
        ("filling programs write", "if rows_left > 0:", "if rows_left > -16:"),
    ),
    *in_file(
        RADEMACHER, (*NUMBERS, "-k", "dtype"), ("half in place of one", "0x3C000000", "0x38000000")
    ),
    *in_file(
        NORMAL,
        (*LARGE, "fill"),
        (
            "steps that only fill the grid",
            "if step < philox_triton.whole_number(num_steps):",
            "if step <= philox_triton.whole_number(num_steps):",
        ),
    ),
    *in_file(
        NORMAL,
        (*NUMBERS, "-k", "normal_probes"),
        ("every step the first", "(first_step + step).to(tl.uint32)", "first_step.to(tl.uint32)"),
    ),
    # The Gaussian step.
    *in_file(
        GAUSSIAN_STEP,
        (*COMPILED, "nan"),
        ("NaN clamped away", ", propagate_nan=tl.PropagateNan.ALL", ""),
    ),
    *in_file(
        GAUSSIAN_STEP,
        BOUNDS,
        ("no clamp at 0 of the noise's variance", "min(max(low, 0.0), most)", "low"),
        (
            "a factor of 0 lets the variance in",
            "k, low, high = 1.0, c, c",
            "k, low, high = 1.0, c, c + 1.0",
        ),
        ("bounds of a negative factor", "if k < 0.0:", "if k < -1.0:"),
        ("no upper bound of the noise", "min(max(high, 0.0), most)", "max(high, 0.0)"),
    ),
    *in_file(
        GAUSSIAN_STEP,
        KERNEL_STEP,
        (
            "no clamp at 0 for samples of their own",
            "noise_variance = _clamp(noise_variance, 0.0, noise_variance_high)",
            "noise_variance = _clamp(noise_variance, -1.0, noise_variance_high)",
        ),
        (
            "x0_hat unclamped",
            "x0_hat = _clamp(p * x_t + q * prediction, x0_low, x0_high)",
            "x0_hat = p * x_t + q * prediction",
        ),
        ("coefficients of the next row", "b = tl.load(row + 3", "b = tl.load(row + 2"),
    ),
    *in_file(
        GAUSSIAN_STEP,
        (*COMPILED, "test_step and sample and 3x7"),
        (
            "the variance of the wrong sample",
            "place = variance_ptr + sample.to(tl.int64)[:, None]",
            "place = variance_ptr + group.to(tl.int64)[:, None]",
        ),
    ),
    # Moments.
    *in_file(
        PROBE_MOMENTS,
        KERNEL_MOMENTS,
        (
            "the weight of one probe less",
            "mean += delta * (1.0 / (before + 1).to(mean.dtype))",
            "mean += delta * (1.0 / tl.maximum(before, 1).to(mean.dtype))",
        ),
        (
            "deviations from the old mean",
            "return mean, deviations + delta * (y - mean)\n\n\ndef probe",
            "return mean, deviations + delta * delta\n\n\ndef probe",
        ),
        (
            "the probes before forgotten",
            "before = count.to(tl.uint32).to(tl.int64) + row",
            "before = row",
        ),
        ("tiles of 15 taken for whole", "end - first == 16", "end - first >= 15"),
        (
            "the sign of another probe",
            "word = words[probe // 4] >> (8 * (probe % 4))",
            "word = words[probe // 4] >> (8 * (3 - probe % 4))",
        ),
    ),
    *in_file(
        PROBE_MOMENTS,
        (*MOMENTS, "-k", "operators_of_pytorch"),
        (
            "long rows from the mean before",
            "add(mean, share, mean)\n        subtract(y, mean, y)",
            "subtract(y, mean, y)\n        add(mean, share, mean)",
        ),
    ),
    # The loss.
    *in_file(
        OCM_LOSS,
        KERNEL_LOSS,
        ("a sum in place of a mean", "scale / num_probes,", "scale,"),
        ("the gradient halved", "(2.0 if backward else 1.0) / head.numel()", "1.0 / head.numel()"),
        ("weights of samples ignored", "square = weight * square", "square = 1.0 * square"),
        (
            "the shift forgotten",
            "residual = head.to(tl.float32) - scale * total - offset_of_target",
            "residual = head.to(tl.float32) - scale * total",
        ),
    ),
    *in_file(
        OCM_LOSS,
        (*COMPILED, "test_loss and 3x7"),
        (
            "features that do not exist counted",
            "tl.sum(tl.where(exists, square, 0.0))",
            "tl.sum(square)",
        ),
    ),
]
