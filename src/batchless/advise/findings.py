"""What is wrong with one normalization in training, and what to do about it."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from batchless.advise.dry_run import Visit
from batchless.advise.statistics import statistic_of, statistics_over
from batchless.surgery.recognize import is_batch_normalization

Kind = Literal["raises", "one value", "few values", "few images", "accumulation", "frozen", "shared", "federated"]

FEW_VALUES = 8
"""Statistics of fewer values than this are mostly noise."""

FEW_IMAGES = 16
"""Below, batch normalization loses accuracy: comparable to group normalization at usual batch sizes, its error on ImageNet
(ResNet-50) is 10.6 points higher at 2 images (Wu & He, arXiv 1803.08494)."""

_UNITS = {"batch": "channel", "instance": "channel and image", "group": "group", "sample": "position or image"}
_CONVERT = "convert it (below)"


@dataclass(frozen=True)
class Finding:
    """One thing wrong with one layer.

    Attributes:
        severity: `error` where training raises or the layer's output says nothing of its input; else `warning`.
        layer: qualified name, "" for the model itself.
        kind: what is wrong, in two words.
        explanation: what happens.
        fix: what to do.
    """

    severity: Literal["error", "warning"]
    layer: str
    kind: Kind
    explanation: str
    fix: str


@dataclass(frozen=True)
class Conditions:
    """What training will be like, as `diagnose` takes it."""

    images_per_forward: int
    images_per_step: int
    federated: bool


def findings_of(visit: Visit, conditions: Conditions, *, images_run: int) -> list[Finding]:
    """What is wrong with one normalization under the `conditions`, after a dry run on `images_run` images that reached it."""
    if not visit.shapes:
        return []
    over = statistics_over(visit.module, training=visit.module.training)
    found = _of_values(visit, conditions, images_run)
    if over == "batch":
        found += _of_batch_statistics(visit, conditions, few_values=bool(found))
    if over == "constants":
        found.append(_constants(visit))
    if conditions.federated and over in ("batch", "estimates") and _has_statistics(visit.module):
        what = "running averages" if over == "batch" else "estimates"
        found.append(
            Finding(
                "warning",
                visit.name,
                "federated",
                f"each client's {what} are of its own data: the server's average of them fits nobody",
                "convert to gn+ws or none+sws, or keep them on the client (algorithms fedbn, silobn)",
            )
        )
    return found


def _of_values(visit: Visit, conditions: Conditions, images_run: int) -> list[Finding]:
    """At most one: the layer raises, or its statistics are of one value or of few."""
    module, training = visit.module, visit.module.training
    statistics = [statistic_of(module, shape, training=training) for shape in visit.shapes]
    counts = [
        statistic.values * conditions.images_per_forward // images_run
        if statistic.over == "batch"
        else statistic.values
        for statistic in statistics
        if statistic.values
    ]
    fewest = min(counts, default=None)
    at = images(conditions.images_per_forward)
    over = statistics_over(module, training=training)
    unit = _UNITS.get(over, "")
    # A batch of one value raises, also where two images had to be run to learn of it.
    if visit.error is not None or (over == "batch" and fewest == 1):
        # torch's own words name the shape, which differs from layer to layer; one value is the common case.
        why = f"1 value per {unit}, which has no variance" if fewest == 1 else str(visit.error)
        return [Finding("error", visit.name, "raises", f"raises in training at {at}: {why}", _fix_for(visit))]
    if fewest is None or fewest >= FEW_VALUES:
        return []
    if fewest == 1:
        explanation = f"1 value per {unit} at {at}: its variance is 0, whatever the value"
        return [Finding("error", visit.name, "one value", explanation, _fix_for(visit))]
    noise = "every output is near +1 or -1, and hardly a gradient gets through" if fewest == 2 else "mostly noise"
    explanation = f"statistics of {fewest} values per {unit} at {at}: {noise}"
    return [Finding("warning", visit.name, "few values", explanation, _fix_for(visit))]


def _fix_for(visit: Visit) -> str:
    match statistics_over(visit.module, training=visit.module.training):
        case "batch" if is_batch_normalization(visit.module):
            return f"{_CONVERT}, or give it {FEW_VALUES} values: more images per forward or larger maps"
        case "instance" | "sample":
            return "put a normalization over more values here (gn, ln), or none; or give larger images"
        case "group":
            most = min(math.prod(shape[1:]) for shape in visit.shapes) // FEW_VALUES
            return (
                f"fewer groups, such as gn(groups={most}); or larger images"
                if most
                else "no normalization here, or larger images"
            )
        case _:
            return "more images per forward, or another normalization here"


def _of_batch_statistics(visit: Visit, conditions: Conditions, *, few_values: bool) -> list[Finding]:
    few, step = conditions.images_per_forward, conditions.images_per_step
    found = []
    if few < FEW_IMAGES and not few_values:
        found.append(
            Finding(
                "warning",
                visit.name,
                "few images",
                f"normalizes by the statistics of {images(few)} in training, by running averages in evaluation",
                f"{_CONVERT}, or {FEW_IMAGES} images per forward or more",
            )
        )
    if step > few:
        found.append(
            Finding(
                "warning",
                visit.name,
                "accumulation",
                f"its statistics are of the {images(few)} of a forward, not of the {step} of a step: accumulated gradients "
                "equal no full batch's",
                f"{_CONVERT}: then {step // few if step % few == 0 else step / few:g} forwards equal one of {step} images",
            )
        )
    if len(visit.shapes) > 1 and _has_statistics(visit.module):
        found.append(
            Finding(
                "warning",
                visit.name,
                "shared",
                f"called {len(visit.shapes)} times per forward: each call normalizes by its own statistics, and the running "
                "averages mix them",
                f"{_CONVERT}, or give each place a normalization of its own",
            )
        )
    own = list(visit.module.parameters(recurse=False))
    if own and not any(parameter.requires_grad for parameter in own):
        found.append(
            Finding(
                "warning",
                visit.name,
                "frozen",
                "its affine map is frozen but its statistics are not: they move with every batch",
                "call .eval() on it after every model.train(), or convert it to frozen-bn",
            )
        )
    return found


def _constants(visit: Visit) -> Finding:
    if is_batch_normalization(visit.module) and _has_seen_nothing(visit.module):
        return Finding(
            "error",
            visit.name,
            "frozen",
            "frozen before it saw data (mean 0, variance 1): it normalizes nothing",
            "load pretrained weights, or convert it (below)",
        )
    if statistics_over(visit.module, training=True) != "constants":
        return Finding(
            "warning",
            visit.name,
            "frozen",
            "in evaluation mode within a model in training mode: normalizes by constants until the next model.train()",
            "a layer that stays frozen (frozen-bn) for fine-tuning; convert it (below) where weights change much",
        )
    return Finding(
        "warning",
        visit.name,
        "frozen",
        "normalizes by constants of other data, under other weights: right only near the pretrained weights",
        "keep it for fine-tuning at a small learning rate; else convert it (below)",
    )


def _has_statistics(module: nn.Module) -> bool:
    return getattr(module, "running_var", None) is not None


def _has_seen_nothing(module: nn.Module) -> bool:
    mean, var = module.running_mean, module.running_var
    if not isinstance(mean, torch.Tensor) or not isinstance(var, torch.Tensor):
        return False
    return not mean.is_meta and not bool(mean.any()) and bool((var == 1).all())


def images(count: int) -> str:
    """`1 image`, `2 images`."""
    return f"{count} image{'s' if count > 1 else ''}"
