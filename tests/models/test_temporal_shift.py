import copy
import pickle

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import batchless as bl
import reference
from batchless.advise import DoctorConfig, run_doctor
from batchless.models import (
    SegmentNetwork,
    TemporalShift,
    build_any,
    build_model,
    build_video,
    insert_temporal_shift,
    online,
    temporal_shift,
)
from batchless.models.video import clip_input
from batchless.models.weights import load_weights

DIRECTIONS = pytest.mark.parametrize("direction", ["both", "past"])


def clips(count=2, frames=4, size=16, dtype=torch.float32):
    return torch.rand(count, frames, 3, size, size, dtype=dtype)


@given(st.integers(1, 3), st.integers(1, 5), st.integers(2, 19), st.integers(2, 9), st.sampled_from(["both", "past"]))
def test_it_is_the_literal_loop_and_so_is_its_gradient(count, frames, channels, share, direction):
    share = min(share, channels)
    x = torch.randn(count, frames, channels, 2, 3, dtype=torch.float64, requires_grad=True)
    y = temporal_shift(x, share=share, direction=direction)
    expected = reference.temporal_shift(x, share, direction)
    assert torch.equal(y, expected)
    if frames > 1:  # a single frame may be exchanged for zeros altogether
        upstream = torch.randn_like(y)
        assert torch.equal(*(torch.autograd.grad(value, x, upstream)[0] for value in (y, expected)))


def test_a_shift_of_no_channel_is_an_error():
    for channels, share, direction in ((7, 8, "both"), (8, 1, "both"), (8, 0, "past"), (8, 8, "future")):
        with pytest.raises(ValueError, match=f"share={share} of {channels} channels"):
            temporal_shift(torch.zeros(1, 2, channels), share=share, direction=direction)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18", "timm:resnet26t", "torchvision:resnet50"])
def test_it_goes_before_the_first_convolution_of_every_residual_branch(name):
    plain = build_model(name, num_classes=3)
    network = copy.deepcopy(plain)
    blocks = insert_temporal_shift(network, segments=4)
    assert len(blocks) == len(plain.layer1) + len(plain.layer2) + len(plain.layer3) + len(plain.layer4)
    assert blocks[0] == "layer1.0"
    for block in blocks:
        assert isinstance(network.get_submodule(f"{block}.conv1"), TemporalShift)
        assert (
            network.get_submodule(f"{block}.conv1.net").weight.shape
            == plain.get_submodule(f"{block}.conv1").weight.shape
        )
    assert sum(isinstance(module, TemporalShift) for module in network.modules()) == len(blocks)


def test_the_branch_sees_shifted_frames_and_the_shortcut_the_frame_itself():
    network = build_model("torchvision:resnet18", num_classes=3).double().eval()
    block = network.layer1[0]
    x = torch.randn(2, 4, 64, 5, 5, dtype=torch.float64)
    shifted = reference.temporal_shift(x, 8, "both").flatten(0, 1)
    branch = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(shifted)))))
    expected = (branch + x.flatten(0, 1)).relu()
    insert_temporal_shift(network, segments=4)
    torch.testing.assert_close(network.layer1[0](x.flatten(0, 1)), expected)


def test_deep_networks_are_shifted_in_every_second_block_as_the_authors_do():
    with torch.device("meta"):
        network = build_model("torchvision:resnet101", num_classes=3)
    blocks = insert_temporal_shift(network, segments=4)
    assert [block for block in blocks if block.startswith("layer1")] == ["layer1.0", "layer1.2"]
    assert sum(block.startswith("layer3") for block in blocks) == 12


def test_networks_that_cannot_be_shifted_say_so():
    with pytest.raises(ValueError, match="MobileNetV2 has no residual block"):
        build_video("tsm:torchvision:mobilenet_v2", num_classes=3)
    network = build_model("cifar_resnet8", num_classes=3)
    insert_temporal_shift(network, segments=2)
    with pytest.raises(ValueError, match=r"blocks\.0\.conv1 is a TemporalShift"):
        insert_temporal_shift(network, segments=2)
    with pytest.raises(ValueError, match="did you mean torchvision:r3d_18"):
        build_video("torchvision:r3d_19", num_classes=3)


def test_scores_are_averaged_over_the_frames():
    network = build_video("tsn:cifar_resnet8", num_classes=3, frames=4).double().eval()
    x = clips(dtype=torch.float64)
    frame_by_frame = torch.stack([network.base_model(x[:, t]) for t in range(4)]).mean(0)
    torch.testing.assert_close(network(x), frame_by_frame)
    torch.testing.assert_close(network(x.flip(1)), network(x), msg="tsn does not see the order")
    with pytest.raises(ValueError, match="built for T=4 frames"):
        network(x[:, :3])


@DIRECTIONS
def test_with_shifts_the_order_matters(direction):
    kind = {"both": "tsm", "past": "tsm-online"}[direction]
    network = build_video(f"{kind}:cifar_resnet8", num_classes=3, frames=4).double().eval()
    x = clips(dtype=torch.float64)
    assert not torch.allclose(network(x.flip(1)), network(x))
    assert torch.equal(network(torch.cat([x, x]))[:2], network(torch.cat([x, x]))[2:])


def test_frame_by_frame_is_the_whole_clip():
    network = build_video("tsm-online:cifar_resnet8", num_classes=3, frames=5).double().eval()
    x = clips(frames=5, dtype=torch.float64)
    with online(network) as scores_of:
        scores = torch.stack([scores_of(frame) for frame in x.unbind(1)], dim=1)
    torch.testing.assert_close(scores.flatten(0, 1), network.base_model(x.flatten(0, 1)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scores.mean(1), network(x), rtol=1e-12, atol=1e-12)
    with online(network) as scores_of:  # nothing is remembered from the clip before
        torch.testing.assert_close(scores_of(x[:, 0]), scores[:, 0], rtol=1e-12, atol=1e-12)
    for other in ("tsm:cifar_resnet8", "tsn:cifar_resnet8"):
        with pytest.raises(ValueError, match="look back only"), online(build_video(other, num_classes=3)):
            pass


@pytest.mark.parametrize("normalizer", ["gn+ws", "bcn-micro+ws", "bcn+ws", "none+sws", "in", "frozen-bn"])
def test_every_normalizer_converts_it_as_the_plain_network(normalizer):
    network = build_video("tsm:cifar_resnet8", num_classes=3, frames=4)
    plain = build_model("cifar_resnet8", num_classes=3)
    x = clips()
    converted, report = bl.convert(network, normalizer, example=x)
    _, plain_report = bl.convert(plain, normalizer, example=x[:, 0])
    found = [entry.now for entry in report.replaced]
    assert found == [entry.now for entry in plain_report.replaced]
    gains = [layer.gamma for layer in converted.modules() if hasattr(layer, "gamma")]
    plain_gains = [
        layer.gamma for layer in bl.convert(plain, normalizer, example=x[:, 0])[0].modules() if hasattr(layer, "gamma")
    ]
    assert gains == plain_gains, "the activation before a shift is that of the frame before"
    assert converted.train()(x).isfinite().all()


def test_folded_it_gives_the_same():
    network, _ = bl.convert(build_video("tsm:cifar_resnet8", num_classes=3, frames=4), "bn+ws", example=clips())
    network.eval()
    x = clips()
    torch.testing.assert_close(bl.fold(network)(x), network(x), rtol=1e-4, atol=1e-5)


def test_it_is_copied_and_pickled():
    network = build_video("tsm:cifar_resnet8", num_classes=3, frames=4).eval()
    x = clips()
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(x), network(x))


def test_weights_of_the_plain_network_and_of_the_authors_fit(tmp_path):
    plain = build_model("torchvision:resnet18", num_classes=7)
    network = build_video("tsm:torchvision:resnet18", num_classes=7, frames=4)
    assert "base_model.layer1.0.conv1.net.weight" in network.state_dict()  # documented, and the authors' own
    authors = {
        f"module.{key}": value
        for key, value in build_video("tsm:torchvision:resnet18", num_classes=7).state_dict().items()
    }
    for name in ("weight", "bias"):
        authors[f"module.new_fc.{name}"] = authors.pop(f"module.base_model.fc.{name}")
    for state, source in (
        (plain.state_dict(), plain.layer1[0].conv1.weight),
        (authors, authors["module.base_model.layer1.0.conv1.net.weight"]),
    ):
        torch.save({"state_dict": state}, tmp_path / "weights.pth")
        load_weights(network, tmp_path / "weights.pth")
        assert torch.equal(network.base_model.layer1[0].conv1.net.weight, source)
    torch.save(build_model("torchvision:resnet18", num_classes=4).state_dict(), tmp_path / "weights.pth")
    notes = load_weights(network, tmp_path / "weights.pth")
    assert "base_model.fc.weight, base_model.fc.bias of weights.pth are for 4 classes" in notes[1]
    torch.save(build_model("torchvision:resnet34", num_classes=4).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="another network"):
        load_weights(network, tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["r3d_18", "mc3_18", "r2plus1d_18"])
@pytest.mark.parametrize("normalizer", ["bcn-micro+ws", "none+sws"])
def test_every_convolution_of_torchvisions_3d_networks_is_reached(name, normalizer):
    network = build_video(f"torchvision:{name}", num_classes=3)
    x = clip_input(network, clips(1, 4, 16))
    assert x.shape == (1, 3, 4, 16, 16)
    converted, report = bl.convert(network, normalizer, example=x)
    convolutions = sum(isinstance(module, nn.Conv3d) for module in network.modules())
    assert sum("Conv3d" in entry.now for entry in report.replaced) == convolutions
    assert converted.train()(x).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("normalizer", ["gn", "bcn+ws", "bcn-micro+ws", "none+sws", "in", "ln", "frozen-bn"])
def test_s3d_too(normalizer):
    network = build_video("torchvision:s3d", num_classes=3)
    x = torch.rand(1, 3, 14, 224, 224)
    converted, report = bl.convert(network, normalizer, example=x)
    assert report.replaced
    assert converted.train()(x).isfinite().all()


def test_doctor_looks_at_clips():
    diagnosis = run_doctor(DoctorConfig(model="tsm:cifar_resnet8", images_per_forward=1, image_size=16))
    assert diagnosis.findings


def test_a_timm_network_keeps_its_own_forward():
    network = SegmentNetwork(timm.create_model("test_resnet", num_classes=3), segments=2)
    insert_temporal_shift(network, segments=2)
    assert network(clips(1, 2, 32)).shape == (1, 3)
    assert isinstance(build_any("tsm:timm:test_resnet"), SegmentNetwork)
