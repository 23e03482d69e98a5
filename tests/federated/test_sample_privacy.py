"""Privacy of images: gradients of single images are those of a loop, clipped, noised, and accounted for."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from domain_runs import config, write_domains
from federated_reference import noised_gradient
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from opacus.accountants import RDPAccountant
from tiny_federation import client, network, settings
from torch import Tensor, nn

import batchless as bl
from batchless.federated import resume_federation, run_federation
from batchless.federated.algorithms import FedProx, FedWon
from batchless.federated.client import train_client
from batchless.federated.privacy import PrivacySettings
from batchless.federated.sample_privacy import drawn_steps, noised, per_image_gradients, taken_gradients
from batchless.federated.sampling import sampled_clients
from batchless.federated.server import initial_state
from batchless.runs import read_run
from batchless.tasks import Classify
from batchless.train import TrainingStoppedError

NOISELESS = PrivacySettings(level="sample", clip_norm=0.2, noise_multiplier=0.0)


def deeper(normalizer: str, *, groups: int = 1, stride: int = 1, kernel: int = 3, bias: bool = False) -> nn.Module:
    """Convolutions of several kinds, a residual branch with a gain of zero, activations in place."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=bias),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=bias),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 3),
    )
    nn.init.uniform_(model[4].weight, 0.5, 1.5)
    return bl.convert(model, normalizer, example=torch.zeros(1, 3, 6, 6))[0].double()


def looped(model: nn.Module, x: Tensor, y: Tensor) -> list[list[Tensor]]:
    """Each image's gradients, one backward pass each."""
    found = []
    for i in range(len(x)):
        model.zero_grad()
        F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    model.zero_grad()
    return found


NETWORKS = ["none+sws", "none+sws(gain=true)", "none+ws", "none+wn", "none+cwn", "gn+ws", "gn", "ln+sws", "in", "none"]


@pytest.mark.parametrize("normalizer", NETWORKS)
@hypothesis_settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_gradients_of_single_images_are_those_of_a_loop(normalizer, data):
    count = data.draw(st.integers(1, 4), "images")
    model = deeper(
        normalizer,
        groups=data.draw(st.sampled_from([1, 2, 4]), "groups"),
        stride=data.draw(st.sampled_from([1, 2]), "stride"),
        kernel=data.draw(st.sampled_from([1, 3]), "kernel"),
        bias=data.draw(st.booleans(), "bias"),
    ).train()
    x, y = torch.randn(count, 3, 6, 6, dtype=torch.float64), torch.randint(3, (count,))
    expected = looped(model, x, y)
    inplace = [getattr(module, "inplace", None) for module in model.modules()]
    with per_image_gradients(model):
        F.cross_entropy(model(x), y).backward()
        found = [taken_gradients(parameter) for parameter in model.parameters()]
    for position, value in enumerate(found):
        together = torch.stack([each[position] for each in expected])
        torch.testing.assert_close(value, together, rtol=1e-9, atol=1e-12)
    assert [getattr(module, "inplace", None) for module in model.modules()] == inplace
    assert all(parameter.grad is None for parameter in model.parameters())
    again = looped(model, x, y)  # nothing is left of the hooks
    torch.testing.assert_close(again, expected, rtol=0, atol=0)
    assert not any(hasattr(parameter, "grad_sample") for parameter in model.parameters())


@pytest.mark.parametrize("pieces", [(5,), (2, 3), (1, 1, 1, 1, 1)])
def test_a_step_is_the_papers_whatever_the_micro_batches(pieces):
    """Five images where eight are expected, three of them clipped."""
    model = deeper("none+sws").train()
    x, y = torch.randn(5, 3, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    flat = [torch.cat([g.flatten() for g in each]) for each in looped(model, x, y)]
    bound = sorted(float(g.norm()) for g in flat)[1]
    expected = noised_gradient([g.tolist() for g in flat], clip_norm=bound, expected_images=8)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    privacy = PrivacySettings(level="sample", clip_norm=bound, noise_multiplier=0.0)
    with (
        per_image_gradients(model),
        noised(model, optimizer, privacy, images_per_step=8, clip=None, words=(), seed=0) as step,
    ):
        for images, labels in zip(x.split(pieces), y.split(pieces), strict=True):
            step.backward_sum(F.cross_entropy(model(images), labels, reduction="sum"), samples=len(labels))
    moved = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, model.parameters(), strict=True)])
    torch.testing.assert_close(moved, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=1e-12)


def test_a_step_without_images_is_noise_of_the_deviation_asked_for():
    model = nn.Linear(300, 100)
    privacy = PrivacySettings(level="sample", clip_norm=0.5, noise_multiplier=3.0)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with noised(model, optimizer, privacy, images_per_step=4, clip=None, words=(1, 2), seed=0):
        pass
    moved = model.weight.detach() - before
    assert float(moved.std()) == pytest.approx(3.0 * 0.5 / 4, rel=0.02)
    assert abs(float(moved.mean())) < 4 * 0.375 / math.sqrt(30_000)


def test_one_image_changes_the_sum_by_no_more_than_the_clip():
    model = deeper("none+sws").train()
    x, y = 100 * torch.randn(4, 3, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    sums = []
    for rows in (slice(0, 4), slice(1, 4)):
        with per_image_gradients(model):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            with noised(model, optimizer, NOISELESS, images_per_step=1, clip=None, words=(), seed=0) as step:
                step.backward_sum(F.cross_entropy(model(x[rows]), y[rows], reduction="sum"), samples=len(y[rows]))
                sums.append(torch.cat([sum.flatten().clone() for sum in step.sums]))
    assert float((sums[0] - sums[1]).norm()) == pytest.approx(NOISELESS.clip_norm, rel=1e-9)


def test_steps_are_drawn_by_coins():
    privacy = PrivacySettings(level="sample")
    counts: Counter[int] = Counter()
    sizes = []
    for epoch in range(400):
        steps = drawn_steps(privacy, 11, images_per_step=5, words=(0, 0, epoch), seed=0)
        assert len(steps) == 3
        counts.update(image for step in steps for image in step)
        sizes += [len(step) for step in steps]
    assert sum(sizes) / len(sizes) == pytest.approx(5, abs=4 * math.sqrt(11 * 5 / 11 * 6 / 11 / 1200))
    assert len(set(sizes)) > 5
    assert all(counts[image] == pytest.approx(1200 * 5 / 11, rel=0.15) for image in range(11))
    assert drawn_steps(privacy, 3, images_per_step=5, words=(), seed=0) == [[0, 1, 2]]


def trained(privacy: PrivacySettings, **changes):
    model, algorithm = network("none+sws"), changes.pop("algorithm", FedWon(weighting="equal"))
    state = initial_state(model, algorithm, 4)
    made = settings(privacy=privacy, **changes)
    return train_client(model, state, client(0, 7), algorithm, Classify(), made, local=None)


def test_a_client_trains_the_same_whatever_the_micro_batch():
    few, many = (trained(NOISELESS, images_per_forward=size) for size in (1, 4))
    for name, value in few.values.items():
        torch.testing.assert_close(many.values[name], value, rtol=1e-5, atol=1e-7)
    assert few.images == many.images


def test_without_noise_bound_and_chance_it_is_plain_training():
    """All images in every step: DP-SGD whose clip and noise do nothing is SGD."""
    free = PrivacySettings(level="sample", clip_norm=1e6, noise_multiplier=0.0)
    given = {"images_per_step": 7, "images_per_forward": 7, "local_epochs": 2}
    for algorithm in (FedWon(weighting="equal"), FedProx(mu=0.5, weighting="equal")):
        private = trained(free, algorithm=algorithm, **given)
        plain = trained(PrivacySettings(), algorithm=algorithm, **given)
        for name, value in plain.values.items():
            torch.testing.assert_close(private.values[name], value, rtol=1e-5, atol=1e-6)


def test_a_parameter_used_outside_of_its_layer_is_refused():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.inner.weight)

    model = Odd()
    with per_image_gradients(model):
        model(torch.ones(1, 2)).sum().backward()
        with pytest.raises(ValueError, match="used outside of its layer's forward"):
            taken_gradients(model.inner.weight)


def test_a_run_accounts_for_the_rounds_each_client_took_part_in_and_resumes(tmp_path):
    """11 images in steps of 4: q = 4/11, 3 steps an epoch; the client that was drawn most often counts."""
    root = write_domains(tmp_path / "domains")
    given = {"rounds": 3, "fraction": 0.4, "evaluate_every": 3, "local_epochs": 2}
    asked = config("private images", root, tmp_path / "run", **given)
    calls = iter([False] * 6 + [True] * 100)
    with pytest.raises(TrainingStoppedError):
        run_federation(asked, should_stop=lambda: next(calls))
    resume_federation(tmp_path / "run")
    rounds = [line for line in read_run(tmp_path / "run").metrics if line["kind"] == "round"]
    assert [line["round"] for line in rounds] == [1, 2, 3]
    taken: Counter[int] = Counter()
    for line in rounds:
        taken.update(sampled_clients(9, fraction=0.4, seed=0, round=line["round"]))
        accountant = RDPAccountant()
        accountant.history = [(0.5, 4 / 11, 3 * 2 * max(taken.values()))]
        assert line["epsilon"] == pytest.approx(accountant.get_epsilon(delta=1e-5))
