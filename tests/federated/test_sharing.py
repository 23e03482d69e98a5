"""What is shared and what stays: by the type of the module, in networks of several libraries."""

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

import batchless as bl
from batchless.federated.algorithms import FedAvg, FedBN, FedProx, FedWon, FixBN, SiloBN, Standalone
from batchless.federated.server_optimizers import FedAdam
from batchless.federated.sharing import explain, local_names, tensor_kinds, trainable_tensors
from batchless.nn import BatchChannelNorm, BatchNorm, FrozenBatchNorm, SkipInit


def keys(model: nn.Module, *kinds: str) -> set[str]:
    return {name for name, kind in tensor_kinds(model).items() if kind in kinds}


def test_every_tensor_of_the_state_dict_in_its_order():
    model = torchvision.models.resnet18(num_classes=3)
    assert list(tensor_kinds(model)) == list(model.state_dict())


def test_the_shortcuts_of_a_resnet_are_normalization():
    model = torchvision.models.resnet18(num_classes=3)
    names = local_names(FedBN(), tensor_kinds(model))
    assert {f"layer2.0.downsample.1.{own}" for own in ("weight", "bias", "running_mean", "running_var")} <= names
    assert "layer2.0.downsample.0.weight" not in names
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(names) == 5 * len(norms) == 100
    assert {name.rpartition(".")[0] for name in names} == set(norms)
    assert {n for n in model.state_dict() if "bn" in n} < names, "the choice by name, which this is not"


def test_silobn_keeps_running_statistics_and_their_counters():
    model = torchvision.models.resnet18(num_classes=3)
    names = local_names(SiloBN(), tensor_kinds(model))
    assert {name.rpartition(".")[2] for name in names} == {"running_mean", "running_var", "num_batches_tracked"}
    assert len(names) == 60


def test_timm_layers_that_hold_an_activation():
    model = timm.create_model("efficientnet_b0", num_classes=3)
    assert type(model.bn1).__name__ == "BatchNormAct2d"
    names = local_names(FedBN(), tensor_kinds(model))
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert {name.rpartition(".")[0] for name in names} == norms
    assert not any("se." in name or "conv" in name for name in names)


def test_an_activation_inside_a_normalization_is_shared():
    layer = timm.layers.BatchNormAct2d(4, act_layer=nn.PReLU)
    assert tensor_kinds(layer)["act.weight"] == "weight"
    assert keys(layer, "affine") == {"weight", "bias"}


def test_our_layers():
    model = nn.ModuleDict(
        {
            "bn": BatchNorm(4),
            "frozen": FrozenBatchNorm(4),
            "torchvision": FrozenBatchNorm2d(4),
            "bcn": BatchChannelNorm(4, 2),
            "large": BatchChannelNorm(4, 2, statistics="batch"),
            "skip": SkipInit(),
            "gn": nn.GroupNorm(2, 4),
            "ln": nn.LayerNorm(4),
            "in": nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        }
    )
    norms = ("bn", "frozen", "torchvision", "bcn", "large", "gn", "ln", "in")
    assert keys(model, "affine") == {
        *(f"{name}.{own}" for name in norms for own in ("weight", "bias")),
        *(f"{name}.batch_norm.{own}" for name in ("bcn", "large") for own in ("weight", "bias")),
    }  # fmt: skip
    assert keys(model, "statistic") == {
        *(f"{name}.{own}" for name in ("bn", "frozen", "torchvision", "bcn.batch_norm", "large.batch_norm", "in")
          for own in ("running_mean", "running_var")),
        "bcn.batch_norm.memory",
    }  # fmt: skip
    assert keys(model, "counter") == {
        "bn.num_batches_tracked",
        "bcn.batch_norm.moves",
        "large.batch_norm.num_batches_tracked",
        "in.num_batches_tracked",
    }
    assert keys(model, "weight") == {"skip.gain"}


def test_constants_of_other_modules_are_no_statistics():
    model = nn.Linear(2, 2)
    model.register_buffer("grid", torch.zeros(3))
    model.register_buffer("index", torch.zeros(3, dtype=torch.long))
    model.register_buffer("passing", torch.zeros(3), persistent=False)
    assert tensor_kinds(model) == {"weight": "weight", "bias": "weight", "grid": "weight", "index": "counter"}
    assert not local_names(FedBN(), {name: k for name, k in tensor_kinds(model).items() if k != "counter"})


def test_a_module_with_two_names_has_both():
    layer = nn.BatchNorm2d(2)
    model = nn.ModuleDict({"first": layer, "second": layer})
    assert set(tensor_kinds(model)) == set(model.state_dict())
    assert trainable_tensors(model) == {"first.weight", "first.bias", "second.weight", "second.bias"}


def test_frozen_parameters_are_not_trainable():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].requires_grad_(False)
    assert trainable_tensors(model) == {"1.weight", "1.bias"}


def test_something_else_in_the_state_dict_is_named():
    class Odd(nn.Linear):
        def get_extra_state(self) -> object:
            return {"secret": 1}

    with pytest.raises(ValueError, match="_extra_state in the state dict of Odd is no parameter or buffer"):
        tensor_kinds(Odd(1, 1))


def converted(normalizer: str) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 3))
    return bl.convert(model, normalizer, example=torch.zeros(1, 3, 6, 6))[0]


@pytest.mark.parametrize(
    ("algorithm", "normalizer", "note"),
    [
        (FedBN(), "none+sws", "fedbn makes no difference to fedavg here: this network has no normalization layers"),
        (SiloBN(), "gn", "silobn makes no difference to fedavg here: this network has no running statistics"),
        (FixBN(), "gn", "fixbn makes no difference to fedavg here: no layer of this network has running statistics"),
        (FedProx(mu=0), "bn", "fedprox makes no difference to fedavg here: mu is 0"),
        (FedWon(), "bn", "this network still has normalization layers: that is fedavg, not fedwon"),
        (FedBN(), "gn", None),
        (FedBN(), "bcn-micro+ws", None),
        (SiloBN(), "bcn-micro+ws", None),
        (FixBN(), "bn", None),
        (FedProx(mu=0.1), "bn", None),
        (FedWon(), "none+sws", None),
        (FedAvg(), "none", None),
        (Standalone(), "none", None),
    ],
)
def test_an_algorithm_that_makes_no_difference_says_so(algorithm, normalizer, note):
    text = explain(algorithm, converted(normalizer))
    last = text.splitlines()[-1]
    if note is None:
        assert last.startswith(("evaluated:", "without layers of its own:"))
    else:
        assert last.startswith(note)


def test_the_table_counts_every_element_once():
    model = converted("bn")
    rows = [line.split() for line in explain(FixBN(freeze_after=0.25), model).splitlines()]
    table = {
        row[0]: (int(row[1]), int(row[2]), " ".join(row[3:]))
        for row in rows
        if row[0] in {*tensor_kinds(model).values()}
    }
    assert sum(elements for _, elements, _ in table.values()) == sum(t.numel() for t in model.state_dict().values())
    assert sum(tensors for tensors, _, _ in table.values()) == len(model.state_dict())
    assert table["statistic"][2] == "averaged, then frozen after 25% of the rounds"
    assert table["counter"][2] == "the maximum is taken"
    assert table["weight"][2] == table["affine"][2] == "averaged"


def test_the_table_says_where_a_server_optimizer_steps_and_where_nothing_is_averaged():
    model = converted("bn")
    rows = {line.split()[0]: line for line in explain(FedAvg(server=FedAdam(tau=0.5)), model).splitlines()}
    assert "tau=0.5) towards it" in rows["fedavg:"]
    assert all("fedadam steps towards the mean" in rows[kind] for kind in ("weight", "affine"))
    assert rows["statistic"].endswith("averaged")
    assert explain(Standalone(), model).splitlines()[0] == "standalone: nothing is averaged"
