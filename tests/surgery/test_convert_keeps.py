"""What of a model a conversion leaves as it was: hooks, marks, ties, precision, modes."""

import pytest
import timm.layers
import torch
from converted_network import NORMS, CallsByKeyword, Network, images
from torch import Tensor, nn

import batchless as bl
import batchless.nn as bnn


def test_tensors_that_a_forward_left_on_a_module_do_not_hinder():
    class Keeps(Network):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            classes, maps = super().forward(x)
            self.last, self.pyramid = maps, [{"twice": 2 * maps}]
            return classes, maps

    model = Keeps()
    model(images())  # plain copying refuses tensors of a graph
    converted, _ = bl.convert(model, "gn+ws", example=images())
    assert torch.equal(converted.pyramid[0]["twice"], 2 * model.last)
    assert not converted.last.requires_grad


def test_layers_without_a_size_yet_are_an_error():
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d())
    for name in ("gn+ws", "none"):
        with pytest.raises(
            ValueError, match=r"^Sequential has layers whose size is not known yet \(first: 0\.weight\): run it once"
        ):
            bl.convert(model, name, example=images())
    model(images())
    assert len(bl.convert(model, "gn+ws", example=images())[1].replaced) == 2


def test_hooks_stay_on_replaced_layers():
    called = []
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), timm.layers.BatchNormAct2d(8))
    for index, layer in enumerate(model):
        layer.register_forward_pre_hook(lambda m, inputs, i=index: called.append(f"before {i}"))
        layer.register_forward_hook(
            lambda m, inputs, keywords, y, i=index: called.append(f"after {i}"), with_kwargs=True
        )
        layer.register_full_backward_hook(lambda m, gi, go, i=index: called.append(f"backward {i}"))
    for name in ("gn+ws", "none+ws", "bcn-micro"):
        converted, _ = bl.convert(model, name)
        called.clear()
        converted(images().requires_grad_()).sum().backward()
        assert called == [f"{when} {i}" for i in range(3) for when in ("before", "after")] + [
            f"backward {i}" for i in (2, 1, 0)
        ]


def test_marks_of_the_user_stay_on_replaced_layers():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model[0].mark, model[1].mark = "first", ["second"]
    converted, _ = bl.convert(model, "bcn-micro+ws")
    assert (converted[0].mark, converted[1].mark) == ("first", ["second"])


def test_state_that_is_no_parameter_is_kept():
    model = Network()
    model.steps, model.history = 7, [1.0, 2.0]
    model.block.register_buffer("table", torch.arange(5))
    model.block.register_buffer("cache", torch.ones(2), persistent=False)
    model.block.scale = nn.Parameter(torch.full((3,), 2.0))
    converted, _ = bl.convert(model, "gn+ws", example=images())
    assert (converted.steps, converted.history) == (7, [1.0, 2.0])
    assert converted.history is not model.history
    for name in ("table", "cache", "scale"):
        assert torch.equal(getattr(converted.block, name), getattr(model.block, name))
    assert "block.table" in converted.state_dict()
    assert "block.cache" not in converted.state_dict()


def test_a_model_that_is_one_layer():
    converted, report = bl.convert(nn.Conv2d(3, 8, 3), "gn+ws")
    assert type(converted) is nn.Conv2d
    assert "(model)" in str(report)
    converted, _ = bl.convert(nn.BatchNorm2d(8), "gn", example=torch.randn(2, 8, 4, 4))
    assert type(converted) is nn.GroupNorm
    assert type(bl.convert(timm.layers.BatchNormAct2d(8), "gn")[0].norm) is nn.GroupNorm


def test_tied_parameters_stay_tied():
    model = nn.Sequential(
        *(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)) * 1, nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)
    )
    model[2].weight = model[0].weight
    for name in ("gn+ws", "none+sws", "bcn-micro+wn"):
        converted, _ = bl.convert(model, name)
        assert converted[0].weight is converted[2].weight
        assert converted[0] is not converted[2]


def test_a_layer_that_stands_in_several_places_is_replaced_by_one():
    conv, norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
    model = nn.Sequential(conv, norm, nn.ReLU(), conv, norm)
    for example in (torch.randn(2, 8, 6, 6), None):
        converted, report = bl.convert(model, "gn+ws", example=example)
        assert type(converted[0]) is bnn.WSConv2d
        assert converted[0] is converted[3]
        assert converted[1] is converted[4]
        assert len(report.replaced) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["gn+ws", "none+sws(gain=true)", "bcn-micro+cwn", "bcn+wn", "ln", "in", "frozen-bn", "sync-bn"]
)
def test_the_model_keeps_its_precision(name, dtype):
    model = Network().to(dtype)
    converted, _ = bl.convert(model, name, example=images().to(dtype))
    tensors = [*converted.parameters(), *converted.buffers()]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {dtype}
    classes, maps = converted(images().to(dtype))
    assert classes.dtype == maps.dtype == dtype
    assert classes.isfinite().all()


@pytest.mark.parametrize(
    "name", ["gn+ws", "none+sws(gain=true)", "bcn-micro+cwn", "bcn-micro", "frozen-bn", "sync-bn", "ln", "in"]
)
def test_a_model_without_data_stays_without(name):
    with torch.device("meta"):
        model = nn.Sequential(Network(), nn.Identity())
        example = torch.randn(2, 3, 10, 10)
    for given in (example, None):
        converted, report = bl.convert(model, name, example=given)
        assert all(tensor.is_meta for tensor in (*converted.parameters(), *converted.buffers()))
        assert len(report.replaced) >= len(NORMS)


@pytest.mark.parametrize("name", ["gn+ws", "none+sws(gain=true)", "bcn-micro+cwn", "bcn+wn", "ln", "in", "sync-bn"])
def test_frozen_stays_frozen_and_trained_stays_trained(name):
    model = Network()
    nn.init.zeros_(model.block.bn2.weight)
    model.block.requires_grad_(False)
    converted, _ = bl.convert(model, name, example=images())
    frozen = {key for key, p in converted.named_parameters() if not p.requires_grad}
    assert frozen == {key for key, _ in converted.named_parameters() if key.startswith("block.")}


def test_a_trained_layer_beside_a_frozen_one_stays_trained():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    model[0].requires_grad_(False)
    converted, _ = bl.convert(model, "none+sws")
    assert converted[0].bias.requires_grad  # it is the normalization's
    assert not converted[0].weight.requires_grad


def test_each_parameter_of_an_affine_map_stays_frozen_or_trained():
    for norm in (nn.BatchNorm2d(8), timm.layers.BatchNormAct2d(8)):
        model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norm)
        model[1].weight.requires_grad_(False)
        for name in ("gn+ws", "ln", "in", "bcn-micro", "sync-bn"):
            converted, _ = bl.convert(model, name)
            holder = getattr(converted[1], "norm", converted[1])
            holder = getattr(holder, "batch_norm", holder)
            assert not holder.weight.requires_grad
            assert holder.bias.requires_grad
        assert bl.convert(model, "none")[0][0].bias.requires_grad


def test_modes_of_submodules_are_kept():
    model = nn.Sequential(Network(), timm.layers.BatchNormAct2d(5)).train()
    model[0].stem.eval()
    model[0].block.bn1.eval()
    model[1].act.eval()
    for name in ("gn+ws", "bcn-micro", "none"):
        converted, _ = bl.convert(model, name)
        before = {key: m.training for key, m in model.named_modules()}
        after = {key: m.training for key, m in converted.named_modules()}
        assert {key: mode for key, mode in after.items() if key in before} == before
        assert after["1.norm"]
        assert name != "bcn-micro" or not after["0.block.bn1.batch_norm"]


def test_layers_may_be_called_by_keyword():
    converted, report = bl.convert(CallsByKeyword(), "gn+ws", example=images())
    assert len(report.replaced) == 2
    converted(images())
