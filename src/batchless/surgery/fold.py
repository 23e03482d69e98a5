"""Turn a trained model into plain torch layers with the same outputs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchless.nn.batch_channel_norm import BatchChannelNorm
from batchless.nn.batch_norm import BatchNorm, FrozenBatchNorm
from batchless.nn.estimated_batch_norm import EstimatedBatchNorm
from batchless.nn.reparameterized import LinearForward, Reparameterized
from batchless.nn.same_padding import SamePad
from batchless.nn.skip_init import SkipInit
from batchless.nn.weight_matrix import from_matrix, to_matrix
from batchless.surgery.convert import conversion_of, forget_conversion
from batchless.surgery.dataflow import pairs_by_example
from batchless.surgery.recognize import (
    PLAIN_CONVOLUTIONS,
    ConvolutionSource,
    convolution_arguments,
    is_batch_normalization,
    read_batch_norm,
    read_convolution,
)
from batchless.surgery.replace import NormAndActivation
from batchless.surgery.swap import Places, copy_of


def fold(model: nn.Module, example: object = None) -> nn.Module:
    """A copy of `model` in torch's own layers with the same outputs in evaluation mode, for deployment and export.

    Reparameterized weights are computed once and for all. A normalization by constants (batch normalization in evaluation
    mode, BCN's first step, SkipInit's scalar) is merged into the layer before it where that layer feeds it and nothing
    else; elsewhere it becomes a `torch.nn.BatchNorm`. BCN's second step becomes a `torch.nn.GroupNorm`.

    Do not train the result: its weights are no longer standardized, and folding cannot be undone.

    Args:
        model: in evaluation mode; it is not changed.
        example: as in `convert`. A model converted with one needs none here; for others it shows what can be merged.

    Raises:
        ValueError: the model or a part of it is in training mode, whose function cannot be folded.

    >>> from batchless.nn import WSConv2d
    >>> folded = fold(nn.Sequential(WSConv2d(3, 8, 3), nn.GroupNorm(4, 8)).eval())
    >>> [type(layer).__name__ for layer in folded]
    ['Conv2d', 'GroupNorm']
    """
    training = [name or "(model)" for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(
            f"fold needs the model in evaluation mode, but {len(training)} of its modules train (first: {training[0]}): "
            "call model.eval()"
        )
    conversion = conversion_of(model)
    pairs = {} if conversion is None else conversion.pairs
    ranks = {} if conversion is None else conversion.ranks
    if example is not None:
        found = pairs_by_example(model, example)
        pairs = {**pairs, **found.certain()}
        ranks = {**ranks, **found.rank}
    folded = copy_of(model)
    forget_conversion(folded)
    with torch.no_grad():
        places = Places(folded)
        for module in list(folded.modules()):
            if isinstance(module, Reparameterized):
                places.replace(module, _plain_layer(module))
        present = {name for name, _ in places.model.named_modules()}  # layers may have been taken out since
        feeding = {norm: layer for layer, norm in pairs.items() if layer in present}
        for name, module in list(places.model.named_modules()):
            layer = _mergeable(places.model, name, feeding[name]) if name in feeding else None
            if (instead := _folded_norm(module, layer, ranks.get(name))) is not None:
                places.replace(module, instead)
        for module in list(places.model.modules()):
            if isinstance(module, NormAndActivation):
                parts = [part for part in module.children() if not isinstance(part, nn.Identity)]
                places.replace(module, nn.Sequential(*parts))
    return places.model.eval()


@dataclass(frozen=True)
class _Affine:
    """`y = scale * (x - mean) + shift` per channel, in float64, and what runs after it."""

    scale: Tensor
    mean: Tensor
    shift: Tensor
    then: nn.Module

    def as_batch_norm(self, rank: int | None, like: Tensor) -> nn.Module:
        """The same map as a batch normalization in evaluation mode with variance 1 - eps, so that `scale` stays itself."""
        kind = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[max((rank or 4) - 3, 0)]
        layer = kind(self.scale.numel(), device=like.device, dtype=like.dtype)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.copy_(self.mean)
        layer.running_var.fill_(1 - layer.eps)
        layer.weight.copy_(self.scale)
        layer.bias.copy_(self.shift)
        return layer.eval()


def _mergeable(model: nn.Module, norm: str, layer: str) -> nn.Module | None:
    """The layer that a normalization can be merged into: one that only adds up weighted inputs, with nothing between."""
    found = model.get_submodule(layer)
    wrapper = model.get_submodule(norm.rpartition(".")[0])
    before_norm = [model.get_submodule(norm), *([wrapper] if isinstance(wrapper, NormAndActivation) else [])]
    if found._forward_hooks or any(module._forward_pre_hooks for module in before_norm):
        return None
    if isinstance(found, nn.Sequential):  # an input padding and the convolution that a reparameterized one became
        found = found[-1]
    plain_linear = type(found) is nn.Linear and "weight" in found._parameters
    if plain_linear or isinstance(read_convolution(found), ConvolutionSource):
        return found
    return None


def _folded_norm(module: nn.Module, layer: nn.Module | None, rank: int | None) -> nn.Module | None:
    """What takes the place of a normalization, after merging it into `layer` if there is one; None if it stays."""
    affine = _affine(module)
    if affine is None:
        return None
    if layer is not None:
        _merge(affine, layer)
        return affine.then
    if isinstance(module, _BatchNorm) or not type(module).__module__.startswith("batchless."):
        return None  # already a layer of torch's or of the model's own library, and nothing to merge it into
    like = next(module.parameters(), next(module.buffers(), None))
    assert like is not None
    batch_norm = affine.as_batch_norm(rank, like)
    return batch_norm if isinstance(affine.then, nn.Identity) else nn.Sequential(batch_norm, affine.then)


def _affine(module: nn.Module) -> _Affine | None:
    """What a normalization by constants does; None if it is no such thing."""
    if isinstance(module, SkipInit):
        if module.num_features is None:
            return None
        scale = module.gain.double().expand(module.num_features)
        return _Affine(scale, torch.zeros_like(scale), torch.zeros_like(scale), nn.Identity())
    if isinstance(module, BatchChannelNorm):
        return _step_one(module.batch_norm, _group_norm(module))
    if isinstance(module, EstimatedBatchNorm | BatchNorm | FrozenBatchNorm):
        return _step_one(module, nn.Identity())
    if is_batch_normalization(module):
        source = read_batch_norm(module)
        if isinstance(source, str) or source.running_mean is None:
            return None
        after = [part for part in (source.drop, source.act) if part is not None and not isinstance(part, nn.Identity)]
        then = nn.Identity() if not after else after[0] if len(after) == 1 else nn.Sequential(*after)
        return _step_one(module, then)
    return None


def _step_one(norm: Any, then: nn.Module) -> _Affine:
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    shift = torch.zeros_like(scale) if norm.bias is None else norm.bias.double()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    return _Affine(scale, norm.running_mean.double(), shift, then)


def _group_norm(module: BatchChannelNorm) -> nn.GroupNorm:
    like = module.batch_norm.running_mean
    layer = nn.GroupNorm(
        module.num_groups,
        module.num_features,
        eps=module.eps,
        affine=module.weight is not None,
        device=like.device,
        dtype=like.dtype,
    )
    if module.weight is not None and module.bias is not None:
        repeat = module.num_features // module.num_groups
        layer.weight.copy_(module.weight.repeat_interleave(repeat))
        layer.bias.copy_(module.bias.repeat_interleave(repeat))
    return layer


def _merge(affine: _Affine, layer: Any) -> None:
    transposed = getattr(layer, "transposed", False)
    groups = getattr(layer, "groups", 1)
    rows = to_matrix(layer.weight.double(), transposed=transposed, groups=groups) * affine.scale.unsqueeze(1)
    bias = 0.0 if layer.bias is None else layer.bias.double()
    shifted = (bias - affine.mean) * affine.scale + affine.shift
    weight = from_matrix(rows, layer.weight, transposed=transposed, groups=groups)
    layer.bias = nn.Parameter(shifted.to(layer.weight.dtype))
    layer.weight = nn.Parameter(weight.to(layer.weight.dtype))


def _plain_layer(module: Reparameterized) -> nn.Module:
    """The torch layer that computes with `module`'s weight as it stands."""
    old: Any = module
    weight, bias = module.effective_weight(), module.bias
    new: Any
    pad = getattr(module, "pad_input", None)
    if isinstance(module, LinearForward):
        new = nn.Linear(old.in_features, old.out_features, bias is not None, device="meta", dtype=weight.dtype)
    else:
        kind = next(plain for plain in PLAIN_CONVOLUTIONS if isinstance(module, plain))
        arguments = convolution_arguments(module)
        if isinstance(pad, SamePad):
            from timm.layers import Conv2dSame  # the layer this one was converted from

            kind, pad = Conv2dSame, None
            del arguments["padding_mode"]
        new = kind(**arguments, device="meta", dtype=weight.dtype)
    new.weight = nn.Parameter(weight.detach().clone())
    new.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    return new if pad is None else nn.Sequential(pad, new)
