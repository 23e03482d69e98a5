"""Which convolution feeds which normalization, and what the data flow tells of it."""

import pytest
import torch
import torch.nn.functional as F
from converted_network import CallsByKeyword, details, images, kinds
from torch import Tensor, nn

import batchless as bl
import batchless.nn as bnn
from batchless.surgery import conversion_of


class Siamese(nn.Module):
    """One convolution that feeds two normalizations, in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1, self.bn2 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv(x)) + self.bn2(self.conv(-x))


def test_a_convolution_that_feeds_different_normalizations_is_followed_by_one():
    converted, report = bl.convert(Siamese(), "bcn-micro+ws", example=images())
    assert type(converted.conv) is bnn.WSConv2d
    assert all("statistics start fresh" in detail for detail in details(report, "bn1", "bn2"))
    assert conversion_of(converted).pairs == {}


def test_a_convolution_that_a_normalization_follows_in_some_calls_only_is_no_pair():
    class Sometimes(Siamese):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn1(self.conv(x)) + F.relu(self.conv(-x))

    converted, report = bl.convert(Sometimes(), "gn+ws", example=images())
    assert type(converted.conv) is nn.Conv2d
    assert details(report, "conv") == ["its output feeds more than a normalization"]


class Shared(nn.Module):
    """Two convolutions that feed one normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.a(x)) + self.bn(self.b(x))


def test_convolutions_that_share_a_normalization_are_both_followed_by_it():
    converted, _ = bl.convert(Shared(), "gn+ws", example=images())
    assert kinds(converted, {"a", "b"}) == {bnn.WSConv2d}
    assert conversion_of(converted).pairs == {}


class Between(nn.Module):
    """A convolution whose output is changed, or used, before its normalization sees it."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use, self.conv, self.bn = use, nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> object:
        y = self.conv(x)
        match self.use:
            case "in-place":
                y.relu_()
            case "function":
                y = F.relu(y)
            case "also added":
                return self.bn(y) + y
            case "also returned":
                return self.bn(y), {"features": [y]}
        return self.bn(y)


@pytest.mark.parametrize("use", ["in-place", "function", "also added", "also returned"])
def test_a_convolution_whose_output_goes_elsewhere_too_is_no_pair(use):
    converted, report = bl.convert(Between(use), "gn+ws", example=images())
    assert type(converted.conv) is nn.Conv2d
    expected = "no normalization follows it" if use == "function" else "its output feeds more than a normalization"
    assert details(report, "conv") == [expected]
    assert type(bl.convert(Between("nothing"), "gn+ws", example=images())[0].conv) is bnn.WSConv2d


class PreActivation(nn.Module):
    """Declared convolution first, run normalization first; the shortcut is the normalization's input."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.activation, self.relu = activation, nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        match self.activation:
            case "module":
                y = self.relu(self.bn1(x))
            case "function":
                y = F.relu(self.bn1(x), inplace=True)
            case "method":
                y = self.bn1(x).flatten(2).relu_().view_as(x)
        return x + self.conv2(F.relu(self.bn2(self.conv1(y))))


def test_the_data_flow_tells_pairs_that_the_order_of_declaration_does_not():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), PreActivation("module"))
    converted, _ = bl.convert(model, "gn+ws", example=images())
    assert type(converted[1].conv1) is bnn.WSConv2d  # bn2 follows it
    assert type(converted[1].conv2) is nn.Conv2d  # the sum follows it
    assert type(converted[0]) is nn.Conv2d  # the sum and bn1 follow it


@pytest.mark.parametrize("activation", ["module", "function", "method"])
def test_without_normalization_an_activation_in_place_does_not_overwrite_the_shortcut(activation):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), PreActivation(activation), PreActivation(activation)).double()
    converted, _ = bl.convert(model, "none", example=images().double())
    # A module is told not to work in place; before code that does, its input is copied.
    assert type(converted[1].bn1) is (nn.Identity if activation == "module" else nn.ZeroPad1d)
    assert type(converted[1].bn2) is nn.Identity
    x = converted[0](images().double())
    for block in (converted[1], converted[2]):
        x = x + block.conv2(F.relu(block.conv1(F.relu(x))))
    y = converted(images().double())
    torch.testing.assert_close(y, x, rtol=1e-12, atol=1e-12)
    y.sum().backward()


def test_without_normalization_the_output_of_a_convolution_may_be_overwritten():
    class InPlace(CallsByKeyword):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu_()

    converted, _ = bl.convert(InPlace(), "none", example=images())
    assert type(converted.bn) is nn.Identity


def test_without_normalization_code_in_place_does_not_break_the_gradient_of_what_came_before():
    class PostActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(F.relu(self.conv(x)))
            y += 1
            return y

    converted, _ = bl.convert(PostActivation(), "none", example=images())
    converted(images()).sum().backward()
    assert converted.conv.weight.grad.abs().sum() > 0
