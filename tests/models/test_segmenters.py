import pytest
import torch
from torch import nn

import batchless as bl
from batchless.advise import diagnose
from batchless.models import build_any, build_model
from batchless.models.segmenters import (
    PaddedSegmenter,
    SegmenterSettings,
    build_segmenter,
    pretrained_part,
    segmenter_names,
)
from batchless.models.weights import load_weights

DEEPLAB = "torchvision:deeplabv3_mobilenet_v3_large"


@pytest.mark.parametrize(
    "name", ["cifar_resnet8_lraspp", "cifar_resnet14_lraspp", DEEPLAB, "torchvision:lraspp_mobilenet_v3_large"]
)
def test_scores_have_the_size_of_the_image(name):
    model = build_segmenter(name, num_classes=4).eval()
    assert not any(isinstance(module, nn.GroupNorm) for module in model.modules())
    for size in ((64, 64), (35, 50)):
        assert model(torch.rand(1, 3, *size)).shape == (1, 4, *size)


@pytest.mark.parametrize("name", ["torchvision:fcn_resnet50", "torchvision:deeplabv3_resnet50", DEEPLAB])
def test_torchvisions_own_networks_have_these_keys_and_give_the_same(name):
    """Its own forward answers with a dictionary of the same values."""
    from torchvision.models import get_model

    theirs = get_model(name.partition(":")[2], weights=None, weights_backbone=None, num_classes=3).eval()
    ours = build_segmenter(name, num_classes=3).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.rand(1, 3, 40, 33)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images)["out"])


def test_dilations_are_those_of_the_paper():
    """arXiv 1706.05587: at output stride 16 the last stage has rate 2, at 8 rate 4, times the multi-grid."""
    for stride, rate in ((16, 2), (8, 4)):
        settings = SegmenterSettings(output_stride=stride, multi_grid=(1, 2, 4))
        with torch.device("meta"):
            model = build_segmenter("torchvision:deeplabv3_resnet50", num_classes=21, settings=settings)
        blocks = model.backbone.layer4.children()
        assert [block.conv2.dilation[0] for block in blocks] == [rate, 2 * rate, 4 * rate]
        assert all(block.conv2.padding == block.conv2.dilation for block in model.backbone.layer4.children())
        aspp = [conv[0].dilation[0] for conv in list(model.classifier[0].convs)[1:4]]
        assert aspp == [6 * 16 // stride, 12 * 16 // stride, 18 * 16 // stride]
    small = build_segmenter("torchvision:deeplabv3_resnet50", num_classes=2, settings=settings).eval()
    assert small.backbone(torch.rand(1, 3, 64, 64))["out"].shape[-2:] == (8, 8)


def test_settings_and_names_that_there_are_not():
    with pytest.raises(ValueError, match=r"did you mean torchvision:lraspp_mobilenet_v3_large"):
        build_segmenter("torchvision:lraspp_mobilenet_v3_larg", num_classes=2)
    with pytest.raises(ValueError, match="unknown segmenter 'torchvision:resnet18'"):
        build_segmenter("torchvision:resnet18", num_classes=2)
    with pytest.raises(ValueError, match="6 n \\+ 2"):
        build_segmenter("cifar_resnet9_lraspp", num_classes=2)
    with pytest.raises(ValueError, match="output_stride=8 is a setting of DeepLabV3 on a ResNet"):
        build_segmenter("torchvision:fcn_resnet50", num_classes=2, settings=SegmenterSettings(output_stride=8))
    with pytest.raises(ValueError, match=r"multi_grid=\[1, 2, 4\] is a setting of torchvision:deeplabv3_resnet50"):
        build_segmenter(DEEPLAB, num_classes=2, settings=SegmenterSettings(multi_grid=(1, 2, 4)))
    with pytest.raises(ValueError, match="output_stride must be 8, 16 or null, got 4"):
        SegmenterSettings(output_stride=4)
    with pytest.raises(ValueError, match="multi_grid has three factors"):
        SegmenterSettings(multi_grid=(1, 2))
    assert "cifar_resnet8_lraspp" in segmenter_names()


@pytest.mark.parametrize("normalizer", ["gn+ws", "bcn-micro+ws", "frozen-bn", "ln", "none+sws"])
def test_one_image_trains_deeplab_with_every_normalizer_that_can(normalizer):
    model = build_segmenter(DEEPLAB, num_classes=3)
    model, report = bl.convert(model, normalizer, example=torch.zeros(2, 3, 64, 64))
    model.train()
    loss = model(torch.rand(1, 3, 64, 64)).square().mean()
    loss.backward()
    assert loss.isfinite()
    assert report.replaced


def test_the_doctor_predicts_what_cannot():
    found = diagnose(build_segmenter(DEEPLAB, num_classes=3), torch.zeros(2, 3, 64, 64), images_per_forward=1)
    assert [finding.layer for finding in found.findings if finding.kind == "raises"] == ["classifier.0.convs.4.2"]
    fine = diagnose(
        build_segmenter("cifar_resnet8_lraspp", num_classes=3), torch.zeros(2, 3, 64, 64), images_per_forward=1
    )
    assert not [finding for finding in fine.findings if finding.severity == "error"]


def test_the_final_scores_and_the_gate_stay_plain():
    model, _ = bl.convert(
        build_segmenter("cifar_resnet8_lraspp", num_classes=3), "gn+ws", example=torch.zeros(2, 3, 32, 32)
    )
    plain = {name for name, module in model.named_modules() if type(module) is nn.Conv2d}
    assert plain == {"gate.1", "near_scores", "far_scores"}
    folded = bl.fold(model.eval())
    images = torch.rand(1, 3, 32, 40)
    with torch.no_grad():
        torch.testing.assert_close(folded(images), model(images), rtol=1e-4, atol=1e-4)


def test_weights_of_a_classifier_go_into_the_backbone(tmp_path):
    for name, classifier in (
        ("torchvision:fcn_resnet50", "torchvision:resnet50"),
        (DEEPLAB, "torchvision:mobilenet_v3_large"),
    ):
        body = build_model(classifier, num_classes=7)
        torch.save(body.state_dict(), tmp_path / "body.pt")
        model = build_segmenter(name, num_classes=3)
        part = pretrained_part(model)
        assert part is model.backbone
        load_weights(part, tmp_path / "body.pt", part=True)
        loaded = dict(body.named_parameters())
        for key, value in part.named_parameters():
            assert torch.equal(value, loaded[key] if key in loaded else loaded[f"features.{key}"])


def test_the_own_kind_can_be_looked_at_by_name():
    assert build_any("cifar_resnet8_lraspp").eval()(torch.rand(1, 3, 16, 16)).shape == (1, 10, 16, 16)


def test_segmentation_models_take_images_of_any_size():
    pytest.importorskip("segmentation_models_pytorch")
    settings = SegmenterSettings(output_stride=16)
    for name in ("smp:DeepLabV3-resnet18", "smp:Unet-mobilenet_v2"):
        model = build_segmenter(name, num_classes=5, settings=settings if "DeepLab" in name else None).eval()
        assert isinstance(model, PaddedSegmenter)
        assert pretrained_part(model) is model.network.encoder
        with torch.no_grad():
            assert model(torch.rand(1, 3, 50, 33)).shape == (1, 5, 50, 33)
            images = torch.rand(1, 3, 64, 64)
            torch.testing.assert_close(model(images), model.network(images))
    with pytest.raises(ValueError, match="unknown architecture"):
        build_segmenter("smp:DeepLab-resnet18", num_classes=2)
