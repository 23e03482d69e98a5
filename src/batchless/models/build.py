"""Models by name, all built with plain BatchNorm; another normalizer is `batchless.convert`'s work."""

import difflib
import re

from torch import nn

from batchless.models.cifar_resnet import CifarResNet

_KINDS = (
    "timm:<name> (such as timm:resnet18), torchvision:<name> (such as torchvision:resnet50), "
    "cifar_resnet<depth> (such as cifar_resnet20)"
)
_WITH_AUXILIARY_OUTPUTS = ("googlenet", "inception_v3")
"""Of torchvision: in training they return a tuple unless told otherwise, and warn unless their initialization is chosen."""


def build_model(name: str, *, num_classes: int) -> nn.Module:
    """A classification network with random weights: images `[N, 3, H, W]` to scores `[N, num_classes]`.

    Args:
        name: `timm:<name>`, `torchvision:<name>`, or `cifar_resnet<depth>`.
        num_classes: outputs.

    Raises:
        ValueError: unknown name, with the nearest ones.

    >>> sum(parameter.numel() for parameter in build_model("cifar_resnet20", num_classes=10).parameters())
    272474
    """
    if match := re.fullmatch(r"cifar_resnet(\d+)", name):
        return CifarResNet(int(match[1]), num_classes)
    library, _, rest = name.partition(":")
    if library == "timm" and rest in _timm_names(tags="." in rest):
        import timm

        model: nn.Module = timm.create_model(rest, pretrained=False, num_classes=num_classes)
        return model
    if library == "torchvision" and rest in _torchvision_names():
        import torchvision

        options = {"aux_logits": False, "init_weights": True} if rest in _WITH_AUXILIARY_OUTPUTS else {}
        built: nn.Module = torchvision.models.get_model(rest, weights=None, num_classes=num_classes, **options)
        return built
    raise ValueError(f"unknown model {name!r}{_nearest(name)}: expected {_KINDS}")


def _timm_names(*, tags: bool) -> list[str]:
    """The architectures, or with `tags` the names of their pretrained weights, such as resnet18.a1_in1k."""
    import timm

    return list(timm.list_pretrained() if tags else timm.list_models())


def _torchvision_names() -> list[str]:
    import torchvision

    return list(torchvision.models.list_models(module=torchvision.models))


def _nearest(name: str) -> str:
    known = [f"cifar_resnet{depth}" for depth in (8, 14, 20, 32, 56, 110)]
    known += [f"timm:{other}" for other in _timm_names(tags="." in name)]
    known += [f"torchvision:{other}" for other in _torchvision_names()]
    near = difflib.get_close_matches(name, known, n=3)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
