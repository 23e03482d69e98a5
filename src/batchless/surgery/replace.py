"""Build the layer that takes the place of a batch normalization or of a convolution."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchless import nn as layers
from batchless.nn.activation_gain import PUBLISHED_RELU_GAIN
from batchless.nn.group_count import group_count, values_per_group
from batchless.nn.normalizer import (
    Act,
    Bcn,
    BcnMicro,
    Bn,
    Cwn,
    FrozenBn,
    Gn,
    In,
    Ln,
    NoNorm,
    Sws,
    SyncBn,
    Weight,
    Wn,
    Ws,
)
from batchless.nn.reparameterized import Reparameterized
from batchless.nn.weight_matrix import fan_in
from batchless.surgery.pairs import Activation
from batchless.surgery.recognize import BatchNormSource, ConvolutionSource, convolution_arguments


class NormAndActivation(nn.Module):
    """A normalization followed by what timm's combined layers hold: dropping of blocks, and the activation."""

    def __init__(self, norm: nn.Module, drop: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.norm, self.drop, self.act = norm, drop, act

    def forward(self, x: Tensor) -> Tensor:
        """`act(drop(norm(x)))`."""
        output: Tensor = self.act(self.drop(self.norm(x)))
        return output


@dataclass(frozen=True)
class Built:
    """A new layer, and what the report says about it.

    `fresh_statistics`: it normalizes by statistics that have seen nothing yet. `few_values`: what to warn of, if anything.
    `dead`: its gain is a constant 0.
    """

    layer: nn.Module
    detail: str
    fresh_statistics: bool = False
    few_values: str = ""
    dead: bool = False


def build_norm(
    act: Act, source: BatchNormSource, *, statistics_hold: bool, rank: int | None, spatial: int | None, name: str
) -> Built:
    """The normalization `act` with what carries over from `source`.

    Args:
        act: what to build.
        source: the batch normalization it replaces.
        statistics_hold: whether the layer before keeps its function, so that running statistics stay true.
        rank: dimensions of its input, None if unknown.
        spatial: fewest spatial positions of its input, None if unknown.
        name: of the layer, for errors.

    Raises:
        ValueError: instance normalization of an input without space, or one value per group.
    """
    match act:
        case Gn():
            return _group_norm(source, group_count(source.num_features, largest=act.groups), spatial, name)
        case Ln():
            return _layer_norm(source, rank, spatial, name)
        case In():
            return _instance_norm(source, rank, spatial, name)
        case Bcn() | BcnMicro():
            return _batch_channel_norm(act, source, statistics_hold, spatial, name)
        case NoNorm():
            return _no_norm(source)
        case Bn() | SyncBn() | FrozenBn():
            return _batch_norm(act, source, statistics_hold, rank)


def is_already(act: Act, module: nn.Module, statistics_hold: bool) -> bool:
    """Whether a batch normalization is what the name asks for and stays the very module it is."""
    if isinstance(act, Bn):
        return isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm)
    return isinstance(act, FrozenBn) and isinstance(module, layers.FrozenBatchNorm) and statistics_hold


def starts_at_zero(source: BatchNormSource) -> bool:
    """Whether the layer's gains are all zero: a residual branch that begins as nothing."""
    return source.weight is not None and not source.weight.is_meta and not bool(source.weight.detach().any())


def _copy_affine(target: nn.Module, source: BatchNormSource) -> None:
    for name, value in (("weight", source.weight), ("bias", source.bias)):
        own = getattr(target, name, None)
        if own is not None and value is not None:
            with torch.no_grad():
                own.copy_(value.view_as(own))
            if isinstance(own, nn.Parameter) and isinstance(value, nn.Parameter):
                own.requires_grad_(value.requires_grad)


def _copy_statistics(target: Any, source: BatchNormSource, statistics_hold: bool) -> bool:
    """Carry the running statistics over where they still hold; whether they did."""
    if not statistics_hold or source.running_mean is None or source.running_var is None:
        return False
    with torch.no_grad():
        target.running_mean.copy_(source.running_mean)
        target.running_var.copy_(source.running_var)
        if isinstance(target, layers.EstimatedBatchNorm) and _has_seen_data(source.running_mean, source.running_var):
            # Past the warm-up, whose first move would replace them. Counters cannot tell: checkpoints often leave them 0.
            target.moves.fill_(math.ceil(min(float(target.memory), 2**31)))
        elif source.num_batches_tracked is not None and hasattr(target, "num_batches_tracked"):
            target.num_batches_tracked.copy_(source.num_batches_tracked)
    return True


def _statistics_detail(carried: bool) -> str:
    return "statistics carried over" if carried else "statistics start fresh"


def _has_seen_data(mean: Tensor, var: Tensor) -> bool:
    return not mean.is_meta and bool(mean.any() or (var != 1).any())


def _few_values(source: BatchNormSource, groups: int, spatial: int | None, name: str) -> str:
    """What the report says where groups hold few values on the example, "" where they hold enough or it is unknown."""
    if spatial is None:
        return ""
    values = values_per_group(source.num_features, groups, spatial)
    if values == 1:
        fix = (
            "use fewer groups, such as gn(groups=1), or skip this layer"
            if groups > 1
            else "give larger inputs, or skip it"
        )
        raise ValueError(
            f"{name}: {groups} groups of an input with {source.num_features} channels and {spatial} positions hold one "
            f"value each, whose normalized value is 0: {fix}"
        )
    return "" if values >= 8 else f"only {values} values per group on the example"


def _group_detail(source: BatchNormSource, groups: int, few_values: str) -> str:
    return "; ".join(filter(None, [f"{groups} groups of {source.num_features // groups}", few_values]))


def _group_norm(source: BatchNormSource, groups: int, spatial: int | None, name: str) -> Built:
    affine = source.weight is not None
    layer = nn.GroupNorm(
        groups, source.num_features, eps=source.eps, affine=affine, device=source.device, dtype=source.dtype
    )
    _copy_affine(layer, source)
    few = _few_values(source, groups, spatial, name)
    return Built(layer, _group_detail(source, groups, few), few_values=few)


def _layer_norm(source: BatchNormSource, rank: int | None, spatial: int | None, name: str) -> Built:
    if rank != 2:
        return _group_norm(source, 1, spatial, name)
    affine = source.weight is not None
    layer = nn.LayerNorm(
        source.num_features, eps=source.eps, elementwise_affine=affine, device=source.device, dtype=source.dtype
    )
    _copy_affine(layer, source)
    return Built(layer, "over the features")


def _instance_norm(source: BatchNormSource, rank: int | None, spatial: int | None, name: str) -> Built:
    if rank == 2 or spatial == 1:
        shape = "[N, C]" if rank == 2 else "one position wide"
        raise ValueError(
            f"{name}: instance normalization needs an input with space, this one is {shape}: use gn or ln, or skip this layer"
        )
    dimensions = rank - 2 if rank is not None else (source.dimensions or 2)
    kind = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dimensions - 1]
    affine = source.weight is not None
    layer = kind(source.num_features, eps=source.eps, affine=affine, device=source.device, dtype=source.dtype)
    _copy_affine(layer, source)
    return Built(layer, "")


def _batch_channel_norm(
    act: Bcn | BcnMicro, source: BatchNormSource, statistics_hold: bool, spatial: int | None, name: str
) -> Built:
    groups = group_count(source.num_features, largest=act.groups)
    common: dict[str, Any] = {
        "affine": source.weight is not None,
        "device": source.device,
        "dtype": source.dtype,
    }
    averages = ""
    if isinstance(act, Bcn):
        momentum, averages = _momentum(source)
        layer = layers.BatchChannelNorm(
            source.num_features, groups, statistics="batch", eps=act.eps, sync=act.sync, momentum=momentum, **common
        )
    else:
        layer = layers.BatchChannelNorm(
            source.num_features,
            groups,
            eps=source.eps,
            memory=act.memory,
            update=act.update,
            warmup=act.warmup,
            **common,
        )
    carried = _copy_statistics(layer.batch_norm, source, statistics_hold)
    few = _few_values(source, groups, spatial, name)
    detail = f"{_group_detail(source, groups, few)}; {_statistics_detail(carried)}{averages}"
    if starts_at_zero(source) and layer.weight is not None:
        # A zero inner gain before channel normalization gave 400x gradients: the outer, per-group gain starts at zero.
        nn.init.zeros_(layer.weight)
        detail += "; zero gain moved to the groups"
    else:
        _copy_affine(layer.batch_norm, source)
    return Built(layer, detail, fresh_statistics=not carried, few_values=few)


def _no_norm(source: BatchNormSource) -> Built:
    if starts_at_zero(source):
        return Built(
            layers.SkipInit(source.num_features, device=source.device, dtype=source.dtype), "zero gain became a scalar"
        )
    return Built(nn.Identity(), "")


def _batch_norm(act: Bn | SyncBn | FrozenBn, source: BatchNormSource, statistics_hold: bool, rank: int | None) -> Built:
    common: dict[str, Any] = {"eps": source.eps, "device": source.device, "dtype": source.dtype}
    averages = ""
    layer: nn.Module
    if isinstance(act, FrozenBn):
        layer = layers.FrozenBatchNorm(source.num_features, **common)
    elif isinstance(act, SyncBn):
        momentum, averages = _momentum(source)
        layer = layers.BatchNorm(
            source.num_features, momentum=momentum, sync=True, affine=source.weight is not None, **common
        )
    else:
        dimensions = source.dimensions or (max(rank - 2, 1) if rank is not None else 2)
        kind = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
        layer = kind(source.num_features, momentum=source.momentum, affine=source.weight is not None, **common)
    _copy_affine(layer, source)
    carried = _copy_statistics(layer, source, statistics_hold)
    dead = isinstance(act, FrozenBn) and starts_at_zero(source)
    detail = _statistics_detail(carried) + averages + ("; its gain is a constant 0" if dead else "")
    return Built(layer, detail, fresh_statistics=not carried, dead=dead)


def _momentum(source: BatchNormSource) -> tuple[float, str]:
    """The momentum of our own layers, which know no cumulative average, and what the report says of it."""
    if source.momentum is None:
        return 0.1, "; momentum 0.1 in place of a cumulative average"
    return source.momentum, ""


def build_convolution(
    weight: Weight,
    module: nn.Module,
    source: ConvolutionSource,
    activation: Activation | None,
    *,
    activation_known: bool,
    scale: float = 1.0,
) -> Built:
    """The reparameterized layer of `module`'s kind, holding the same weight and bias parameters.

    Args:
        weight: the reparameterization.
        module: the convolution.
        source: what is known of its kind.
        activation: what feeds it, None if nothing does or it is unknown.
        activation_known: whether `activation` is a fact.
        scale: of the weight of `sws`, beside gamma.
    """
    prefix = {Ws: "WS", Sws: "ScaledWS", Wn: "WN", Cwn: "CWN"}[type(weight)]
    kind: type[Reparameterized] = getattr(layers, prefix + source.plain.__name__)
    settings, detail = _settings(weight, activation, activation_known, scale)
    old: Any = module
    # On the meta device nothing is allocated or initialized: the parameters are the old layer's own.
    new: Any = kind(**convolution_arguments(module), **settings, device="meta", dtype=old.weight.dtype)
    new.weight = old.weight
    new.bias = old.bias
    if getattr(new, "gain", None) is not None:
        new.gain = nn.Parameter(torch.empty(new.gain.shape, device=old.weight.device, dtype=old.weight.dtype))
        new.reset_gain()
    if source.pad_input is not None:
        new.pad_input = source.pad_input
    return Built(new, detail)


def _settings(weight: Weight, activation: Activation | None, known: bool, scale: float) -> tuple[dict[str, Any], str]:
    match weight:
        case Ws():
            return {"preset": weight.preset, "eps": weight.eps}, ""
        case Sws():
            gamma, why = _gamma(weight, activation, known)
            settings = {"preset": weight.preset, "eps": weight.eps, "gain": weight.gain, "gamma": gamma * scale}
            return settings, f"gamma {gamma:.4f} ({why}){'' if scale == 1 else f' times {scale:.4f}'}"
        case _:
            return {}, ""


def _gamma(weight: Sws, activation: Activation | None, known: bool) -> tuple[float, str]:
    if isinstance(weight.gamma, int | float):
        return float(weight.gamma), "as set"
    if weight.gamma == "constant" or not known:
        return PUBLISHED_RELU_GAIN, "constant" if weight.gamma == "constant" else "constant: the activation is unknown"
    if activation is None:
        return 1.0, "no activation before it"
    return activation.gain, activation.name


def fits_fan_in(weight: Weight, module: nn.Module) -> bool:
    """Whether the reparameterization leaves the layer alive: centring needs a fan-in of 2 or more."""
    conv: Any = module
    return isinstance(weight, Wn) or fan_in(conv.weight, transposed=conv.transposed, groups=conv.groups) > 1
