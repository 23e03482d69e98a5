"""The names that the libraries know their models by, and the nearest ones to a wrong name."""

import difflib
import re
from typing import Literal

TorchvisionTask = Literal["classification", "segmentation", "detection", "video"]

_SMALL_IMAGES = ("resnet18_32", "resnet34_32", "resnet50_32", "mobilenet_v2_32")
_OWN_NAMES = [
    *(f"cifar_resnet{depth}" for depth in (8, 14, 20, 32, 56, 110)),
    "digits_cnn",
    "digits_cnn_32",
    "fedbn_alexnet",
    *_SMALL_IMAGES,
    *(f"{name}_zero_init" for name in _SMALL_IMAGES),
]
SMP_KIND = "smp:<Architecture>-<encoder> (such as smp:DeepLabV3-resnet18)"
OWN_KINDS = f"digits_cnn, digits_cnn_32, fedbn_alexnet, {', '.join(_SMALL_IMAGES)} (these also with _zero_init)"


def is_own_name(name: str) -> bool:
    """Whether the network is built here rather than by a library: `cifar_resnet` of any depth, and the names of `OWN_KINDS`."""
    return name in _OWN_NAMES or re.fullmatch(r"cifar_resnet\d+", name) is not None


def timm_names(*, tags: bool) -> list[str]:
    """The architectures, or with `tags` the names of their pretrained weights, such as resnet18.a1_in1k."""
    import timm

    return list(timm.list_pretrained() if tags else timm.list_models())


def torchvision_names() -> dict[str, TorchvisionTask]:
    """The models that take images or one clip, and what each is for; quantized networks and optical flow are not among them."""
    from torchvision import models

    rooms: dict[TorchvisionTask, object] = {
        "classification": models,
        "segmentation": models.segmentation,
        "detection": models.detection,
        "video": models.video,
    }
    return {name: task for task, room in rooms.items() for name in models.list_models(module=room)}


def smp_names() -> tuple[list[str], list[str]]:
    """Architectures and encoders of segmentation_models_pytorch; `tu-` and any name of timm's is an encoder too.

    Raises:
        ValueError: the library is not installed.
    """
    try:
        import segmentation_models_pytorch as smp
    except ModuleNotFoundError as error:
        raise ValueError(
            "smp: models need segmentation_models_pytorch, which is not installed: pip install 'batchless[segmentation]'"
        ) from error
    architectures = [architecture.__name__ for architecture in smp.MODEL_ARCHITECTURES_MAPPING.values()]
    return architectures, list(smp.encoders.get_encoder_names())


def classifier_names(*, tags: bool) -> list[str]:
    """Every name of a classification network, in full; timm's with `tags` or without."""
    torchvision = [f"torchvision:{name}" for name, task in torchvision_names().items() if task == "classification"]
    return [*_OWN_NAMES, *(f"timm:{name}" for name in timm_names(tags=tags)), *torchvision]


def all_names(*, tags: bool) -> list[str]:
    """Every name of any network but segmentation_models_pytorch's, in full; timm's with `tags` or without."""
    torchvision = [f"torchvision:{name}" for name in torchvision_names()]
    return [*_OWN_NAMES, *(f"timm:{name}" for name in timm_names(tags=tags)), *torchvision]


def did_you_mean(name: str, known: list[str]) -> str:
    """` (did you mean a or b?)` with the nearest of the `known`, or nothing.

    >>> did_you_mean("resnet81", ["resnet18", "vgg11"])
    ' (did you mean resnet18?)'
    """
    near = difflib.get_close_matches(name, known, n=3)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
