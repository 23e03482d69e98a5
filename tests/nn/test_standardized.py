"""One standardization for several forward and backward passes gives exactly the gradients of one for each."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import batchless.nn as bnn
from batchless.nn import standardized
from batchless.nn.reparameterized import Reparameterized


def network() -> nn.Sequential:
    """Every reparameterization, grouped and transposed, with learnable gains, and plain layers between."""
    torch.manual_seed(0)
    return nn.Sequential(
        bnn.WSConv2d(3, 8, 3, padding=1),
        nn.GroupNorm(4, 8),
        nn.ReLU(),
        bnn.ScaledWSConv2d(8, 8, 3, padding=1, groups=2, gamma=1.7, gain=True, preset="nfnet"),
        nn.ReLU(),
        bnn.WNConv2d(8, 6, 1, bias=False),
        bnn.CWNConv2d(6, 6, 3),
        bnn.WSConvTranspose2d(6, 4, 2, stride=2, groups=2, preset="authors"),
        nn.Flatten(),
        bnn.WSLinear(4 * 8 * 8, 5),
    ).double()


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 6, 6, generator=generator, dtype=torch.float64) for size in (2, 1, 3, 2, 1)[:count]]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max()) + 1e-300
        torch.testing.assert_close(
            ours[name], value, rtol=0, atol=1e-12 * max(scale, 1.0), msg=lambda t, n=name: f"{n}: {t}"
        )


def shared(model: nn.Module) -> list[Tensor | None]:
    return [layer.shared_weight for layer in model.modules() if isinstance(layer, Reparameterized)]


@pytest.mark.parametrize("forwards_first", [False, True], ids=["backward-each", "forwards-first"])
def test_gradients_are_those_of_one_standardization_per_forward(forwards_first):
    model, apart = network(), network()
    for x in batches():
        loss_of(apart, x).backward()
    with standardized(model):
        if forwards_first:
            sum(loss_of(model, x) for x in batches()).backward()
        else:
            for x in batches():
                loss_of(model, x).backward()
    assert_equal(gradients_of(model), gradients_of(apart))
    assert len(gradients_of(model)) == len(list(model.parameters()))


def test_outputs_are_unchanged():
    model, (x, *_) = network(), batches()
    expected = model(x)
    with standardized(model):
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_every_weight_is_computed_once_per_block(computed_weights):
    model = network()
    layers = [layer for layer in model if isinstance(layer, Reparameterized)]
    for blocks in (1, 2):
        with standardized(model):
            for x in batches(4):
                loss_of(model, x).backward()
        assert sorted(computed_weights) == sorted(layer.weight.data_ptr() for layer in layers for _ in range(blocks))
    for x in batches(4):
        model(x)
    assert len(computed_weights) == 2 * len(layers) + 4 * len(layers)


def test_gradients_add_to_those_already_there():
    model, apart = network(), network()
    for x in batches():
        with standardized(model):
            loss_of(model, x).backward()
        loss_of(apart, x).backward()
    assert_equal(gradients_of(model), gradients_of(apart))


def test_blocks_nest(computed_weights):
    model, apart = network(), network()
    first, second, third = batches()
    layers = sum(isinstance(layer, Reparameterized) for layer in model)
    with standardized(model):
        loss_of(model, first).backward()
        with standardized(model):
            loss_of(model, second).backward()
        assert None not in shared(model), "the inner block ended the outer one"
        loss_of(model, third).backward()
    assert len(computed_weights) == layers
    for x in (first, second, third):
        loss_of(apart, x).backward()
    assert_equal(gradients_of(model), gradients_of(apart))


def test_a_block_around_a_part_inside_one_around_the_whole_and_the_reverse():
    model, apart = network(), network()
    first, second, _ = batches()
    with standardized(model[0]), standardized(model):
        loss_of(model, first).backward()
    with standardized(model), standardized(model[3:]):
        loss_of(model, second).backward()
    for x in (first, second):
        loss_of(apart, x).backward()
    assert_equal(gradients_of(model), gradients_of(apart))


def test_an_exception_inside_leaves_the_model_as_before():
    model, apart = network(), network()
    x, *_ = batches()

    class OutOfPatienceError(Exception):
        pass

    def interrupted() -> None:
        with standardized(model):
            loss_of(model, x).backward()
            raise OutOfPatienceError

    with pytest.raises(OutOfPatienceError):
        interrupted()
    assert shared(model) == [None] * len(shared(model))
    for name, gradient in gradients_of(model).items():
        owner = model.get_submodule(name.rpartition(".")[0])
        assert not (isinstance(owner, Reparameterized) and name.endswith((".weight", ".gain"))), gradient
    model.zero_grad()
    loss_of(model, x).backward()
    loss_of(apart, x).backward()
    assert_equal(gradients_of(model), gradients_of(apart))


def change_inside(model: nn.Module, change: Callable[[], object]) -> None:
    with standardized(model):
        loss_of(model, torch.randn(1, 3, 6, 6, dtype=torch.float64)).backward()
        change()


def double(value: Tensor) -> None:
    with torch.no_grad():
        value.mul_(2)


def test_a_weight_changed_inside_is_refused():
    model = network()
    with pytest.raises(ValueError, match=r"0\.weight.* changed .*step the optimizer after the block"):
        change_inside(model, lambda: double(model[0].weight))
    assert shared(model) == [None] * len(shared(model))


@pytest.mark.parametrize("gradients_before", [False, True], ids=["first-step", "later-step"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam], ids=["SGD", "Adam"])
def test_an_optimizer_step_inside_is_refused(optimizer, gradients_before):
    """Also where the weights have no gradient yet, so that the step moves only the other parameters."""
    model = network()
    step = optimizer(model.parameters(), lr=0.1)
    if gradients_before:
        loss_of(model, batches()[0]).backward()
    with pytest.raises(ValueError, match="step the optimizer after the block"):
        change_inside(model, step.step)
    assert shared(model) == [None] * len(shared(model))


def test_a_learnable_gain_changed_inside_is_refused():
    layer = bnn.ScaledWSConv2d(3, 4, 3, gain=True).double()
    with pytest.raises(ValueError, match="step the optimizer after the block"):
        change_inside(layer, lambda: double(layer.gain))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_for_an_evaluation_loop(context, computed_weights):
    model, (x, *_) = network().eval(), batches()
    expected = model(x)
    computed_weights.clear()
    with context(), standardized(model):
        for _ in range(3):
            torch.testing.assert_close(model(x), expected.detach(), rtol=0, atol=0)
    assert len(computed_weights) == len(shared(model))
    assert not gradients_of(model)
    loss_of(model, x).backward()  # trains on afterwards
    assert len(gradients_of(model)) == len(list(model.parameters()))


def test_no_grad_inside_the_block():
    model, apart = network(), network()
    first, second, _ = batches()
    with standardized(model):
        with torch.no_grad():
            model(second)
        loss_of(model, first).backward()
    loss_of(apart, first).backward()
    assert_equal(gradients_of(model), gradients_of(apart))


def test_frozen_weights_stay_without_gradient():
    model, apart = network(), network()
    for m in (model, apart):
        m[0].weight.requires_grad_(False)
        m[3].weight.requires_grad_(False)  # its gain still learns
    with standardized(model):
        loss_of(model, batches()[0]).backward()
    loss_of(apart, batches()[0]).backward()
    assert_equal(gradients_of(model), gradients_of(apart))
    assert model[0].weight.grad is None
    assert model[3].gain.grad is not None


def test_a_layer_that_is_not_used_has_no_gradient():
    model = nn.ModuleList([bnn.WSConv2d(3, 4, 3), bnn.WSConv2d(3, 4, 3)])
    with standardized(model):
        loss_of(model[0], torch.randn(1, 3, 5, 5)).backward()
    assert model[0].weight.grad is not None
    assert model[1].weight.grad is None
    with standardized(model):
        pass


def test_a_layer_in_two_places_and_a_weight_in_two_layers():
    def models() -> nn.Module:
        torch.manual_seed(2)
        layer, other = bnn.WSConv2d(4, 4, 3, padding=1), bnn.WSConv2d(4, 4, 3, padding=1, preset="paper")
        other.weight = layer.weight
        return nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), other).double()

    model, apart = models(), models()
    for x in torch.randn(3, 1, 4, 5, 5, dtype=torch.float64):
        with standardized(model):
            loss_of(model, x).backward()
        loss_of(apart, x).backward()
    assert_equal(gradients_of(model), gradients_of(apart))


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_a_compiled_model_inside_gives_equal_gradients(how):
    torch._dynamo.reset()
    model, apart = network(), network()
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if how == "compiled" else model
    for _ in range(2):
        with standardized(model):
            for x in batches():
                call(x).square().mean().backward()
        for x in batches():
            loss_of(apart, x).backward()
        call(batches()[0])  # and outside again
    torch._dynamo.reset()
    ours, expected = gradients_of(model), gradients_of(apart)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-10)


def test_a_compiled_model_is_not_compiled_again_for_every_block():
    torch._dynamo.reset()
    model = nn.Sequential(bnn.WSConv2d(3, 4, 3), nn.ReLU(), bnn.WSConv2d(4, 4, 3)).double()
    call = torch.compile(model, fullgraph=True, backend="aot_eager")

    def block() -> None:
        with standardized(model):
            for _ in range(2):
                call(batches()[0]).square().mean().backward()

    block()
    call(batches()[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            block()
            call(batches()[0])
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_under_autocast(dtype):
    """The cast weight is not cached past its block: the second block sees the stepped weights."""
    model = nn.Sequential(bnn.WSConv2d(3, 8, 3), nn.ReLU(), bnn.WSConv2d(8, 4, 3))
    apart = copy.deepcopy(model)
    for _ in range(2):
        for m, block in ((model, standardized), (apart, lambda m: torch.enable_grad())):
            with block(m), torch.autocast("cpu", dtype=dtype):
                for x in batches():
                    m(x.float()).float().square().mean().backward()
            with torch.no_grad():
                for parameter in m.parameters():
                    parameter.sub_(0.05 * parameter.grad)
    for ours, theirs in zip(model.parameters(), apart.parameters(), strict=True):
        # Three gradients are added in half precision or in float32.
        tolerance = 8 * torch.finfo(dtype).eps * float(theirs.detach().abs().max())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def test_every_block_has_the_values_of_its_weights():
    model, (x, *_) = network(), batches()
    for _ in range(3):
        with standardized(model):
            torch.testing.assert_close(model(x), copy.deepcopy(model)(x), rtol=0, atol=0)
            loss_of(model, x).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    with torch.no_grad(), standardized(model):
        pass
    assert all(layer.kept_weight.empty for layer in model if isinstance(layer, Reparameterized)), (
        "an evaluation keeps it"
    )


def test_copies_and_pickles_take_no_kept_weights_with_them():
    model, (x, *_) = network(), batches()
    size = len(pickle.dumps(model))
    with standardized(model):
        loss_of(model, x).backward()
    model.zero_grad()
    assert abs(len(pickle.dumps(model)) - size) < 1000
    assert all(layer.kept_weight.empty for layer in copy.deepcopy(model) if isinstance(layer, Reparameterized))


def test_a_graph_of_an_earlier_block_is_refused_and_not_silently_wrong():
    model, (x, *_) = network(), batches()
    with standardized(model):
        late, later = loss_of(model, x), loss_of(model, x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()
    with standardized(model), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        later.backward()


def test_the_kept_weight_follows_the_layer_to_another_type():
    model, (x, *_) = network(), batches()
    with standardized(model):
        loss_of(model, x).backward()
    model.zero_grad()
    model.float()
    with standardized(model):
        assert all(weight.dtype == torch.float32 for weight in shared(model))
        loss_of(model, x.float()).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
