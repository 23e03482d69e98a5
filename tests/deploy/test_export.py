import copy
import errno
import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from exported_files import FORMATS, file, plain_weights, run_file
from timm.layers import StdConv2d
from torch import nn

from batchless.data.statistics import normalized
from batchless.deploy import ExportConfig, export_checkpoint, formats, load_folded
from batchless.deploy import export as exporting
from batchless.deploy.about import about
from batchless.deploy.export import TOLERANCE, largest_difference
from batchless.deploy.folded import folded_bytes, folded_plain, run_folded
from batchless.deploy.formats import traced
from batchless.deploy.images import network_input
from batchless.deploy.real_inputs import real_squares
from batchless.models import build_model
from batchless.nn import Reparameterized, SkipInit
from batchless.runs import load_checkpoint
from batchless.tasks import load_trained
from batchless.tasks.trained import build_converted

MODELS = ["cifar_resnet8", "torchvision:resnet18", "timm:resnet10t"]
NORMALIZERS = ["gn+ws", "bcn-micro+ws", "bn", "none+sws"]
# Every network with every normalizer, each of both in every format; and one whose layers pad in their own forward.
CASES = [
    *(
        (model, normalizer, FORMATS[(i + j) % 3])
        for (i, model), (j, normalizer) in itertools.product(enumerate(MODELS), enumerate(NORMALIZERS))
    ),
    ("timm:tf_mobilenetv3_small_minimal_100", "bcn-micro+ws", "onnx"),
]


WORDS = {"task", "model", "normalizer", "input", "output"}


@pytest.mark.filterwarnings("ignore:.*fewer groups give steadier statistics:UserWarning")
@pytest.mark.parametrize(("model", "normalizer", "format"), CASES)
@torch.no_grad()
def test_an_exported_file_has_the_scores_of_the_trained_network(checkpoint, tmp_path, model, normalizer, format):
    path = checkpoint(model, normalizer)
    trained = load_trained(path)
    exported = export_checkpoint(
        ExportConfig(checkpoint=str(path), format=format, out=str(tmp_path / "out" / file(format)))
    )
    assert exported.path == tmp_path / "out" / file(format)
    assert exported.bytes == exported.path.stat().st_size
    assert [entry.name for entry in exported.path.parent.iterdir()] == [file(format)]
    assert exported.images_from == "the run's test images"
    images = network_input(torch.cat(real_squares(trained)[0]), trained)
    exact = copy.deepcopy(trained.model).double()(images.double())
    # Groups of few values amplify rounding: what the network's own float32 loses a file may lose twice.
    rounding = float((trained.model(images) - exact).abs().max() / exact.abs().max())
    allowed = 5e-5 + 2 * rounding
    assert allowed < 1e-3
    assert 0 <= exported.difference < allowed
    for count in (1, 2, 4):
        expected = trained.model(images[:count])
        assert expected.std(dim=1).min() > 0
        scale = float(expected.abs().max())
        torch.testing.assert_close(run_file(exported.path, images[:count]), expected, rtol=0, atol=allowed * scale)
    if format == "onnx":
        convolutions = [module for module in trained.model.modules() if isinstance(module, nn.Conv2d)]
        assert plain_weights(exported.path) == [True] * len(convolutions)


def test_the_onnx_file_says_what_its_user_must_know(checkpoint):
    data = {"resize_shorter_side": 36}
    path = checkpoint(normalizer="bcn-micro+ws", classes=('a "quoted" name', "straße"), data=data)
    exported = export_checkpoint(ExportConfig(checkpoint=str(path)))
    assert exported.path == path.with_name("best.onnx")
    session = onnxruntime.InferenceSession(str(exported.path), providers=["CPUExecutionProvider"])
    told = session.get_modelmeta().custom_metadata_map
    assert {name: json.loads(told[name]) for name in told.keys() - WORDS} == {
        "classes": ['a "quoted" name', "straße"],
        "mean": [0.48, 0.5, 0.52],
        "std": [0.21, 0.25, 0.3],
        "image_size": 32,
        "resize_shorter_side": 36,
        "longest_side": None,
        "sampling": None,
        "normalization_included": False,
    }
    assert {name: told[name] for name in WORDS} == {
        "task": "classify",
        "model": "cifar_resnet8",
        "normalizer": "bcn-micro+ws",
        "input": "images [N, 3, 32, 32]",
        "output": "scores [N, 2]",
    }
    assert [(port.name, port.shape) for port in session.get_inputs()] == [("images", ["batch", 3, 32, 32])]
    assert [(port.name, port.shape) for port in session.get_outputs()] == [("scores", ["batch", 2])]
    content = exported.path.read_bytes()
    assert b"site-packages" not in content
    assert str(Path(exporting.__file__).parents[2]).encode() not in content


def test_the_exported_program_says_the_same(checkpoint):
    exported = export_checkpoint(ExportConfig(checkpoint=str(checkpoint()), format="exported_program"))
    assert exported.path.name == "best.pt2"
    told = {formats.METADATA: ""}
    torch.export.load(exported.path, extra_files=told)
    assert json.loads(told[formats.METADATA])["classes"] == ["lying", "standing"]


def test_the_folded_file_holds_no_code_and_no_training(checkpoint):
    path = checkpoint(normalizer="bcn-micro+ws")
    exported = export_checkpoint(ExportConfig(checkpoint=str(path), format="torch"))
    assert exported.path.name == "best.folded.pt"
    content = torch.load(exported.path, weights_only=True)
    assert content["about"]["classes"] == ["lying", "standing"]
    trained = load_trained(path)
    assert content["model"].keys() < trained.model.state_dict().keys() | {"conv1.bias"} | {
        f"{name}.bias" for name, module in trained.model.named_modules() if isinstance(module, nn.Conv2d)
    }
    before = torch.random.get_rng_state()
    folded = load_folded(exported.path)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert folded.about.statistics == trained.statistics
    assert not any(isinstance(module, Reparameterized) or module.training for module in folded.model.modules())


@pytest.mark.parametrize("gain", [0.0, 1.0])
@torch.no_grad()
def test_gains_of_pretrained_weights_fold_to_other_layers(checkpoint, gain):
    """timm's residual branches start with a gain of zero, which becomes a scalar; pretrained ones do not have it."""
    example = torch.zeros(2, 3, 32, 32)
    trained = load_trained(checkpoint("timm:resnet10t", "none+sws"))
    plain = build_model("timm:resnet10t", num_classes=2)
    for module in plain.modules():
        if gain and isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, gain)
    model = build_converted(trained.config, plain)[0].eval()
    assert any(isinstance(module, SkipInit) for module in model.modules()) == (gain == 0)
    facts = about(trained, normalization_included=False)
    content = folded_bytes(folded_plain(model, example), facts, replace(trained, model=model))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(run_folded(content)(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", FORMATS)
@torch.no_grad()
def test_a_network_that_normalizes_images_itself(checkpoint, format):
    path = checkpoint("cifar_resnet8", "bcn-micro+ws")
    trained = load_trained(path)
    exported = export_checkpoint(ExportConfig(checkpoint=str(path), format=format, include_normalization=True))
    squares = torch.cat(real_squares(trained)[0])
    expected = trained.model(normalized(squares, trained.statistics))
    torch.testing.assert_close(run_file(exported.path, squares / 255), expected, rtol=1e-4, atol=1e-4)
    if format == "onnx":
        assert all(plain_weights(exported.path))


@pytest.mark.parametrize("opset", [18, 25])
def test_a_chosen_opset(checkpoint, opset):
    exported = export_checkpoint(ExportConfig(checkpoint=str(checkpoint()), opset=opset))
    assert [item.version for item in onnx.load(exported.path).opset_import if not item.domain] == [opset]
    assert all(plain_weights(exported.path))


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match=r"^opset must be from 18 to 25, got 17$"):
        ExportConfig(checkpoint="x", opset=17)
    with pytest.raises(ValueError, match="opset=18 is for --format onnx only, and the format is torch"):
        ExportConfig(checkpoint="x", format="torch", opset=18)
    with pytest.raises(ValueError, match="format must be one of torch, onnx, exported_program; got 'tflite'"):
        ExportConfig(checkpoint="x", format="tflite")


def test_files_that_cannot_be_written(checkpoint, tmp_path, monkeypatch):
    path = str(checkpoint())
    with pytest.raises(ValueError, match=r"--out .* is a folder: name a file in it, such as .*model\.onnx$"):
        export_checkpoint(ExportConfig(checkpoint=path, out=str(tmp_path)))
    with pytest.raises(ValueError, match="is the checkpoint itself: name another file"):
        export_checkpoint(ExportConfig(checkpoint=path, format="torch", out=path))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^cannot write .*: (Not a directory|File exists); what was there before"):
        export_checkpoint(ExportConfig(checkpoint=path, format="torch", out=str(tmp_path / "file" / "net.pt")))
    out = tmp_path / "out" / "net.pt"
    out.parent.mkdir()
    out.write_text("earlier")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"cannot write .*net\.pt: No space left on device; .* unchanged$"):
        export_checkpoint(ExportConfig(checkpoint=path, format="torch", out=str(out)))
    assert [entry.name for entry in out.parent.iterdir()] == ["net.pt"]
    assert out.read_text() == "earlier"


def test_other_scores_than_the_trained_networks_are_never_written(checkpoint, tmp_path, monkeypatch):
    path = checkpoint()

    def wrong(model: nn.Module, example: torch.Tensor) -> nn.Module:
        folded = folded_plain(model, example)
        with torch.no_grad():
            folded.fc.weight.mul_(0.99)
        return folded

    monkeypatch.setattr(exporting, "folded_plain", wrong)
    out = tmp_path / "out" / "net.pt"
    with pytest.raises(ValueError, match=r"gives other scores than .*best\.pt: they differ by .* nothing was written$"):
        export_checkpoint(ExportConfig(checkpoint=str(path), format="torch", out=str(out)))
    assert not out.parent.exists()


@torch.no_grad()
def test_the_largest_difference(checkpoint):
    trained = load_trained(checkpoint())
    squares = torch.cat(real_squares(trained)[0])
    scores = trained.model(normalized(squares, trained.statistics))
    assert largest_difference(trained.model, trained, [squares], include_normalization=False) == 0
    off = largest_difference(
        lambda images: trained.model(images) + 0.5, trained, [squares], include_normalization=False
    )
    assert off == pytest.approx(0.5 / float(scores.abs().max()), rel=1e-5)
    gone = largest_difference(
        lambda images: trained.model(images) * torch.nan, trained, [squares], include_normalization=False
    )
    assert not gone <= TOLERANCE
    with pytest.raises(ValueError, match=r"does not take an input of \[4, 3, 32, 32\] \(shape .*use --format torch$"):
        largest_difference(lambda images: images.view(7), trained, [squares], include_normalization=False)
    # Images scaled to [0, 1] without the normalization that belongs to them.
    assert largest_difference(trained.model, trained, [squares], include_normalization=True) > TOLERANCE


def test_scores_that_are_not_finite_are_told(checkpoint):
    def spoil(network: nn.Module) -> None:
        network.fc.bias.data[0] = torch.nan

    with pytest.raises(
        ValueError, match=r"the scores of .*best\.pt itself are not finite: export an earlier checkpoint"
    ):
        export_checkpoint(ExportConfig(checkpoint=str(checkpoint(change=spoil)), format="torch"))


def test_images_where_the_runs_data_is_gone(checkpoint, tmp_path):
    path = checkpoint(data={"root": str(tmp_path / "gone")})
    exported = export_checkpoint(ExportConfig(checkpoint=str(path), format="torch"))
    assert exported.images_from == "the embedded handwriting"


def test_layers_that_are_not_plain_are_refused():
    images = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"cannot export: 1 is no plain convolution \(StdConv2d overrides forward"):
        folded_plain(nn.Sequential(nn.Identity(), StdConv2d(3, 4, 3)).eval(), images)
    with pytest.raises(ValueError, match=r"cannot export: 0 \(SkipInit\) has no counterpart among torch's layers"):
        folded_plain(nn.Sequential(SkipInit()).eval(), images)


def test_weights_computed_in_the_graph_are_refused(checkpoint):
    trained = load_trained(checkpoint())
    with pytest.raises(
        ValueError, match=r"cannot export net: the weight of its convolution conv2d is computed in the forward"
    ):
        traced(trained.model, torch.zeros(2, 3, 32, 32), name="net")
    program = torch.export.export(trained.model, (torch.zeros(2, 3, 32, 32),))
    proto = torch.onnx.export(program, dynamo=True, verbose=False, optimize=False).model_proto
    facts = about(trained, normalization_included=False)
    with pytest.raises(
        ValueError, match=r"cannot export cifar_resnet8: the weight of .* is computed in the ONNX graph"
    ):
        formats._require_stored_weights(proto, facts)


class Counted(nn.Module):
    """Branches on how many images there are."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images if len(images) < 3 else 2 * images


def test_a_network_that_cannot_be_traced_is_told_in_one_line():
    with pytest.raises(
        ValueError, match=r"torch.export cannot trace net for any number of images \(.*--format torch$"
    ) as error:
        traced(Counted(), torch.zeros(2, 3, 8, 8), name="net")
    assert "\n" not in str(error.value)


def test_onnx_without_its_packages(checkpoint, monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(ValueError, match=r"--format onnx needs onnxruntime, .* pip install 'batchless\[onnx\]'"):
        export_checkpoint(ExportConfig(checkpoint=str(checkpoint())))


def test_files_that_hold_no_folded_network(checkpoint, tmp_path):
    path = checkpoint()
    with pytest.raises(ValueError, match=r"best\.pt is no folded network: load_trained reads it"):
        load_folded(path)
    exported = export_checkpoint(ExportConfig(checkpoint=str(path), format="torch")).path
    with pytest.raises(ValueError, match=r"was not written by `batchless train`"):
        load_trained(exported)
    content = load_checkpoint(exported)
    for name in ("model", "about", "network"):
        damaged = copy.copy(content)
        del damaged[name]
        torch.save(damaged, tmp_path / "damaged.pt")
        with pytest.raises(ValueError, match=rf"damaged\.pt is damaged \(KeyError: '{name}'\): export it again"):
            load_folded(tmp_path / "damaged.pt")
    content["network"]["normalizer"] = "bcn"
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt is a checkpoint of another network"):
        load_folded(tmp_path / "other.pt")
