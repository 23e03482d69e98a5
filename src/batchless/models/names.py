"""The names that the libraries know their models by, and the nearest ones to a wrong name."""

import difflib
from typing import Literal

TorchvisionTask = Literal["classification", "segmentation", "detection", "video"]

_CIFAR_NAMES = [f"cifar_resnet{depth}" for depth in (8, 14, 20, 32, 56, 110)]


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
    return [*_CIFAR_NAMES, *(f"timm:{name}" for name in timm_names(tags=tags)), *torchvision]


def all_names(*, tags: bool) -> list[str]:
    """Every name of any network but segmentation_models_pytorch's, in full; timm's with `tags` or without."""
    torchvision = [f"torchvision:{name}" for name in torchvision_names()]
    return [*_CIFAR_NAMES, *(f"timm:{name}" for name in timm_names(tags=tags)), *torchvision]


def did_you_mean(name: str, known: list[str]) -> str:
    """` (did you mean a or b?)` with the nearest of the `known`, or nothing.

    >>> did_you_mean("resnet81", ["resnet18", "vgg11"])
    ' (did you mean resnet18?)'
    """
    near = difflib.get_close_matches(name, known, n=3)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
