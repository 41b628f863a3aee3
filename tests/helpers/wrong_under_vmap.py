"""A function whose derivatives are right, but under vmap."""

import torch


class WrongUnderVmap(torch.autograd.Function):
    """The square of x; under vmap its derivatives are off by a tenth."""

    @staticmethod
    def forward(x):
        return x.square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return _TimesTwo.apply(ctx.saved_tensors[0], gradient)

    @staticmethod
    def jvp(ctx, tangent):
        return _TimesTwo.apply(ctx.saved_tensors[0], tangent)

    @staticmethod
    def vmap(info, in_dims, x):
        return WrongUnderVmap.apply(x), in_dims[0]


class _TimesTwo(torch.autograd.Function):
    @staticmethod
    def forward(x, y):
        return 2 * x * y

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def vmap(info, in_dims, x, y):
        x = x if in_dims[0] is None else x.movedim(in_dims[0], 0)
        return 2.2 * x * y.movedim(in_dims[1], 0), 0
