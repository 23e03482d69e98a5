import dataclasses

import pytest
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn_v2
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import batchless as bl
from batchless.advise import ConvertConfig, Diagnosis, DoctorConfig, Finding, diagnose, run_convert, run_doctor
from batchless.models import CifarResNet
from batchless.nn import EstimatedBatchNorm, FrozenBatchNorm

SMALL_DETECTOR = {"min_size": 64, "max_size": 64, "rpn_pre_nms_top_n_train": 20, "rpn_post_nms_top_n_train": 10}


def found(model: nn.Module, shape: tuple[int, ...], images: int = 32, **settings) -> list[tuple[str, str, str]]:
    """Severity, layer and kind of each finding."""
    said = diagnose(model, torch.rand(shape), images_per_forward=images, try_conversion=False, **settings)
    return [(finding.severity, finding.layer, finding.kind) for finding in said.findings]


def explanation(model: nn.Module, shape: tuple[int, ...], images: int) -> str:
    (finding,) = diagnose(model, torch.rand(shape), images_per_forward=images).findings
    return finding.explanation


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (1, "raises"),
        (2, "few values"),
        (7, "few values"),
        (8, "few images"),
        (15, "few images"),
        (16, None),
        (64, None),
    ],
)
def test_batch_norm_of_pooled_maps(images, expected):
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3))
    severity = "error" if expected == "raises" else "warning"
    assert found(model, (1, 3, 8, 8), images) == ([(severity, "1", expected)] if expected else [])


def test_the_values_are_counted_for_any_number_of_images_and_any_example():
    model = nn.Sequential(nn.Conv2d(3, 3, 2, 2), nn.BatchNorm2d(3))
    for given in (1, 2, 5):
        assert explanation(model, (given, 3, 2, 4), 3) == "statistics of 6 values per channel at 3 images: mostly noise"
        assert explanation(model, (given, 3, 2, 2), 2).endswith(
            ": every output is near +1 or -1, and hardly a gradient gets through"
        )
        assert "normalizes by the statistics of 4 images in training" in explanation(model, (given, 3, 2, 4), 4)


def test_the_fewest_values_of_many_calls_count():
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

        def forward(self, x):
            return [self.head(nn.functional.avg_pool2d(x, size)) for size in (1, 4, 8)]

    assert found(Pyramid(), (2, 3, 8, 8), 1) == [("error", "head.1", "raises"), ("warning", "head.1", "shared")]
    assert found(Pyramid(), (2, 3, 8, 8), 64) == [("warning", "head.1", "shared")]
    said = diagnose(Pyramid(), torch.rand(1, 3, 8, 8), images_per_forward=64)
    assert "called 3 times per forward" in said.findings[0].explanation
    micro, _ = bl.convert(Pyramid(), "bcn-micro(groups=1)+ws", example=torch.rand(1, 3, 16, 16))
    assert found(micro, (1, 3, 16, 16), 1, images_per_step=64) == []


def test_accumulation_is_found_where_the_step_sees_more_than_a_forward():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    shape = (2, 3, 8, 8)
    assert found(model, shape, 32) == found(model, shape, 32, images_per_step=32) == []
    assert found(model, shape, 32, images_per_step=64) == [("warning", "1", "accumulation")]
    said = diagnose(model, torch.rand(shape), images_per_forward=32, images_per_step=64).findings[0]
    assert "of the 32 images of a forward, not of the 64 of a step" in said.explanation
    assert "2 forwards equal one of 64 images" in said.fix
    for normalizer in ("gn+ws", "bcn-micro+ws", "none+sws"):
        assert found(bl.convert(model, normalizer)[0], shape, 1, images_per_step=64) == []
    assert found(bl.convert(model, "bcn+ws")[0], shape, 32, images_per_step=64) == [
        ("warning", "1.batch_norm", "accumulation")
    ]


def test_federated_averaging_of_statistics():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    shape = (2, 3, 8, 8)
    assert found(model, shape, federated=True) == [("warning", "1", "federated")]
    assert found(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), shape, federated=True) == []
    assert found(bl.convert(model, "gn+ws")[0], shape, 1, federated=True) == []
    assert found(bl.convert(model, "bcn-micro+ws")[0], shape, 1, federated=True) == [
        ("warning", "1.batch_norm", "federated")
    ]


def test_batch_norm_in_evaluation_mode_within_a_training_model():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model(torch.rand(2, 3, 4, 4))
    model[0].eval()
    assert found(model, (2, 3, 4, 4)) == [("warning", "0", "frozen")]
    model[0].reset_running_stats()
    assert found(model, (2, 3, 4, 4)) == [("error", "0", "frozen")]
    # A model given in evaluation mode is asked about training.
    assert found(model.eval(), (2, 3, 4, 4)) == []
    assert not any(module.training for module in model.modules())


def test_a_model_that_keeps_its_own_norms_in_evaluation_mode_does_so_in_the_dry_run():
    class FineTuned(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[0].eval()
            return self

    model = FineTuned(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    model[0].running_mean.fill_(1)
    assert found(model.eval(), (2, 3, 4, 4)) == [("warning", "0", "frozen")]


def test_a_frozen_affine_map_does_not_freeze_the_statistics():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False)).requires_grad_(False)
    (finding,) = diagnose(model, torch.rand(2, 3, 4, 4), images_per_forward=32).findings
    assert (finding.layer, finding.kind) == ("0", "frozen")
    assert "its statistics are not" in finding.explanation


def test_frozen_layers_of_every_library():
    from timm.layers import FrozenBatchNormAct2d
    from torchvision.ops import FrozenBatchNorm2d

    frozen = [FrozenBatchNorm2d(3), FrozenBatchNormAct2d(3), FrozenBatchNorm(3)]
    assert found(nn.Sequential(*frozen), (1, 3, 2, 2), 1) == [("error", str(index), "frozen") for index in range(3)]
    for layer in frozen:
        layer.running_mean.fill_(0.5)
    model = nn.Sequential(*frozen)
    assert found(model, (1, 3, 2, 2), 1) == [("warning", str(index), "frozen") for index in range(3)]
    assert found(model, (1, 3, 2, 2), 1, federated=True, images_per_step=8) == found(model, (1, 3, 2, 2), 1)


@pytest.mark.parametrize(
    ("layer", "shape", "kind"),
    [
        (nn.InstanceNorm2d(3), (1, 3, 1, 1), "raises"),
        (nn.InstanceNorm2d(3), (4, 3, 1, 1), "raises"),
        (nn.InstanceNorm2d(3), (4, 3, 2, 2), "few values"),
        (nn.InstanceNorm2d(3), (1, 3, 4, 4), None),
        (nn.GroupNorm(8, 8), (1, 8, 1, 1), "raises"),
        (nn.GroupNorm(4, 8), (4, 8, 1, 1), "few values"),
        (nn.GroupNorm(4, 8), (4, 8, 2, 2), None),
        (nn.LayerNorm(1), (4, 5, 1), "one value"),
        (nn.LayerNorm(4), (4, 5, 4), "few values"),
        (nn.RMSNorm(8), (4, 5, 8), None),
        (nn.BatchNorm1d(3), (1, 3), "raises"),
        (EstimatedBatchNorm(3), (1, 3), None),
    ],
    ids=str,
)
def test_other_norms_of_few_values_at_one_image(layer, shape, kind):
    at_one = {found_kind for _, _, found_kind in found(layer, shape, 1)}
    assert at_one == ({kind} if kind else set())
    if kind in ("raises", None):
        inputs = torch.rand(1, *shape[1:])
        if kind:
            with pytest.raises(ValueError, match="Expected more than 1"):
                layer.train()(inputs)
        else:
            layer.train()(inputs)


def test_a_group_of_one_value_is_an_error_though_two_images_do_not_raise():
    """torch raises only if the batch has one image; the output is 0 but for rounding either way."""
    model = nn.Sequential(nn.GroupNorm(8, 8))
    assert model(torch.rand(2, 8, 1, 1)).abs().max() < 1e-4
    assert found(model, (2, 8, 1, 1), 2) == [("error", "0", "one value")]
    assert "its variance is 0" in explanation(model, (2, 8, 1, 1), 2)


def test_the_fix_of_a_group_norm_is_a_number_of_groups_that_works():
    model = nn.Sequential(nn.GroupNorm(32, 64))
    (finding,) = diagnose(model, torch.rand(1, 64, 1, 1), images_per_forward=1).findings
    assert "gn(groups=8)" in finding.fix
    assert found(nn.Sequential(nn.GroupNorm(8, 64)), (1, 64, 1, 1), 1) == []


def test_two_steps_of_batch_channel_norm_are_looked_at_apart():
    model, _ = bl.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), "bcn(groups=4)")
    assert found(model, (1, 3, 3, 3), 1) == [("warning", "1", "few values"), ("error", "1.batch_norm", "raises")]


def test_code_that_fails_at_one_image_only_is_found_where_it_is():
    class Whitened(nn.Module):
        def forward(self, x):
            return nn.functional.batch_norm(x, None, None, training=self.training)

    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), Whitened())
    model = nn.Sequential(nn.Conv2d(3, 4, 1), pooled, nn.GroupNorm(1, 4), nn.BatchNorm2d(4))
    assert found(model, (1, 3, 8, 8), 1) == [
        ("error", "1.1", "raises"),
        ("warning", "2", "few values"),
        ("error", "3", "raises"),
    ]
    said = diagnose(model, torch.rand(1, 3, 8, 8), images_per_forward=1)
    assert "no known normalization" in said.findings[0].explanation
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model.train()(torch.rand(1, 3, 8, 8))


def test_a_training_forward_that_asks_for_more_is_looked_at_in_evaluation():
    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.extra = nn.BatchNorm2d(3), nn.BatchNorm1d(3)

        def forward(self, x, labels=None):
            x = self.norm(x)
            if self.training:
                return self.extra(x.mean((2, 3))), labels + 1
            return x

    said = diagnose(Teacher(), torch.rand(2, 3, 4, 4), images_per_forward=1)
    assert [(finding.layer, finding.kind) for finding in said.findings] == [("norm", "few images")]
    assert any("evaluation forward" in note for note in said.notes)
    assert any("1 normalization layers did not run and are not judged, such as extra" in note for note in said.notes)
    labels = torch.zeros(2, dtype=torch.long)
    said = diagnose(Teacher(), (torch.rand(2, 3, 4, 4), labels), images_per_forward=1)
    assert {finding.layer for finding in said.findings} == {"norm", "extra"}
    assert not said.notes


def test_mask_rcnn_with_a_frozen_backbone():
    """As torchvision builds it around pretrained weights; here they are none, so nothing is normalized at all."""
    torch.manual_seed(0)
    model = MaskRCNN(resnet_fpn_backbone(backbone_name="resnet18", weights=None), num_classes=2, **SMALL_DETECTOR)
    images = [torch.rand(3, 64, 64)]
    said = diagnose(model, (images,), images_per_forward=1, images_per_step=16, try_conversion=False)
    assert {(finding.severity, finding.kind) for finding in said.findings} == {("error", "frozen")}
    assert len(said.findings) == said.normalizations == 20
    for name, buffer in model.backbone.named_buffers():
        if name.endswith("running_mean"):
            buffer.fill_(0.1)
    said = diagnose(model, (images,), images_per_forward=1, images_per_step=16, try_conversion=False)
    assert {(finding.severity, finding.kind) for finding in said.findings} == {("warning", "frozen")}


def test_the_heads_of_mask_rcnn_v2_run_on_proposals():
    """Batch normalization in both heads of the regions: of many values, but of one image's."""
    torch.manual_seed(0)
    model = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=2, **SMALL_DETECTOR)
    said = diagnose(model, ([torch.rand(3, 64, 64)],), images_per_forward=1, try_conversion=False)
    kinds = {finding.layer: finding.kind for finding in said.findings}
    assert kinds["roi_heads.box_head.0.1"] == kinds["roi_heads.mask_head.0.1"] == "few images"
    assert not said.notes


def test_the_model_the_example_and_the_random_numbers_are_as_before():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.ReLU(inplace=True))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, state = torch.rand(2, 3, 8, 8), torch.random.get_rng_state()
    kept = images.clone()
    diagnose(model, images, images_per_forward=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(images, kept)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all("forward" not in vars(module) for module in model.modules())


def test_the_table_groups_layers_and_shows_the_conversion():
    said = diagnose(resnet18(), torch.rand(1, 3, 32, 32), images_per_forward=1, images_per_step=8)
    text = str(said)
    assert text.startswith(
        "ResNet at 1 image per forward, 8 per step: 20 of 20 normalization layers affected, 5 errors\n"
    )
    lines = text.splitlines()
    assert lines[2] == ("error    raises           5  layer4.0.bn1, layer4.0.bn2, layer4.0.downsample.1, and 2 more")
    assert [line.split()[:3] for line in lines if line.startswith("warning")] == [
        ["warning", "few", "images"],
        ["warning", "accumulation", "20"],
        ["warning", "few", "values"],
    ]
    assert 'in Python:  model, report = batchless.convert(model, "gn+ws")' in lines
    assert not any(line.startswith("to look at") for line in lines)  # no name that the command line knows
    assert max(len(line) for line in lines[2:-1]) <= 120


def test_the_proposal_is_tried_and_what_it_leaves_is_told():
    kept = diagnose(CifarResNet(8, 10), torch.rand(1, 3, 32, 32), images_per_forward=1)
    assert kept.conversion[-1] == "tried on a copy: nothing is left of the above"
    narrow = nn.Sequential(nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8))
    left = diagnose(narrow, torch.rand(1, 3, 8, 8), images_per_forward=1)
    assert left.conversion[-1] == (
        "tried on a copy: few values on 1 layer, such as 2 (statistics of 2 values per group at 1 image: every output is "
        "near +1 or -1, and hardly a gradient gets through; fewer groups, such as gn(groups=1); or larger images)"
    )
    quick = diagnose(narrow, torch.rand(1, 3, 8, 8), images_per_forward=1, try_conversion=False)
    assert quick.conversion == left.conversion[:-1]
    assert quick.findings == left.findings


def test_a_converted_model_with_findings_is_told_to_start_from_the_original():
    model, _ = bl.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), "bn+ws")
    said = diagnose(model, torch.rand(1, 3, 8, 8), images_per_forward=1)
    assert "convert(original" in said.conversion[0]
    assert "converted to bn+ws already" in said.conversion[1]


def test_without_findings_it_says_so_in_one_line():
    said = diagnose(nn.Sequential(nn.GroupNorm(1, 3)), torch.rand(1, 3, 8, 8), images_per_forward=1)
    assert said.ok
    assert str(said) == "Sequential at 1 image per forward: nothing wrong with its 1 normalization layer"


def test_no_conversion_is_proposed_where_it_would_change_nothing():
    said = diagnose(nn.Sequential(nn.InstanceNorm2d(3)), torch.rand(1, 3, 1, 1), images_per_forward=1)
    assert not said.ok
    assert said.conversion == ()


def test_synchronized_layers_are_judged_as_on_one_process():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SyncBatchNorm(8))
    said = diagnose(model, torch.rand(1, 3, 8, 8), images_per_forward=2)
    assert [finding.kind for finding in said.findings] == ["few images"]
    assert any("synchronized" in note for note in said.notes)


def test_findings_and_diagnoses_are_values():
    finding = Finding("warning", "a", "shared", "why", "what")
    assert finding == dataclasses.replace(finding)
    with pytest.raises(dataclasses.FrozenInstanceError):
        finding.layer = "b"
    fields = {"model": "m", "images_per_forward": 1, "images_per_step": 1, "normalizations": 1, "conversion": ()}
    assert not Diagnosis(findings=(finding,), notes=(), **fields).ok


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images_per_forward": 0}, r"images_per_forward must be 1 or more, got 0"),
        ({"images_per_forward": 4, "images_per_step": 2}, r"images_per_step is 2, fewer than images_per_forward=4"),
    ],
)
def test_impossible_numbers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        diagnose(nn.Sequential(nn.BatchNorm2d(3)), torch.rand(1, 3, 4, 4), **arguments)
    with pytest.raises(ValueError, match=message):
        DoctorConfig(model="cifar_resnet8", **arguments)


@pytest.mark.parametrize("example", [torch.rand(1, 4, 8, 8), torch.rand(3, 3), (torch.rand(1, 3, 8, 8), 5)])
def test_an_example_that_the_model_does_not_run_on_is_refused(example):
    with pytest.raises(ValueError, match=r"does not run on the example \(layer .*: .*Error: .*images of another size"):
        diagnose(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), example, images_per_forward=1)


@pytest.mark.parametrize("example", [(), (5,), torch.rand(()), []])
def test_an_example_without_images_is_refused(example):
    with pytest.raises(ValueError, match="the example holds no images"):
        diagnose(nn.Sequential(nn.BatchNorm2d(3)), example, images_per_forward=1)


def test_a_model_by_name_and_the_command_that_converts_it():
    config = DoctorConfig(model="timm:test_resnet", image_size=64, images_per_step=4, federated=True)
    said = run_doctor(config)
    assert said.model == "timm:test_resnet"
    assert {finding.kind for finding in said.findings} >= {"accumulation", "federated"}
    assert "to look at: batchless convert timm:test_resnet gn+ws" in str(said)
    assert run_doctor(DoctorConfig(model="timm:test_resnet", image_size=64, images_per_forward=16)).ok


def test_detectors_by_name_are_told_to_be_without_pretrained_weights():
    said = run_doctor(DoctorConfig(model="torchvision:ssdlite320_mobilenet_v3_large", image_size=32))
    assert any(finding.kind == "raises" for finding in said.findings)
    assert "FrozenBatchNorm2d" in said.notes[0]


def test_a_size_that_the_model_does_not_run_on_is_told_with_the_one_it_is_built_for():
    with pytest.raises(
        ValueError, match=r"^timm:levit_128s at image_size=64 \(it is built for 224\): the model does not"
    ):
        run_doctor(DoctorConfig(model="timm:levit_128s", image_size=64))
    with pytest.raises(
        ValueError, match=r"^timm:levit_128s at image_size=64 \(it is built for 224\): the model does not"
    ):
        run_convert(ConvertConfig(model="timm:levit_128s", normalizer="gn+ws", image_size=64))


def test_the_conversion_of_a_model_by_name():
    report = run_convert(ConvertConfig(model="smp:PSPNet-resnet18", normalizer="gn+ws", image_size=64))
    assert report.normalizer == "gn+ws"
    assert report.found_by == "example"
    assert len(report.replaced) > 40
    assert not report.skipped


def test_wrong_settings_are_refused_before_anything_is_built():
    with pytest.raises(ValueError, match=r"did you mean 'gn|did you mean gn|unknown"):
        ConvertConfig(model="cifar_resnet8", normalizer="gm+ws")
    for kind in (DoctorConfig, ConvertConfig):
        settings = {"normalizer": "gn"} if kind is ConvertConfig else {}
        with pytest.raises(ValueError, match="image_size is in pixels and must be 1 or more, got 0"):
            kind(model="cifar_resnet8", image_size=0, **settings)
    with pytest.raises(ValueError, match="did you mean cifar_resnet8"):
        run_doctor(DoctorConfig(model="cifar_resnt8"))


@pytest.mark.parametrize("name", ["fcos_resnet18_fpn", "cifar_resnet8_lraspp"])
def test_networks_of_the_other_tasks_by_the_names_that_train_has(name):
    said = run_doctor(DoctorConfig(model=name, image_size=64))
    assert said.findings
    assert any("nothing is left of the above" in line for line in said.conversion)
    report = run_convert(ConvertConfig(model=name, normalizer="gn+ws", image_size=64))
    assert any(entry.now == "WSConv2d" for entry in report.replaced)


def test_the_nearest_detector_is_told():
    with pytest.raises(ValueError, match=r"unknown model 'fcos_resnet19_fpn' \(did you mean fcos_resnet18_fpn"):
        run_doctor(DoctorConfig(model="fcos_resnet19_fpn"))
