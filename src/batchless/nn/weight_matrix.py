"""A layer's weight seen as a matrix with one row per output channel.

Letters: O output channels, I fan-in of one output channel = inputs / groups * prod(kernel), K.. kernel.
"""

import math

from torch import Tensor


def fan_in(weight: Tensor, *, transposed: bool = False, groups: int = 1) -> int:
    """Number I of weights that feed one output channel.

    Args:
        weight: `[O, inputs/groups, K..]`, or `[inputs, O/groups, K..]` if `transposed`; `[O, inputs]` for a linear layer.
        transposed: whether the layout is that of a transposed convolution.
        groups: groups of the convolution.
    """
    inputs_per_group = weight.shape[0] // groups if transposed else weight.shape[1]
    return inputs_per_group * math.prod(weight.shape[2:])


def to_matrix(weight: Tensor, *, transposed: bool = False, groups: int = 1) -> Tensor:
    """The weight as `[O, I]`: every row holds the weights of one output channel.

    For a transposed convolution `[inputs, O/groups, K..]` the output channel is (group, dim 1), and its row runs over
    the inputs of its group and the kernel. The result is a view where the layout allows it.
    """
    if not transposed:
        return weight.reshape(weight.shape[0], -1)
    inputs, outputs_per_group, *kernel = weight.shape
    grouped = weight.reshape(groups, inputs // groups, outputs_per_group, math.prod(kernel))
    return grouped.transpose(1, 2).reshape(groups * outputs_per_group, -1)


def from_matrix(matrix: Tensor, like: Tensor, *, transposed: bool = False, groups: int = 1) -> Tensor:
    """The inverse of `to_matrix`: `[O, I]` back to the shape of `like`."""
    if not transposed:
        return matrix.reshape(like.shape)
    inputs, outputs_per_group, *kernel = like.shape
    grouped = matrix.reshape(groups, outputs_per_group, inputs // groups, math.prod(kernel))
    return grouped.transpose(1, 2).reshape(like.shape)
