import copy
import pickle
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # bench is run from the repository root, not installed

from bench.saved import saved_bytes

import batchless as bl
from batchless.surgery.replay import forward_again

NORMALIZERS = ["bn", "frozen-bn", "gn", "ln", "in", "bcn", "bcn-micro", "none"]
LEVELS = [1, 2, 3]


class Block(nn.Module):
    """A bottleneck with a shortcut, activations in place, as torchvision's."""

    def __init__(self, inputs, width, outputs, activation=nn.ReLU):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.act = activation()

    def forward(self, x):
        out = self.act(self.bn1(self.conv1(x)))
        out = self.act(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += self.downsample(x)
        return self.act(out)


def relu_in_place():
    return nn.ReLU(inplace=True)


def network(activation=relu_in_place, *, width=8):
    torch.manual_seed(0)
    stem = (nn.Conv2d(3, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width), activation())
    blocks = (Block(2 * width, width, 4 * width, activation), Block(4 * width, width, 4 * width, activation))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 5))


def converted(name, **options):
    images = torch.randn(2, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bl.convert(network(**options), name, example=images)[0].train()


def images(count=2, size=8, seed=1):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def state_after(model, x, passes=1):
    """Gradients and buffers after forward and backward passes; the losses together in one backward."""
    torch.manual_seed(3)
    sum(model(x + index).square().sum() for index in range(passes)).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return found | dict(model.named_buffers())


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (value is None) == (found[name] is None), name
        assert value is None or torch.equal(found[name], value), name


@pytest.mark.parametrize("weight", ["", "+ws", "+sws"])
@pytest.mark.parametrize("act", NORMALIZERS)
def test_gradients_and_statistics_are_the_same_bits(act, weight):
    model = converted(act + weight)
    expected = state_after(copy.deepcopy(model), images(), passes=2)
    for level in LEVELS:
        small, _ = bl.lean(model, level)
        assert_same(state_after(small, images(), passes=2), expected)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["bn+ws", "bcn-micro+ws", "gn+sws"])
def test_an_accumulated_step_is_the_same(name, level):
    plain = converted(name)
    small, _ = bl.lean(plain, level)
    for model in (plain, small):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            with bl.accumulate(model, optimizer) as step:
                for seed in range(3):
                    step.backward(model(images(1, seed=seed)).square().mean(), samples=1)
    assert_same(small.state_dict(), plain.state_dict())


def test_each_forward_is_done_again_with_its_own_estimates():
    plain = converted("bcn-micro+ws")
    small, _ = bl.lean(plain, 3)
    for model in (plain, small):
        first, second = model(images()), model(images())  # the same images: no fingerprint tells them apart
        first.square().sum().backward()
        second.square().sum().backward()
    assert_same(
        {name: parameter.grad for name, parameter in small.named_parameters()},
        {name: parameter.grad for name, parameter in plain.named_parameters()},
    )


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    activation=st.sampled_from(
        [nn.ReLU, relu_in_place, nn.SiLU, nn.GELU, nn.Hardswish, nn.ReLU6, nn.PReLU, nn.LeakyReLU]
    ),
    width=st.sampled_from([4, 8]),
    count=st.integers(2, 3),
    size=st.integers(3, 9),
    level=st.sampled_from(LEVELS),
    last=st.booleans(),
)
def test_any_activation_and_shape(activation, width, count, size, level, last):
    model = network(activation, width=width)
    x = images(count, size)
    if last:
        x = x.to(memory_format=torch.channels_last)
    expected = state_after(copy.deepcopy(model), x)
    assert_same(state_after(bl.lean(model, level)[0], x), expected)


def test_fewer_bytes_at_each_level():
    model = network(width=16)
    saved = [saved_bytes(bl.lean(model, level)[0], images(size=16)) for level in (0, 1, 2, 3)]
    assert saved == sorted(saved, reverse=True)
    assert len(set(saved)) == 4


@pytest.mark.parametrize(
    ("level", "least"),
    [(1, 0.17), (2, 0.45), (3, 0.6)],
)
def test_resnet50_saves_what_is_promised(level, least):
    model = torchvision.models.resnet50()
    x = images(1, 64)
    full = saved_bytes(model.train(), x)
    assert saved_bytes(bl.lean(model, level)[0], x) <= (1 - least) * full


@pytest.mark.parametrize(
    "build",
    [
        lambda: torchvision.models.resnet18(),
        lambda: torchvision.models.mobilenet_v2(dropout=0.0),
        lambda: timm.create_model("resnet18d"),
        lambda: timm.create_model("mobilenetv3_small_050"),
    ],
)
def test_networks_of_libraries(build):
    torch.manual_seed(0)
    model = build().train()
    expected = state_after(copy.deepcopy(model), images(2, 32))
    full = saved_bytes(copy.deepcopy(model), images(2, 32))
    for level in (2, 3):
        small, _ = bl.lean(model, level)
        assert saved_bytes(copy.deepcopy(small), images(2, 32)) < 0.8 * full
        assert_same(state_after(small, images(2, 32)), expected)


class _Statistics(TorchDispatchMode):
    """Counts batch normalizations that reduce over their input."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.native_batch_norm.default:
            self.count += args[5]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_batch_statistics_are_not_reduced_again(affine, memory_format, dtype):
    """Values whose deviation is far from 1 and whose mean is far from 0; the bits are those of a plain pass."""
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, affine=affine), nn.ReLU())]
    model = nn.Sequential(*layers).to(dtype)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.7, 3.1)
    x = (1e3 + 37 * torch.randn(2, 8, 11, 9, dtype=dtype)).to(memory_format=memory_format)
    small, _ = bl.lean(model, 1)
    loss = small(x).square().sum()
    with _Statistics() as again:
        loss.backward()
    assert again.count == 0
    assert saved_bytes(copy.deepcopy(small), x) < 0.75 * saved_bytes(copy.deepcopy(model), x)
    model(x).square().sum().backward()
    for found, expected in zip(small.parameters(), model.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad)


class Functional(nn.Module):
    def __init__(self, inplace):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.inplace = nn.Conv2d(8, 8, 3), inplace

    def forward(self, x):
        return self.conv2(F.relu(self.norm(self.conv1(x)), inplace=self.inplace))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_rectifier_called_as_a_function_is_followed(inplace):
    model = Functional(inplace)
    small, _ = bl.lean(model, 1)
    assert saved_bytes(small, images()) < 0.7 * saved_bytes(model, images())
    assert_same(state_after(bl.lean(model, 1)[0], images()), state_after(model, images()))


def test_what_is_written_over_is_not_computed_again():
    class Overwritten(Functional):
        def forward(self, x):
            y = self.norm(self.conv1(x))
            y *= 2
            with torch.no_grad():
                y.add_(1)
            return self.conv2(F.relu(y, inplace=self.inplace))

    for inplace in (False, True):
        model = Overwritten(inplace)
        assert_same(state_after(bl.lean(model, 1)[0], images()), state_after(model, images()))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_rectifier_writes_over_what_nobody_else_wants(inplace):
    input = torch.randn(2, 8, 4, 4, requires_grad=True)
    layer = nn.LeakyReLU(inplace=inplace)
    again = forward_again(layer, layer(input * 1.0), ())
    with torch.no_grad():
        for alone in (False, True):
            x = input.clone()
            found = again(x, alone)
            assert torch.equal(found, F.leaky_relu(input))
            assert (found.data_ptr() == x.data_ptr()) is alone
    assert layer.inplace is inplace


@pytest.mark.parametrize("inplace", [False, True])
def test_a_rectifier_without_hooks_is_followed(inplace):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace), nn.Conv2d(8, 8, 3))
    small, report = bl.lean(model, 1)
    assert [entry.output for entry in report.entries] == ["kept", "again", "again", "kept"]
    assert not small[2]._forward_hooks
    assert saved_bytes(small, images()) < 0.7 * saved_bytes(model, images())
    assert_same(state_after(bl.lean(model, 1)[0], images()), state_after(model, images()))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.LeakyReLU])
def test_what_others_want_is_not_written_over(activation):
    class Shared(Functional):
        def forward(self, x):
            y = self.norm(self.conv1(x))
            return self.conv2(self.act(y) * y)  # the product keeps y, whose other reader is the activation

    model = Shared(inplace=False)
    model.act = activation()
    assert_same(state_after(bl.lean(model, 1)[0], images()), state_after(model, images()))


def test_a_changed_parameter_is_refused_as_autograd_does():
    small, _ = bl.lean(network(), 1)
    loss = small(images()).sum()
    with torch.no_grad():
        small[1].bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_retained_graph_gives_the_gradients_again():
    small, _ = bl.lean(network(), 3)
    loss = small(images()).square().sum()
    first = torch.autograd.grad(loss, list(small.parameters()), retain_graph=True)
    again = torch.autograd.grad(loss, list(small.parameters()))
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))


def test_double_backward():
    model = converted("gn+ws")
    results = []
    for candidate in (model, bl.lean(model, 3)[0]):
        x = images().requires_grad_()
        (gradient,) = torch.autograd.grad(candidate(x).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), list(candidate.parameters()), allow_unused=True))
    for one, two in zip(*results, strict=True):
        assert (one is None) == (two is None)
        assert one is None or torch.allclose(one, two, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


@pytest.mark.parametrize("name", ["bn", "bcn-micro+ws", "gn"])
def test_under_autocast(name):
    model = converted(name)
    found = []
    for candidate in (copy.deepcopy(model), bl.lean(model, 3)[0]):
        with torch.autocast("cpu", torch.bfloat16):
            loss = candidate(images()).square().sum()
        loss.backward()
        found.append({key: parameter.grad for key, parameter in candidate.named_parameters()})
    assert_same(found[1], found[0])


def test_inside_a_checkpoint():
    model = converted("bcn-micro+ws")
    expected = state_after(copy.deepcopy(model), images())
    small, _ = bl.lean(model, 2)
    checkpoint(small, images().requires_grad_(), use_reentrant=False).square().sum().backward()
    found = {name: parameter.grad for name, parameter in small.named_parameters()} | dict(small.named_buffers())
    assert_same(found, expected)


def test_hooks_around_the_model_get_what_is_kept():
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    small, _ = bl.lean(network(), 2)
    own = {tensor.untyped_storage()._cdata for tensor in (*small.parameters(), *small.buffers())}
    x = images()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = small(x).square().sum()
    bytes_of_hooks = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)
    # The hooks see the images too, and not the vectors that some computations hold.
    assert bytes_of_hooks == pytest.approx(saved_bytes(small, x) + x.numel() * 4, rel=0.05)
    loss.backward()
    found = {name: parameter.grad for name, parameter in small.named_parameters()}
    expected = state_after(network(), images())
    assert_same(found, {name: expected[name] for name in found})


def test_copies_pickles_and_state_dict():
    model = network()
    small, _ = bl.lean(model, 2)
    assert list(small.state_dict()) == list(model.state_dict())
    expected = state_after(model, images())
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert saved_bytes(copy.deepcopy(other), images()) < saved_bytes(network(), images())
        assert_same(state_after(other, images()), expected)


def test_level_0_is_the_way_back():
    small, _ = bl.lean(network(), 3)
    back, report = bl.lean(small, 0)
    assert not report.entries
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in back.modules())
    assert saved_bytes(back, images()) == saved_bytes(network(), images())


def test_evaluation_and_no_grad_are_untouched():
    model = network()
    small, _ = bl.lean(model, 3)
    with torch.no_grad():
        assert torch.equal(small.eval()(images()), model.eval()(images()))
    assert_same(state_after(small, images()), state_after(model, images()))  # frozen statistics, with gradients


def test_an_exception_leaves_nothing_behind():
    small, _ = bl.lean(network(), 2)
    with pytest.raises(RuntimeError):
        small(torch.randn(2, 4, 8, 8))
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert_same(state_after(small, images()), state_after(network(), images()))


def test_the_report_says_what_is_kept_and_why():
    model = network()
    model[3].bn1.register_forward_hook(lambda module, inputs, output: None)
    _, report = bl.lean(model, 2)
    kept = {entry.name: entry.detail for entry in report.kept}
    assert kept["3.bn1"] == "hooks run before or after it"
    assert kept["3.conv2"] == "72 weights feed each of 8 channels"
    assert {"3.bn2", "3.conv3", "3.downsample.0", "3.downsample.1"} <= {entry.name for entry in report.again}
    assert str(report).startswith("lean level 2: ")


def test_a_hooked_layer_is_kept_and_right():
    small, _ = bl.lean(network(), 2)
    small[3].bn1.register_forward_hook(lambda module, inputs, output: output * 2)
    expected = network()
    expected[3].bn1.register_forward_hook(lambda module, inputs, output: output * 2)
    assert_same(state_after(small, images()), state_after(expected, images()))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="lean level must be 0, 1, 2 or 3, got 4"):
        bl.lean(network(), 4)
    with pytest.raises(ValueError, match="nothing to compute again in Sequential"):
        bl.lean(nn.Sequential(nn.Linear(3, 3)), 2)


def test_the_graph_keeps_nothing_alive_afterwards():
    small, _ = bl.lean(network(), 2)
    output = small(images())
    output.sum().backward()
    assert output.grad_fn is not None
    hooks = next(iter(small._forward_pre_hooks.values())).__self__
    assert not hooks._recordings
    assert not hooks._calls


def test_a_compiled_model_is_a_plain_pass():
    model = network()
    expected = state_after(copy.deepcopy(model), images())
    small, _ = bl.lean(model, 3)
    torch.compile(small, backend="eager", fullgraph=True)(images()).square().sum().backward()
    assert_same(
        {name: parameter.grad for name, parameter in small.named_parameters()} | dict(small.named_buffers()), expected
    )


def test_one_layer_on_several_inputs():
    torch.manual_seed(0)
    shared = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 3, 3))

    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = copy.deepcopy(shared)

        def forward(self, x):
            return self.head(x).mean() + self.head(F.avg_pool2d(x, 2)).mean() ** 2

    model, _ = bl.convert(Pyramid(), "bcn-micro+ws", example=images(size=16))
    expected = state_after(copy.deepcopy(model).train(), images(size=16))
    assert_same(state_after(bl.lean(model.train(), 3)[0], images(size=16)), expected)
