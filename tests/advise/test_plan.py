"""The planner's bytes against those that really are saved, and what follows from them."""

import json

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torchvision.models.detection import maskrcnn_resnet50_fpn

import batchless as bl
from batchless.advise import PlanConfig, plan_memory
from batchless.advise.fake_forward import TrainingLoss, input_shape, training_loss
from batchless.advise.fake_step import FakeStep, Meter
from batchless.advise.memory_plan import bytes_of
from batchless.cli import main
from batchless.models import build_any, build_model, example_inputs
from batchless.nn import EstimatedBatchNorm, WSConv2d
from batchless.nn.reparameterized import Reparameterized

pytestmark = pytest.mark.filterwarnings("ignore")  # few values per group, in maps as small as here


def really_saved(model: nn.Module, loss) -> int:
    """Bytes that autograd keeps of a real forward of `loss()`, weights aside, each storage once."""
    estimated = [layer for layer in model.modules() if isinstance(layer, EstimatedBatchNorm)]
    for layer in estimated:
        layer.start_collecting()  # as inside accumulate
    with bl.standardized(model):
        shared = [layer.shared_weight for layer in model.modules() if isinstance(layer, Reparameterized)]
        weights = [*model.parameters(), *model.buffers(), *(weight for weight in shared if weight is not None)]
        known = {id(weight.untyped_storage()) for weight in weights}
        kept = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if id(storage) not in known:
                kept[id(storage)] = storage
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            result = loss()
        assert result.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def objects(images: int, size: int, count: int) -> list[dict[str, Tensor]]:
    targets = []
    for _ in range(images):
        corners = torch.rand(count, 2) * size / 2
        boxes = torch.cat([corners, corners + size / 8 + torch.rand(count, 2) * size / 4], 1)
        masks = torch.ones(count, size, size, dtype=torch.uint8)
        targets.append({"boxes": boxes, "labels": torch.ones(count, dtype=torch.long), "masks": masks})
    return targets


@pytest.mark.parametrize(
    ("name", "normalizer", "size"),
    [
        ("torchvision:resnet50", "bcn-micro+ws", 64),
        ("torchvision:deeplabv3_resnet50", "gn+ws", 64),
        ("torchvision:r3d_18", "bn", 32),
        ("timm:test_resnet", "none+sws", 64),
    ],
)
def test_planned_bytes_are_those_that_are_saved(name, normalizer, size):
    model, _ = bl.convert(build_any(name), normalizer, example=example_inputs(name, 1, size))
    shape = input_shape(model, size)
    planned = FakeStep(model, flops_per_byte=10).micro_batch(2, shape).kept
    saved = really_saved(model.train(), lambda: training_loss(model, torch.rand(2, *shape)))
    assert planned == pytest.approx(saved, rel=0.01)


def test_planned_bytes_of_a_detector_are_those_of_its_whole_training_forward():
    size, images = 128, 1
    model = maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=size, max_size=size, box_batch_size_per_image=32
    )
    planned = FakeStep(model, flops_per_byte=10).micro_batch(images, input_shape(model, size)).kept

    def loss() -> Tensor:
        losses = model([torch.rand(3, size, size) for _ in range(images)], objects(images, size, 12))
        return sum(losses.values())

    # As many objects as positive regions are sampled: each box is a proposal too.
    assert planned == pytest.approx(really_saved(model.train(), loss), rel=0.1)


def test_the_peak_is_convex_in_the_images_so_that_what_fits_by_the_line_fits():
    model = build_model("cifar_resnet8", num_classes=10)
    step = FakeStep(model, flops_per_byte=10)
    one, five, nine = (step.micro_batch(images, (3, 32, 32)) for images in (1, 5, 9))
    assert 2 * five.peak <= one.peak + nine.peak
    assert one.kept < one.peak
    assert nine.kept - five.kept == five.kept - one.kept
    planned = plan_memory(model, image_size=32, memory="16MiB")
    most = planned.levels[0].images_per_forward_at_most
    assert planned.fixed + step.micro_batch(most, (3, 32, 32)).peak <= 16 * 2**20
    assert planned.fixed + step.micro_batch(most + 2, (3, 32, 32)).peak > 16 * 2**20


def test_fixed_bytes_are_counted_to_the_byte():
    model = nn.Sequential(WSConv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    weights = 4 * (8 * 27 + 3 * 8)
    for optimizer, states in (("sgd", 1), ("adamw", 2)):
        planned = plan_memory(model, image_size=16, memory="1MiB", optimizer=optimizer)
        assert planned.parameters == planned.gradients == weights
        assert planned.optimizer_state == states * weights
        assert planned.buffers == 4 * 16 + 8
        assert planned.standardized_weights == 4 * (8 * 27 + 2 * 8)  # W_hat, and mean and deviation of each row


def test_the_micro_batch_divides_the_step_and_is_timed_against_level_0():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    levels = plan_memory(model, image_size=32, memory="1MiB", images_per_step=12).levels
    assert [level.level for level in levels] == [0, 1, 2, 3]
    for level in levels:
        assert level.images_per_forward * level.forwards_per_step == 12
        assert level.images_per_forward <= level.images_per_forward_at_most
    assert levels[0].relative_time == 1
    assert levels[1].saved_per_image < levels[0].saved_per_image
    nothing = plan_memory(model, image_size=32, memory="10KiB")
    assert not nothing.fits
    assert "does not fit" in str(nothing)


def test_the_model_is_neither_run_nor_changed():
    model = build_model("cifar_resnet8", num_classes=10).eval()
    model.register_forward_pre_hook(lambda module, inputs: pytest.fail("it ran") if type(inputs[0]) is Tensor else None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan_memory(model, image_size=32, memory="1GiB")
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_needs_two_images_is_planned_with_two():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8))
    planned = plan_memory(model, image_size=16, memory="1MiB", images_per_step=3)
    assert planned.levels[0].images_per_forward == 3
    assert "does not train on one image" in str(planned)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory": "8"}, "memory got '8': expected a number above 0 with one of"),
        ({"memory": "0GiB"}, "memory got '0GiB'"),
        ({"image_size": 0}, "image_size is in pixels and must be 1 or more, got 0"),
        ({"images_per_step": 0}, "images_per_step must be 1 or more, got 0"),
        ({"flops_per_byte": 0.0}, "flops_per_byte must be above 0, got 0"),
        ({"normalizer": "gm"}, "gm"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_built(change, message):
    with pytest.raises(ValueError, match=message):
        PlanConfig(model="cifar_resnet8", **change)


def test_units():
    assert bytes_of("1.5GiB") == 3 * 2**29
    assert bytes_of("2GB") == 2 * 10**9


def test_the_command_fails_where_nothing_fits(capsys):
    words = ["plan", "cifar_resnet8", "--normalizer", "bcn-micro+ws", "--image_size", "32"]
    assert main([*words, "--memory", "100KiB", "--format", "json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["fits"], told["levels"][0]["images_per_forward"]) == (False, 0)
    assert main(["plan", "cifar_resnt8"]) == 2
    assert "did you mean cifar_resnet8" in capsys.readouterr().err


@pytest.mark.parametrize("level", [1, 2, 3])
def test_planned_bytes_of_a_lean_model_are_those_that_live_after_a_real_forward(level):
    model = build_model("cifar_resnet8", num_classes=10)
    shape = (3, 32, 32)
    planned = [FakeStep(model, level=at, flops_per_byte=10).micro_batch(2, shape) for at in (0, level)]
    lean, _ = bl.lean(TrainingLoss(model), level)
    with Meter(10) as meter:
        loss = lean(torch.rand(2, *shape))
        kept = meter.held
        loss.backward()
    assert planned[1].kept == pytest.approx(kept, rel=0.01)
    assert planned[1].kept < planned[0].kept
    assert planned[1].cost > planned[0].cost
