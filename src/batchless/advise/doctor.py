"""Which layers of a model fail or mislead when it is trained on few images, found by a dry run."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from batchless.advise.diagnosis import Diagnosis
from batchless.advise.dry_run import DryRun, dry_run, with_images
from batchless.advise.findings import Conditions, Finding, findings_of, images
from batchless.models.build import build_any
from batchless.models.example import built_for, example_inputs
from batchless.models.names import torchvision_names
from batchless.surgery.convert import conversion_of, convert
from batchless.surgery.dataflow import as_arguments
from batchless.surgery.recognize import is_batch_normalization

_PROPOSED = "gn+ws"
"""It knows no batch, no estimates and no mode."""


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """What `batchless doctor` looks at.

    Attributes:
        model: a name, such as torchvision:deeplabv3_resnet50, timm:mobilenetv4_conv_small or smp:PSPNet-resnet18.
        images_per_forward: the micro-batch of one device.
        image_size: side of the square images, in pixels.
        images_per_step: what one optimizer step sees; null: as many as a forward.
        federated: whether clients' models are averaged.
    """

    model: str
    images_per_forward: int = 1
    image_size: int = 224
    images_per_step: int | None = None
    federated: bool = False

    def __post_init__(self) -> None:
        _check_images(self.images_per_forward, self.images_per_step)
        if self.image_size < 1:
            raise ValueError(f"image_size is in pixels and must be 1 or more, got {self.image_size}")


def run_doctor(config: DoctorConfig) -> Diagnosis:
    """Diagnose a model by name, with random weights.

    Raises:
        ValueError: unknown model, or one that does not run on images of this size.
    """
    model = build_any(config.model)
    example = example_inputs(model, min(config.images_per_forward, 2), config.image_size, training=True)
    notes = []
    library, _, rest = config.model.partition(":")
    if library == "torchvision" and torchvision_names().get(rest) == "detection":
        notes.append(
            "looked at as torchvision builds it without pretrained weights; with them, the backbone of most of its detectors "
            "has FrozenBatchNorm2d: batchless.advise.diagnose(model, example) looks at a model as it is"
        )
    few = config.images_per_forward
    conditions = Conditions(few, config.images_per_step or few, config.federated)
    try:
        return _diagnose(model, example, conditions, name=config.model, notes=notes, try_conversion=True)
    except ValueError as error:
        raise ValueError(f"{config.model} at image_size={config.image_size}{built_for(model)}: {error}") from error


def diagnose(
    model: nn.Module,
    example: object,
    *,
    images_per_forward: int,
    images_per_step: int | None = None,
    federated: bool = False,
    try_conversion: bool = True,
) -> Diagnosis:
    """What breaks or misleads when `model` is trained on `images_per_forward` images at a time on one process.

    A copy runs once in training mode on one or two images: layers that would raise are recorded and passed by; the number
    of values of each statistic follows for any number of images. The model is not changed.

    Args:
        model: any module.
        example: a tensor or a tuple of positional arguments; how many images it holds does not matter. torchvision's
            detectors need no targets.
        images_per_forward: the micro-batch.
        images_per_step: what one optimizer step sees; as many as a forward if not given.
        federated: whether clients' models are averaged.
        try_conversion: whether the proposed conversion is made on a copy and diagnosed too, which takes as long again.

    Raises:
        ValueError: a number below 1, or an example that the model does not run on.

    >>> import torch
    >>> pooled = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8))
    >>> diagnosis = diagnose(pooled, torch.rand(2, 3, 8, 8), images_per_forward=1)
    >>> diagnosis.ok, [(finding.layer, finding.kind) for finding in diagnosis.findings]
    (False, [('2', 'raises')])
    """
    _check_images(images_per_forward, images_per_step)
    conditions = Conditions(images_per_forward, images_per_step or images_per_forward, federated)
    return _diagnose(model, example, conditions, name=None, notes=(), try_conversion=try_conversion)


def _diagnose(
    model: nn.Module,
    example: object,
    conditions: Conditions,
    *,
    name: str | None,
    notes: Sequence[str],
    try_conversion: bool,
) -> Diagnosis:
    run, findings = _examine(model, example, conditions)
    wrong = {finding.layer for finding in findings}
    convertible = any(is_batch_normalization(visit.module) and visit.name in wrong for visit in run.visits)
    conversion = _proposal(model, name) if convertible else []
    if convertible and try_conversion and conversion_of(model) is None:
        conversion.append(_tried(model, example, conditions))
    return Diagnosis(
        model=name or type(model).__name__,
        images_per_forward=conditions.images_per_forward,
        images_per_step=conditions.images_per_step,
        normalizations=len(run.visits),
        findings=tuple(findings),
        conversion=tuple(conversion),
        notes=(*notes, *_limits(run)),
    )


def _examine(model: nn.Module, example: object, conditions: Conditions) -> tuple[DryRun, list[Finding]]:
    # Two images tell what any larger number does: statistics of a batch have values in proportion to it.
    run = dry_run(model, example, images=min(conditions.images_per_forward, 2))
    findings = [found for visit in run.visits for found in findings_of(visit, conditions, images_run=run.images)]
    if run.failed is not None:
        findings.insert(0, _failure(*run.failed, conditions.images_per_forward))
    return run, findings


def _proposal(model: nn.Module, name: str | None) -> list[str]:
    if (earlier := conversion_of(model)) is not None:
        return [
            f'in Python:  model, report = batchless.convert(original, "{_PROPOSED}")',
            f"with the original model: this one is converted to {earlier.report.normalizer} already",
        ]
    lines = [f'in Python:  model, report = batchless.convert(model, "{_PROPOSED}")']
    return [*lines, f"to look at: batchless convert {name} {_PROPOSED}"] if name else lines


def _tried(model: nn.Module, example: object, conditions: Conditions) -> str:
    """What is wrong with the model as it is proposed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few values in a group are a finding here
            converted, _ = convert(model, _PROPOSED, example=with_images(as_arguments(example), 1))
        _, left = _examine(converted, example, conditions)
    except ValueError as error:
        return f"tried on a copy: {error}"
    if not left:
        return "tried on a copy: nothing is left of the above"
    layers = list(dict.fromkeys(finding.layer for finding in left))
    kinds = " and ".join(dict.fromkeys(finding.kind for finding in left))
    which = f"{len(layers)} layer{'s' if len(layers) > 1 else ''}, such as {layers[0]}"
    return f"tried on a copy: {kinds} on {which} ({left[0].explanation}; {left[0].fix})"


def _failure(layer: str, error: str, images_per_forward: int) -> Finding:
    return Finding(
        "error",
        layer,
        "raises",
        f"raises in training at {images(images_per_forward)}, not at 2, in code that is no known normalization: {error}",
        "more images per forward, or change this layer",
    )


def _limits(run: DryRun) -> list[str]:
    """What the dry run could not see."""
    notes = []
    if run.mode == "evaluation":
        notes.append(
            "its training forward asks for more than the example: this is its evaluation forward with normalizations in "
            "training mode; branches for training only were not seen"
        )
    if unseen := [visit.name for visit in run.visits if not visit.shapes]:
        notes.append(f"{len(unseen)} normalization layers did not run and are not judged, such as {unseen[0]}")
    if any(isinstance(visit.module, nn.SyncBatchNorm) or getattr(visit.module, "sync", False) for visit in run.visits):
        notes.append(
            "synchronized layers are judged as on one process; on more, their statistics are of all images together"
        )
    return notes


def _check_images(images_per_forward: int, images_per_step: int | None) -> None:
    if images_per_forward < 1:
        raise ValueError(f"images_per_forward must be 1 or more, got {images_per_forward}")
    if images_per_step is not None and images_per_step < images_per_forward:
        raise ValueError(
            f"images_per_step is {images_per_step}, fewer than images_per_forward={images_per_forward}: a step is one forward "
            "or several"
        )
