"""What a training needs and which micro-batches fit in a memory, before anything is trained."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from batchless.advise.fake_forward import input_shape
from batchless.advise.fake_step import FakeStep, StepMemory
from batchless.advise.memory_plan import LevelPlan, MemoryPlan, bytes_of, mebibytes
from batchless.models.build import build_any
from batchless.models.example import built_for, example_inputs, is_detector
from batchless.nn.normalizer import parse_normalizer
from batchless.surgery.convert import conversion_of, convert

FLOPS_PER_BYTE = 10.0
"""Of processors, and of GPUs in float32 without tensor cores: 5 to 20."""

_STATES = {"sgd": 1, "adamw": 2}
"""Tensors that the optimizer keeps for each parameter: momentum; both moments."""

_MOST_IMAGES = 2**16
"""Of a forward: larger ones are not looked at."""

Optimizer = Literal["sgd", "adamw"]


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What `batchless plan` plans.

    Attributes:
        model: a name, such as torchvision:resnet50, timm:efficientnet_b0 or smp:PSPNet-resnet18.
        normalizer: such as gn+ws.
        image_size: side of the square images, in pixels.
        memory: what there is, such as 8GiB or 6000MB.
        images_per_step: what one optimizer step is to see.
        optimizer: whose state is counted: sgd (with momentum) or adamw.
        flops_per_byte: floating point operations that the machine does while it moves one byte; only times depend on it.
        format: table or json.
    """

    model: str
    normalizer: str = "bn"
    image_size: int = 224
    memory: str = "8GiB"
    images_per_step: int = 32
    optimizer: Optimizer = "sgd"
    flops_per_byte: float = FLOPS_PER_BYTE
    format: Literal["table", "json"] = "table"

    def __post_init__(self) -> None:
        parse_normalizer(self.normalizer)
        bytes_of(self.memory)
        _check(self.image_size, self.images_per_step, self.flops_per_byte)


def run_plan(config: PlanConfig) -> MemoryPlan:
    """Plan for a model by name, converted.

    Raises:
        ValueError: unknown model, or one that does not run on images of this size.
    """
    model = build_any(config.model)
    try:
        model, _ = convert(model, config.normalizer, example=example_inputs(model, 1, config.image_size))
        return plan_memory(
            model,
            image_size=config.image_size,
            memory=config.memory,
            images_per_step=config.images_per_step,
            optimizer=config.optimizer,
            flops_per_byte=config.flops_per_byte,
            name=config.model,
        )
    except ValueError as error:
        raise ValueError(f"{config.model} at image_size={config.image_size}{built_for(model)}: {error}") from error


def plan_memory(
    model: nn.Module,
    *,
    image_size: int,
    memory: str,
    images_per_step: int = 32,
    optimizer: Optimizer = "sgd",
    flops_per_byte: float = FLOPS_PER_BYTE,
    name: str | None = None,
) -> MemoryPlan:
    """Where the memory of a float32 training step goes, and the largest micro-batch that fits, without running the model.

    A copy runs on tensors that have sizes but no values, and every tensor that lives is counted. The most that is alive at
    once is a maximum of functions that grow linearly with the images, so it is convex in their number: the line between
    two of its values is never below it, and a micro-batch that fits by that line fits.

    The time of a step is a sum over its operators, see `batchless.advise.fake_step.Meter`, and over the bytes that the
    optimizer reads and writes. It knows neither caches nor what starting an operator takes.

    Args:
        model: any module that takes images `[N, 3, S, S]` (or clips), or one of torchvision's detectors; converted or not.
        image_size: S.
        memory: such as `8GiB`.
        images_per_step: what one optimizer step is to see.
        optimizer: `sgd` with momentum, or `adamw`.
        flops_per_byte: of the machine, for the times.
        name: of the model, for the table.

    Raises:
        ValueError: a setting out of range, or a model that does not train on such images.

    >>> convolutions = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    >>> planned = plan_memory(convolutions, image_size=32, memory="1MiB", images_per_step=12)
    >>> planned.parameters == 4 * (3 * 8 * 9 + 8 + 8 * 8 * 9 + 8), planned.levels[0].images_per_forward
    (True, 6)
    """
    _check(image_size, images_per_step, flops_per_byte)
    there = bytes_of(memory)
    shape = input_shape(model, image_size)
    step = FakeStep(model, flops_per_byte=flops_per_byte)
    weights = step.weights()
    trainable = _bytes(parameter for parameter in model.parameters() if parameter.requires_grad)
    parameters, buffers = _bytes(model.parameters()), _bytes(model.buffers())
    states = _STATES[optimizer]
    fixed = parameters + buffers + trainable * (1 + states) + weights.extra
    # The optimizer reads parameter, gradient and states, and writes all but the gradient.
    once = weights.cost + trainable * (3 + 2 * states)
    levels = [_Level.measured(step, shape, level=0, room=there - fixed, wanted=images_per_step)]
    lean_levels = (1, 2, 3)
    for level in lean_levels:
        try:
            step = FakeStep(model, level=level, flops_per_byte=flops_per_byte)
        except ValueError:  # nothing to compute again
            break
        levels.append(_Level.measured(step, shape, level=level, room=there - fixed, wanted=images_per_step))
    earlier = conversion_of(model)
    return MemoryPlan(
        model=name or type(model).__name__,
        normalizer="as it is" if earlier is None else earlier.report.normalizer,
        image=shape,
        optimizer=optimizer,
        memory=there,
        images_per_step=images_per_step,
        parameters=parameters,
        buffers=buffers,
        gradients=trainable,
        optimizer_state=trainable * states,
        standardized_weights=weights.extra,
        levels=tuple(level.plan(once, time_of_level_0=levels[0].time(once)) for level in levels),
        notes=tuple(_notes(model, shape, image_size, levels[0])),
    )


@dataclass(frozen=True)
class _Level:
    """Two micro-batches of one level, and what follows from them."""

    level: int
    few: StepMemory
    many: StepMemory
    room: int
    wanted: int

    @classmethod
    def measured(cls, step: FakeStep, shape: tuple[int, ...], *, level: int, room: int, wanted: int) -> "_Level":
        """The fewest images that train, and at least as many as fit."""
        few = _fewest(step, shape)
        # What is saved is less than the peak: the line between the two ends above the room, not below it.
        guess = max(room, 0) * few.images // max(few.kept, 1) + 1
        many = step.micro_batch(min(max(guess, few.images + 1), _MOST_IMAGES), shape)
        return cls(level, few, many, room, wanted)

    @property
    def peak_per_image(self) -> float:
        return (self.many.peak - self.few.peak) / (self.many.images - self.few.images)

    def most_images(self) -> int:
        """The largest micro-batch that fits, 0 for none."""
        left = self.room - self.few.peak
        if left < 0:
            return 0
        return min(self.few.images + int(left / max(self.peak_per_image, 1)), self.many.images)

    def micro_batch(self) -> int:
        """The largest one that fits and divides the wanted step, 0 for none."""
        sizes = range(self.few.images, min(self.most_images(), self.wanted) + 1)
        return max((size for size in sizes if self.wanted % size == 0), default=0)

    def time(self, once: float) -> float:
        """Of a step, in bytes: of what fits, else of the fewest images at a time."""
        images = self.micro_batch() or self.few.images
        per_image = (self.many.cost - self.few.cost) / (self.many.images - self.few.images)
        of_one = self.few.cost + per_image * (images - self.few.images)
        return once + of_one * self.wanted / images

    def plan(self, once: float, *, time_of_level_0: float) -> LevelPlan:
        images = self.micro_batch()
        return LevelPlan(
            level=self.level,
            saved_per_image=self.few.kept // self.few.images,
            peak_per_image=round(self.peak_per_image),
            peak_at_one=self.few.peak,
            images_per_forward_at_most=self.most_images(),
            images_per_forward=images,
            forwards_per_step=self.wanted // images if images else 0,
            relative_time=self.time(once) / time_of_level_0 if images else None,
        )


def _fewest(step: FakeStep, shape: tuple[int, ...]) -> StepMemory:
    """One image, or two where one does not train: batch statistics of one value."""
    try:
        return step.micro_batch(1, shape)
    except ValueError as error:
        try:
            return step.micro_batch(2, shape)
        except ValueError:
            raise ValueError(f"the model does not train on images {list(shape)}: {error}") from error


def _notes(model: nn.Module, shape: tuple[int, ...], image_size: int, level: _Level) -> Iterator[str]:
    largest = max((_bytes(iter([parameter])) for parameter in model.parameters()), default=0)
    yield (
        "float32; not counted: what kernels take for themselves (on CPUs up to 4 times the largest weight, "
        f"{mebibytes(4 * largest)}), GPU libraries, fragmentation"
    )
    if level.few.images > 1:
        yield "does not train on one image: `batchless doctor` tells why"
    if is_detector(model):
        if shape[-1] != image_size:
            yield f"the detector resizes images of {image_size} pixels itself; padded, they are {shape[-2]} x {shape[-1]}"
        if hasattr(model, "roi_heads"):
            yield "as many regions of interest as are sampled at most; few objects give fewer for masks and keypoints"
    if not level.micro_batch() and level.most_images():
        yield f"no micro-batch that fits divides images_per_step={level.wanted}"


def _bytes(tensors: Iterator[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _check(image_size: int, images_per_step: int, flops_per_byte: float) -> None:
    if image_size < 1:
        raise ValueError(f"image_size is in pixels and must be 1 or more, got {image_size}")
    if images_per_step < 1:
        raise ValueError(f"images_per_step must be 1 or more, got {images_per_step}")
    if not flops_per_byte > 0:
        raise ValueError(f"flops_per_byte must be above 0, got {flops_per_byte}")
