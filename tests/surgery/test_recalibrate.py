"""Recalibration sets statistics to those of all the data together, and leaves everything else as it was."""

import itertools

import pytest
import timm.layers
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import batchless as bl
import batchless.nn as bnn

NORMS = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "BatchNormAct2d": lambda: timm.layers.BatchNormAct2d(4),
    "BatchNorm": lambda: bnn.BatchNorm(4),
    "EstimatedBatchNorm": lambda: bnn.EstimatedBatchNorm(4),
    "BatchChannelNorm": lambda: bnn.BatchChannelNorm(4, 2),
    "large-batch BatchChannelNorm": lambda: bnn.BatchChannelNorm(4, 2, statistics="batch"),
    "FrozenBatchNorm": lambda: bnn.FrozenBatchNorm(4),
    "FrozenBatchNorm2d": lambda: FrozenBatchNorm2d(4),
}
BY_BATCH = ("BatchNorm2d", "BatchNormAct2d", "BatchNorm", "large-batch BatchChannelNorm")
"""Their running variance is torch's, unbiased; estimates and frozen statistics are biased."""

every_norm = pytest.mark.parametrize("kind", NORMS)


def images(samples: int, *, seed: int = 1, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(samples, channels, 5, 5, generator=generator, dtype=torch.float64) + 3


def network(kind: str) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), NORMS[kind](), nn.ReLU(), nn.Dropout(0.5)).double()


def statistics(norm: nn.Module) -> tuple[Tensor, Tensor]:
    norm = getattr(norm, "batch_norm", norm)
    return norm.running_mean, norm.running_var


def pooled(x: Tensor, *, correction: int) -> tuple[Tensor, Tensor]:
    """Mean and variance `[C]` of all values of `x` `[N, C, ..]`."""
    values = [x[:, c].flatten().tolist() for c in range(x.shape[1])]
    means = [sum(v) / len(v) for v in values]
    variances = [sum((z - m) ** 2 for z in v) / (len(v) - correction) for v, m in zip(values, means, strict=True)]
    return torch.tensor(means, dtype=x.dtype), torch.tensor(variances, dtype=x.dtype)


def ragged(x: Tensor, sizes: list[int]) -> list[Tensor]:
    return list(x.split(sizes))


@every_norm
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_statistics_are_those_of_all_values_together_whatever_the_batches(kind, sizes):
    model = network(kind)
    x = images(sum(sizes))
    bl.recalibrate(model, ragged(x, sizes))
    mean, var = pooled(model[0](x).detach(), correction=int(kind in BY_BATCH))
    torch.testing.assert_close(statistics(model[1]), (mean, var), rtol=1e-10, atol=1e-10)


@every_norm
def test_it_forgets_what_was_there_and_counts_batches(kind):
    model = network(kind)
    bl.recalibrate(model, [images(3, seed=5)])
    bl.recalibrate(model, ragged(images(6), [1, 2, 3]))
    expected = pooled(model[0](images(6)).detach(), correction=int(kind in BY_BATCH))
    torch.testing.assert_close(statistics(model[1]), expected, rtol=1e-10, atol=1e-10)
    norm = getattr(model[1], "batch_norm", model[1])
    counter = getattr(norm, "moves", getattr(norm, "num_batches_tracked", None))
    assert counter is None or int(counter) == 3


def test_large_means_do_not_cancel():
    model = nn.Sequential(nn.BatchNorm2d(3))
    x = images(8).float() + 1e4
    bl.recalibrate(model, ragged(x, [1, 3, 4]))
    mean, var = pooled(x.double(), correction=1)
    torch.testing.assert_close(model[0].running_mean.double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(model[0].running_var.double(), var, rtol=1e-3, atol=0)


def test_batch_normalizations_behind_each_other_normalize_each_batch_by_itself():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).double()
    batches = ragged(images(6), [2, 4])
    bl.recalibrate(model, batches)
    model[0].train()
    second = torch.cat([model[2](model[1](model[0](batch))) for batch in batches]).detach()
    torch.testing.assert_close(statistics(model[3]), pooled(second, correction=1))


@pytest.mark.parametrize("kind", ["EstimatedBatchNorm", "FrozenBatchNorm"])
def test_estimates_behind_each_other_are_those_of_what_each_layer_has_seen_so_far(kind):
    model = nn.Sequential(NORMS[kind](), nn.ReLU(), nn.Conv2d(4, 4, 1), NORMS[kind]()).double()
    x = images(6, channels=4)
    bl.recalibrate(model, ragged(x, [2, 4]))
    first = model[0]
    seen = []
    for so_far, batch in ((x[:2], x[:2]), (x, x[2:])):
        mean, var = pooled(so_far, correction=0)
        normalized = (batch - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + first.eps).sqrt()
        seen.append(model[2](normalized.relu()))
    torch.testing.assert_close(statistics(model[3]), pooled(torch.cat(seen).detach(), correction=0))


def test_a_layer_that_runs_several_times_sees_all():
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = bnn.EstimatedBatchNorm(3).double()

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.norm(x), self.norm(x[..., ::2, ::2])]

    model, x = Pyramid(), images(4)
    bl.recalibrate(model, [x])
    both = torch.cat([x.flatten(2), x[..., ::2, ::2].flatten(2)], 2)
    torch.testing.assert_close(statistics(model.norm), pooled(both, correction=0))


def test_a_converted_model_normalizes_in_evaluation():
    convolutions = [nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)]
    model = nn.Sequential(convolutions[0], nn.BatchNorm2d(16), nn.ReLU(), convolutions[1], nn.BatchNorm2d(16)).double()
    for name in ("bcn-micro+ws", "bcn+ws", "frozen-bn+ws", "bn+cwn"):
        converted, _ = bl.convert(model, name, example=images(1))
        bl.recalibrate(converted, ragged(images(6), [3, 3]))
        assert converted.training
        norm = getattr(converted[1], "batch_norm", converted[1]).eval()
        y = norm(converted[0](images(6))).detach()
        assert float(y.mean((0, 2, 3)).abs().max()) < 1e-6
        assert float((y.var((0, 2, 3)) - 1).abs().max()) < 0.02
        assert converted[0].shared_weight is None


@every_norm
def test_parameters_gradients_and_modes_are_not_touched(kind):
    model = network(kind).train()
    model[2].eval()
    model[1].eval()
    model(images(2)).sum().backward()
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    modes = [module.training for module in model.modules()]
    bl.recalibrate(model, [images(4)])
    assert all(torch.equal(p, parameters[name]) for name, p in model.named_parameters())
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters() if p.grad is not None)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_everything_but_normalization_runs_as_in_evaluation():
    class Drops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            return x

    norm = timm.layers.BatchNormAct2d(3)
    norm.drop = Drops()
    model = nn.Sequential(nn.Dropout(0.9), Drops(), norm, nn.BatchNorm2d(3)).double().train()
    random = torch.get_rng_state()
    bl.recalibrate(model, [images(4)])
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(statistics(model[2]), pooled(images(4), correction=1))
    assert model[1].training
    assert norm.drop.training


class Failing(nn.Module):
    """Fails at the second batch."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body, self.calls = network(kind), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            raise KeyboardInterrupt
        return self.body(x)


@every_norm
def test_a_failure_restores_everything(kind):
    model = Failing(kind).train()
    bl.recalibrate(model.body, [images(3, seed=5)])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        bl.recalibrate(model, ragged(images(4), [2, 2]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_failure_of_the_data_restores_everything():
    def batches():
        yield images(2)
        raise OSError("disk")

    model = network("BatchNorm2d")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(OSError, match="disk"):
        bl.recalibrate(model, batches())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_batches_and_nothing_to_recalibrate_are_errors():
    model = network("EstimatedBatchNorm")
    with pytest.raises(ValueError, match="at least one batch, got none") as error:
        bl.recalibrate(model, [])
    assert "\n" not in str(error.value)
    for model in (nn.Linear(3, 3), nn.Sequential(nn.GroupNorm(1, 3), nn.BatchNorm2d(3, track_running_stats=False))):
        with pytest.raises(
            ValueError, match=rf"^{type(model).__name__} has no layer with running statistics or estimates"
        ):
            bl.recalibrate(model, [images(2)])


def test_a_layer_that_saw_nothing_keeps_its_statistics():
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.BatchNorm2d(3).double(), nn.BatchNorm2d(3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Unused()
    model.unused.running_mean.fill_(7)
    model.unused.num_batches_tracked.fill_(5)
    bl.recalibrate(model, [images(2)])
    assert int(model.used.num_batches_tracked) == 1
    assert (model.unused.running_mean == 7).all()
    assert int(model.unused.num_batches_tracked) == 5


def test_batches_may_be_tuples_of_arguments_or_a_generator_and_layers_called_by_keyword():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3).double()

        def forward(self, x: Tensor, scale: float) -> Tensor:
            return self.norm(input=scale * x)

    model, x = Two(), images(4)
    bl.recalibrate(model, ((batch, 2.0) for batch in ragged(x, [1, 3])))
    torch.testing.assert_close(statistics(model.norm), pooled(2 * x, correction=1))


def test_half_precision_statistics_are_summed_in_float32():
    model = nn.Sequential(bnn.EstimatedBatchNorm(3)).to(torch.bfloat16)
    x = images(64).to(torch.bfloat16)
    bl.recalibrate(model, list(itertools.chain.from_iterable(x.split(1) for _ in range(3))))
    mean, var = pooled(x.double(), correction=0)
    torch.testing.assert_close(model[0].running_mean.double(), mean, rtol=2**-8, atol=0)
    torch.testing.assert_close(model[0].running_var.double(), var, rtol=2**-8, atol=0)
