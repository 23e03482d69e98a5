"""Networks of segmentation_models_pytorch by name."""

from typing import Any

from torch import nn

from batchless.models.names import SMP_KIND, did_you_mean, smp_names, timm_names


def smp_network(name: str, **options: Any) -> nn.Module:
    """A network of segmentation_models_pytorch with random weights, `name` being `<Architecture>-<encoder>`.

    Raises:
        ValueError: the library is not installed, an unknown name, or a pair that it cannot build.
    """
    architectures, encoders = smp_names()
    architecture, _, encoder = name.partition("-")
    if architecture not in architectures:
        nearest = did_you_mean(architecture, architectures)
        raise ValueError(
            f"unknown architecture {architecture!r} in 'smp:{name}'{nearest}: expected {SMP_KIND} with one of "
            f"{', '.join(architectures)}"
        )
    known = encoders
    if encoder.startswith("tu-"):
        known = [f"tu-{other}" for other in timm_names(tags="." in encoder)]
    if encoder not in known and not encoder.startswith("timm-"):  # the library's former names: it knows them itself
        nearest = did_you_mean(encoder, known)
        raise ValueError(
            f"unknown encoder {encoder!r} in 'smp:{name}'{nearest}: expected {SMP_KIND}, or tu-<name> of timm's"
        )
    import segmentation_models_pytorch as smp

    try:
        model: nn.Module = getattr(smp, architecture)(encoder_name=encoder, encoder_weights=None, **options)
    except (ValueError, TypeError, NotImplementedError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"segmentation_models_pytorch cannot build 'smp:{name}' ({' '.join(str(error).split())}): choose another encoder"
        ) from error
    return model
