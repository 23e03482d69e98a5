"""What differs from task to task when a network is exported; a new task is an entry here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from batchless.data.statistics import ChannelStatistics, normalized
from batchless.deploy.detector_graph import Objects, detection_difference, of_one_image
from batchless.deploy.real_inputs import Inputs, real_clips, real_pictures, real_scenes, real_squares
from batchless.models.segmenters import PaddedSegmenter, size_multiple
from batchless.models.video import clip_input
from batchless.tasks import Trained
from batchless.tasks.config import TaskName
from batchless.tasks.kind import whole_network
from batchless.tasks.trained import example_input

Format = Literal["torch", "onnx", "exported_program"]

UNSCALED = ChannelStatistics(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
"""By which images are only scaled to [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Exportable:
    """How the networks of a task are exported.

    Attributes:
        real: batches of the run's test images, uint8.
        prepared: such a batch as the network's input, by `(network as trained, batch, statistics)`.
        call: a network of torch layers and an input to what it says.
        difference: between what the trained network and a file say about an input, from 0 on; None: they say nothing.
        graph: of the folded network, the part that a graph holds.
        example: its input when it is made, of at least two images: torch takes a size of 1 for a constant.
        formats: that can hold it.
        free: dimensions of a graph's input that have any size, and their names.
        input_name: of a graph.
    """

    real: Callable[[Trained], Inputs]
    prepared: Callable[[nn.Module, Tensor, ChannelStatistics], Tensor]
    call: Callable[[nn.Module, Tensor], Any]
    difference: Callable[[Trained, Any, Any], float | None]
    graph: Callable[[nn.Module], nn.Module]
    example: Callable[[Trained], Tensor]
    formats: tuple[Format, ...] = ("torch", "onnx", "exported_program")
    free: Mapping[int, str] = field(default_factory=lambda: {0: "batch"})
    input_name: str = "images"


def _of_scores(trained: Trained, expected: Tensor, found: Tensor) -> float:
    """The largest difference between scores, relative to the largest one; NaN if one is."""
    assert expected.shape == found.shape
    largest = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return float((found - expected).abs().max() / largest)


def _of_objects(trained: Trained, expected: Objects, found: Objects) -> float | None:
    return detection_difference(expected, found, trained.config.detector)


def _scores(model: nn.Module, images: Tensor) -> Tensor:
    scores: Tensor = model(images)
    return scores


def _images(model: nn.Module, batch: Tensor, statistics: ChannelStatistics) -> Tensor:
    return normalized(batch, statistics)


def _clips(model: nn.Module, batch: Tensor, statistics: ChannelStatistics) -> Tensor:
    return clip_input(model, normalized(batch, statistics))


def _unnormalized(model: nn.Module, batch: Tensor, statistics: ChannelStatistics) -> Tensor:
    """Detectors normalize images themselves."""
    return normalized(batch, UNSCALED)


def _of_evaluation(trained: Trained) -> Tensor:
    (example,) = example_input(trained.config, trained.model)
    assert isinstance(example, Tensor)
    return example


def _scene(trained: Trained) -> Tensor:
    """Of sizes that differ, and of maps with several positions on every level of a network."""
    return torch.zeros(2, 3, 128, 192)


def _picture(trained: Trained) -> Tensor:
    """One image in which there is something to find, as what a detector does then would not be seen otherwise."""
    return normalized(real_pictures(trained)[0][0], UNSCALED)


def _scenes(trained: Trained) -> Inputs:
    return real_scenes(trained, multiple=size_multiple(trained.model))


def _without_padding(model: nn.Module) -> nn.Module:
    """How much is padded would stay that of the size by which the graph is made."""
    return model.network if isinstance(model, PaddedSegmenter) else model


_CLASSIFICATION = Exportable(
    real=real_squares,
    prepared=_images,
    call=_scores,
    difference=_of_scores,
    graph=whole_network,
    example=_of_evaluation,
)

EXPORTABLE: Mapping[TaskName, Exportable] = {
    "classify": _CLASSIFICATION,
    "video": replace(_CLASSIFICATION, real=real_clips, prepared=_clips, input_name="clips"),
    "segment": replace(
        _CLASSIFICATION,
        real=_scenes,
        graph=_without_padding,
        example=_scene,
        free={0: "batch", 2: "height", 3: "width"},
    ),
    "detect": Exportable(
        real=real_pictures,
        prepared=_unnormalized,
        call=of_one_image,
        difference=_of_objects,
        graph=whole_network,
        example=_picture,
        formats=("torch", "onnx"),
    ),
}
