import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torchvision.transforms.v2 import functional

import batchless as bl
from batchless.models.detectors import (
    DETECTOR_NAMES,
    DetectorInput,
    DetectorSettings,
    build_detector,
    detector_example,
    learns_masks,
)
from batchless.nn import WSConv2d
from batchless.nn.estimated_batch_norm import EstimatedBatchNorm
from batchless.surgery.recognize import is_batch_normalization, is_convolution
from small_detectors import TINY

SMALL = replace(
    TINY, longest_side=96, rois_per_image=16, proposals_per_image=30, smallest_anchor=8, detections_per_image=10
)
ARCHITECTURES = ("fasterrcnn", "maskrcnn", "retinanet", "fcos")


def small(architecture):
    torch.manual_seed(0)
    return build_detector(f"{architecture}_resnet18_fpn", num_classes=3, settings=SMALL)


def converted(architecture, normalizer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of groups with few values: these networks are tiny
        return bl.convert(small(architecture), normalizer, example=detector_example())


def targets(images):
    masks = torch.zeros(2, *images[0].shape[1:], dtype=torch.uint8)
    masks[0, 8:40, 4:30] = 1
    masks[1, 20:56, 30:60] = 1
    boxes = torch.tensor([[4.0, 8, 30, 40], [30, 20, 60, 56]])
    return [{"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks} for _ in images]


NOTHING = {
    "boxes": torch.zeros(0, 4),
    "labels": torch.zeros(0, dtype=torch.long),
    "masks": torch.zeros(0, 64, 64, dtype=torch.uint8),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("normalizer", ["bn", "gn+ws", "frozen-bn", "bcn-micro+ws", "none+sws"])
def test_every_detector_trains_and_detects_with_every_kind_of_normalizer(architecture, normalizer):
    model, report = converted(architecture, normalizer)
    if normalizer != "bn":
        assert report.replaced
    images = [torch.rand(3, 64, 64)]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.train()
    # One image whose objects are known, and one without any.
    with bl.accumulate(model, optimizer) as step:
        for target in (targets(images)[0], NOTHING):
            losses = model(images, [target])
            assert all(loss.isfinite() for loss in losses.values())
            step.backward(sum(losses.values()), samples=1)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    model.eval()
    with torch.no_grad():
        (found,) = model([torch.rand(3, 90, 120)])
    assert len(found["boxes"]) <= 10
    assert ("masks" in found) == (architecture == "maskrcnn") == learns_masks(f"{architecture}_resnet18_fpn")
    if "masks" in found:
        assert found["masks"].shape[1:] == (1, 90, 120)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_are_standardized_where_the_authors_do(architecture):
    """Backbone, pyramid, towers of the heads; not the proposals, the predictors, or the levels without a normalization."""
    model, report = converted(architecture, "gn+ws")
    plain = {
        name for name, module in model.named_modules() if is_convolution(module) and not isinstance(module, WSConv2d)
    }
    expected = {
        "fasterrcnn": {"rpn.head.conv.0.0", "rpn.head.cls_logits", "rpn.head.bbox_pred"},
        "maskrcnn": {
            *("rpn.head.conv.0.0", "rpn.head.cls_logits", "rpn.head.bbox_pred"),
            *("roi_heads.mask_predictor.conv5_mask", "roi_heads.mask_predictor.mask_fcn_logits"),
        },
        "retinanet": {
            *("backbone.fpn.extra_blocks.p6", "backbone.fpn.extra_blocks.p7"),
            *("head.classification_head.cls_logits", "head.regression_head.bbox_reg"),
        },
        "fcos": {
            *("backbone.fpn.extra_blocks.p6", "backbone.fpn.extra_blocks.p7"),
            *(
                "head.classification_head.cls_logits",
                "head.regression_head.bbox_reg",
                "head.regression_head.bbox_ctrness",
            ),
        },
    }
    assert plain == expected[architecture]
    assert not any(is_batch_normalization(module) for module in model.modules())
    assert report.found_by == "example"


def test_estimates_of_a_head_shared_by_all_levels_are_over_all_of_them():
    """One step: every level's positions count once, however many levels there are."""
    model, _ = converted("retinanet", "bcn-micro(memory=50,warmup=false)+ws")
    norm = next(module for module in model.head.classification_head.modules() if isinstance(module, EstimatedBatchNorm))
    seen = []
    handle = norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    model.train()
    images = [torch.rand(3, 64, 64) for _ in range(3)]
    before = norm.running_mean.clone(), norm.running_var.clone()
    with bl.accumulate(model, torch.optim.SGD(model.parameters(), lr=1e-3)) as step:
        for image in images:
            step.backward(sum(model([image], targets([image])).values()), samples=1)
    handle.remove()
    levels = SMALL.stages + 1
    assert len(seen) == levels * len(images)
    values = torch.cat([x.double().transpose(0, 1).flatten(1) for x in seen], dim=1)
    assert len({x.shape[-1] for x in seen}) > 1
    rate = 1 - (1 - 1 / 50) ** len(images)
    mean = (1 - rate) * before[0] + rate * values.mean(1)
    var = (1 - rate) * before[1] + rate * (values - before[0][:, None]).square().mean(1)
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), var, rtol=1e-4, atol=1e-6)


def test_one_image_at_a_time_is_the_whole_batch():
    """RetinaNet averages its losses over the images and draws nothing at random, so that accumulation is exact."""
    gradients = []
    images = [torch.rand(3, 64, 64, dtype=torch.float64) for _ in range(3)]
    wanted = [*targets(images[:2]), NOTHING]
    wanted[1] = {**wanted[1], "boxes": wanted[1]["boxes"] / 2}
    wanted = [{**target, "boxes": target["boxes"].double()} for target in wanted]
    for size in (1, 3):
        model = converted("retinanet", "gn+ws")[0].double().train()

        def keep(model):
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})

        with bl.accumulate(model, torch.optim.SGD(model.parameters(), lr=1e-3), clip=keep) as step:
            for at in range(0, 3, size):
                losses = model(images[at : at + size], wanted[at : at + size])
                step.backward(sum(losses.values()), samples=size)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-12, msg=name)


def test_evaluation_resizes_as_the_loader_does():
    image = torch.randint(256, (3, 100, 130), dtype=torch.uint8)
    transform = DetectorInput(SMALL).eval()
    batch, _ = transform([image / 255])
    assert batch.image_sizes == [(64, 83)]
    # Bytes are rounded after each direction.
    resized = functional.resize(image, [64, 83], antialias=True) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(batch.tensors[0, :, :, :83] * std + mean, resized, atol=1.1 / 255, rtol=0)
    assert batch.tensors.shape == (1, 3, 64, 96)
    # What has the size already, in evaluation, and everything in training is left as it is.
    for mode, size in ((False, (64, 83)), (True, (50, 70))):
        transform.train(mode)
        same, _ = transform([torch.zeros(3, *size)])
        assert same.image_sizes == [size]


def test_the_training_forward_draws_no_size():
    model = small("retinanet").train()
    images = [torch.rand(3, 64, 64)]
    before = torch.get_rng_state()
    model(images, targets(images))
    assert torch.equal(before, torch.get_rng_state())


def test_a_box_on_the_original_image_comes_back_on_it():
    transform = DetectorInput(SMALL).eval()
    batch, _ = transform([torch.rand(3, 128, 160)])
    (found,) = transform.postprocess([{"boxes": torch.tensor([[0.0, 0, 40, 32]])}], batch.image_sizes, [(128, 160)])
    torch.testing.assert_close(found["boxes"], torch.tensor([[0.0, 0, 80, 64]]))


def test_every_published_network_has_a_name():
    for backbone in ("resnet18", "resnet50", "resnet101", "resnext50_32x4d", "resnext101_32x4d"):
        assert {f"{architecture}_{backbone}_fpn" for architecture in ARCHITECTURES} <= set(DETECTOR_NAMES)


def test_the_authors_resnext_101_has_32_groups_of_4():
    with torch.device("meta"):
        model = build_detector("maskrcnn_resnext101_32x4d_fpn", num_classes=80)
    second = model.backbone.body.layer1[0].conv2
    assert (second.groups, second.out_channels) == (32, 128)
    assert len(model.backbone.body.layer3) == 23
    convolutions = [module for module in model.roi_heads.box_head.modules() if isinstance(module, nn.Conv2d)]
    assert [module.out_channels for module in convolutions] == [256] * 4
    assert sum(isinstance(module, nn.Linear) for module in model.roi_heads.box_head.modules()) == 1
    assert model.roi_heads.box_predictor.cls_score.out_features == 81


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": 5}, "stages must be 2, 3 or 4"),
        ({"channels": 0}, "channels must be 1 or more"),
        ({"longest_side": 10}, "longest_side must be 800"),
        ({"score_threshold": 1.0}, "score_threshold must be in"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DetectorSettings(**changes)


def test_an_unknown_name_gets_the_nearest_ones():
    with pytest.raises(ValueError, match="did you mean maskrcnn_resnet50_fpn"):
        build_detector("maskrcnn_resnet5_fpn", num_classes=2)
