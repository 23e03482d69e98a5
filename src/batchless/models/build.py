"""Models by name, all built with plain BatchNorm; another normalizer is `batchless.convert`'s work."""

import difflib
import re
from collections.abc import Iterable

from torch import nn

from batchless.models.cifar_resnet import CifarResNet

_KINDS = (
    "timm:<name> (such as timm:resnet18), torchvision:<name> (such as torchvision:resnet50), "
    "cifar_resnet<depth> (such as cifar_resnet20)"
)


def build_model(name: str, *, num_classes: int) -> nn.Module:
    """A classification network with random weights.

    Args:
        name: `timm:<name>`, `torchvision:<name>`, or `cifar_resnet<depth>`.
        num_classes: outputs.

    Raises:
        ValueError: unknown name, with the nearest ones.

    >>> sum(parameter.numel() for parameter in build_model("cifar_resnet20", num_classes=10).parameters())
    272474
    """
    library, colon, rest = name.partition(":")
    if colon and library == "timm":
        import timm

        if not timm.is_model(rest):
            raise ValueError(_unknown(name, "timm:", timm.list_models()))
        model: nn.Module = timm.create_model(rest, pretrained=False, num_classes=num_classes)
        return model
    if colon and library == "torchvision":
        import torchvision

        known = torchvision.models.list_models(module=torchvision.models)
        if rest not in known:
            raise ValueError(_unknown(name, "torchvision:", known))
        built: nn.Module = torchvision.models.get_model(rest, weights=None, num_classes=num_classes)
        return built
    if match := re.fullmatch(r"cifar_resnet(\d+)", name):
        return CifarResNet(int(match[1]), num_classes)
    raise ValueError(f"unknown model {name!r}: expected {_KINDS}")


def _unknown(name: str, prefix: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name.removeprefix(prefix), known, n=3)
    hint = f"; did you mean {' or '.join(prefix + other for other in near)}?" if near else ""
    return f"unknown model {name!r}{hint} (expected {_KINDS})"
