import pytest
import torch
from torch import nn

from batchless.models import CifarResNet


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("depth", [8, 14, 20, 32, 56, 110])
def test_depth_counts_the_layers_on_the_longest_path(depth):
    model = CifarResNet(depth, 10)
    on_the_path = [m for m in model.modules() if isinstance(m, nn.Linear) or getattr(m, "kernel_size", 0) == (3, 3)]
    assert len(on_the_path) == depth


def test_resnet20_has_the_published_parameters_plus_its_two_projections():
    """0.27 M in the paper's table 6: stem, three stages of three blocks, classifier, without anything on the shortcuts.

    stem 3*16*9 + 2*16; a block of width w with v inputs 9*v*w + 9*w*w + 4*w; classifier 64*10 + 10.
    A projection from v to w channels is v*w + 2*w more.
    """

    def block(inputs: int, width: int) -> int:
        return 9 * inputs * width + 9 * width * width + 4 * width

    stages = 3 * block(16, 16) + block(16, 32) + 2 * block(32, 32) + block(32, 64) + 2 * block(64, 64)
    plain = 3 * 16 * 9 + 2 * 16 + stages + 64 * 10 + 10
    assert plain == 269_722
    assert parameters(CifarResNet(20, 10)) == plain + (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)


@pytest.mark.parametrize("size", [(4, 4), (32, 32), (33, 47)])
@pytest.mark.parametrize("classes", [2, 10])
def test_shapes(size, classes):
    assert CifarResNet(8, classes).eval()(torch.randn(3, 3, *size)).shape == (3, classes)


def test_the_stages_halve_the_map_and_double_the_width():
    model, shapes = CifarResNet(20, 10).eval(), []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape[1:])))
    model(torch.randn(1, 3, 32, 32))
    assert shapes == [(16, 32, 32)] * 3 + [(32, 16, 16)] * 3 + [(64, 8, 8)] * 3


def test_a_block_whose_branch_is_silent_is_its_shortcut():
    model = CifarResNet(8, 10).eval()
    block = model.blocks[0]
    nn.init.zeros_(block.bn2.weight)
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(block(x), x.relu())


def test_every_convolution_feeds_a_batch_norm_and_has_no_bias():
    modules = list(CifarResNet(20, 10).modules())
    convolutions = [m for m in modules if isinstance(m, nn.Conv2d)]
    norms = [m for m in modules if isinstance(m, nn.BatchNorm2d)]
    assert len(convolutions) == len(norms) == 1 + 9 * 2 + 2
    assert all(convolution.bias is None for convolution in convolutions)


@pytest.mark.parametrize("depth", [-4, 0, 2, 7, 9, 18, 21])
def test_other_depths_are_refused(depth):
    with pytest.raises(ValueError, match=rf"depth is 6 n \+ 2 \(8, 14, 20, .*got {depth}$"):
        CifarResNet(depth, 10)
