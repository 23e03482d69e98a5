"""Give an existing model another normalizer: `model, report = convert(model, "bcn-micro+ws", example=images)`."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from batchless.nn.batch_channel_norm import BatchChannelNorm
from batchless.nn.normalizer import Bn, FrozenBn, NoNorm, Normalizer, SyncBn, parse_normalizer
from batchless.nn.skip_init import SkipInit
from batchless.surgery.dataflow import find_pairs
from batchless.surgery.pairs import Pairs
from batchless.surgery.recognize import (
    BatchNormSource,
    is_batch_normalization,
    is_convolution,
    is_normalization,
    read_batch_norm,
    read_convolution,
)
from batchless.surgery.replace import (
    Built,
    NormAndActivation,
    build_convolution,
    build_norm,
    fits_fan_in,
    is_already,
)
from batchless.surgery.report import Action, ConversionReport, Entry
from batchless.surgery.residual import branch_scales, residual_ends
from batchless.surgery.swap import Places, copy_of, keep_own_attributes

Skip = Callable[[nn.Module, str], bool]
"""`skip(module, qualified_name)`: whether a layer is left as it is."""

_ATTRIBUTE = "batchless_conversion"


@dataclass(frozen=True)
class Conversion:
    """What a converted model remembers.

    `pairs`: which layer feeds which normalization for certain, and nothing else. `ranks`: dimensions of normalizations' inputs.
    """

    report: ConversionReport
    pairs: dict[str, str]
    ranks: dict[str, int]


def forget_conversion(model: nn.Module) -> None:
    """Make the model look as if it was never converted."""
    if conversion_of(model) is not None:
        delattr(model, _ATTRIBUTE)


def conversion_of(model: nn.Module) -> Conversion | None:
    """What `convert` stored on the model; None if it was never converted."""
    return getattr(model, _ATTRIBUTE, None)


def convert(
    model: nn.Module,
    normalizer: str | Normalizer,
    *,
    example: object = None,
    skip: Skip | None = None,
    strict: bool = False,
) -> tuple[nn.Module, ConversionReport]:
    """A copy of `model` with its batch normalizations and the convolutions before them replaced as `normalizer` says.

    Every batch normalization becomes the normalizer's first part; every convolution that a normalization follows (in the
    model as given) gets the second part's weight reparameterization. Convolutions without a normalization, linear
    layers, other normalizations, and layers of classes with a forward of their own that no rule knows stay and are reported.

    Carried over: weights always; affine maps into gn, ln, in and bcn; running statistics only where the layer before keeps
    its function (with a reparameterized weight they would be off by orders of magnitude; `recalibrate` re-estimates them).
    Gains that start at zero go to BCN's per-group gain, for `none` to a scalar (`none(skip=skip-init)`: at each branch's end;
    `none(skip=alpha-beta)` scales the convolutions at the ends of each branch instead).

    Args:
        model: any module; it is not changed.
        normalizer: a name such as `gn+ws` (`parse_normalizer` has the grammar), or a parsed one.
        example: a tensor or a tuple of positional arguments. Run once in evaluation mode, it tells which layer feeds which
            and which activation precedes a convolution; without it both are guessed from the order of declaration.
        skip: layers to leave as they are.
        strict: raise if a batch normalization is left that the name was to replace.

    Returns:
        The converted copy, and a report that prints as a table. Converting again with the same name gives a copy.

    Raises:
        ValueError: unknown name; a model converted to another name; nothing to convert (no convolution and no batch
            normalization, or a weight reparameterization without a convolution); an example that the model does not run
            on; `strict` violated.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    >>> converted, report = convert(model, "gn+ws", example=torch.randn(1, 3, 8, 8))
    >>> [type(layer).__name__ for layer in converted], len(report.replaced)
    (['WSConv2d', 'GroupNorm', 'ReLU'], 2)
    """
    name = parse_normalizer(normalizer)
    earlier = conversion_of(model)
    if earlier is not None:
        if earlier.report.normalizer != str(name):
            raise ValueError(
                f"the model is already converted to {earlier.report.normalizer!r} and cannot become {str(name)!r}: "
                "convert the original model instead"
            )
        _check_complete(model, earlier.report, strict=strict)
        return copy_of(model), earlier.report
    _check_convertible(model, name)
    surgery = _Surgery(
        Places(copy_of(model)), name, find_pairs(model, example), skip or (lambda module, qualified: False)
    )
    surgery.run()
    report = ConversionReport(
        normalizer=str(name),
        found_by="structure" if example is None else "example",
        entries=tuple(surgery.entries),
        notes=tuple(surgery.notes()),
    )
    _check_complete(surgery.model, report, strict=strict)
    setattr(surgery.model, _ATTRIBUTE, Conversion(report, surgery.certain_pairs(), surgery.ranks))
    return surgery.model, report


def _check_convertible(model: nn.Module, name: Normalizer) -> None:
    has_convolution = any(is_convolution(module) for module in model.modules())
    has_batch_norm = any(is_batch_normalization(module) for module in model.modules())
    if not has_convolution and (name.weight is not None or not has_batch_norm):
        raise ValueError(
            f"nothing to convert to {name}: {type(model).__name__} has no convolution"
            f"{' to reparameterize' if has_batch_norm else ' and no batch normalization'}; pass the network that has them"
        )


def _check_complete(model: nn.Module, report: ConversionReport, *, strict: bool) -> None:
    left = [
        f"{entry.name or '(model)'} ({entry.detail})"
        for entry in report.skipped
        if is_batch_normalization(model.get_submodule(entry.name))
    ]
    if strict and left:
        raise ValueError(
            f"strict: {len(left)} batch normalizations are left that {report.normalizer} was to replace: {', '.join(left)}; "
            "replace them by hand, or leave strict out"
        )


@dataclass
class _Surgery:
    """One conversion: the copy being changed, and what has been done to it."""

    places: Places
    name: Normalizer
    pairs: Pairs
    skip: Skip
    entries: list[Entry] = field(default_factory=list)
    reparameterized: set[str] = field(default_factory=set)
    renamed: dict[str, str] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    fresh_statistics: bool = False
    dead: int = 0
    ends: frozenset[str] = frozenset()
    scales: dict[str, float] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        """The copy as it stands."""
        return self.places.model

    def run(self) -> None:
        if isinstance(self.name.act, NoNorm) and self.name.act.skip == "skip-init":
            self.ends = residual_ends(self.model)
        if isinstance(self.name.act, NoNorm) and self.name.act.skip == "alpha-beta":
            self.scales = branch_scales(self.model, alpha=self.name.act.alpha)
        steps = {id(module.batch_norm) for module in self.model.modules() if isinstance(module, BatchChannelNorm)}
        modules = [item for item in self.model.named_modules() if id(item[1]) not in steps]
        for qualified, module in modules:
            if is_convolution(module):
                self._convolution(qualified, module)
        if left := sorted(self.scales.keys() - self.reparameterized):
            raise ValueError(
                f"{left[0]} is not reparameterized, so that {self.name} cannot scale its residual branch: do not skip it, or "
                "choose another skip"
            )
        for qualified, module in modules:
            if is_batch_normalization(module):
                self._batch_norm(qualified, module)
            elif is_normalization(module):
                self._note(qualified, "kept", module, None, "not a batch normalization")
        order = {qualified: position for position, (qualified, _) in enumerate(modules)}
        self.entries.sort(key=lambda entry: order[entry.name])
        if isinstance(self.name.act, NoNorm):
            self._protect_shortcuts()

    def notes(self) -> list[str]:
        """What of a pretrained function changed."""
        act, weight = self.name.act, self.name.weight
        notes = []
        if self.reparameterized:
            notes.append(
                f"{len(self.reparameterized)} convolutions compute with a reparameterized weight: a pretrained function is not "
                "preserved; train or fine-tune"
            )
        replaced = any(e.action == "replaced" and e.name not in self.reparameterized for e in self.entries)
        if replaced and not isinstance(act, Bn | SyncBn | FrozenBn):
            notes.append(
                f"batch normalization became {act.name}: with pretrained weights the outputs differ until fine-tuned"
            )
        if self.fresh_statistics:
            notes.append("running statistics start fresh: batchless.recalibrate(model, batches) estimates them")
        if self.dead:
            fix = "load pretrained weights before the conversion, or build the model without zero gains"
            notes.append(f"{self.dead} frozen normalizations have gains of 0 and pass nothing on, for good: {fix}")
        if weight is None and isinstance(act, NoNorm):
            notes.append("nothing normalizes this model any more: consider none+sws")
        return notes

    def certain_pairs(self) -> dict[str, str]:
        """Layers whose normalization, and nothing else, they feed: what `fold` may merge."""
        return {layer: self.renamed.get(norm, norm) for layer, norm in self.pairs.certain().items()}

    def _convolution(self, qualified: str, module: nn.Module) -> None:
        weight = self.name.weight
        if qualified not in self.pairs.norms_after:
            shared = qualified in self.pairs.used_elsewhere
            reason = "its output feeds more than a normalization" if shared else "no normalization follows it"
            return self._note(qualified, "kept", module, None, reason)
        if weight is None:
            return self._note(qualified, "kept", module, None, "")
        if self.skip(module, qualified):
            return self._note(qualified, "kept", module, None, "skipped as asked")
        source = read_convolution(module)
        if isinstance(source, str):
            return self._note(qualified, "skipped", module, None, source)
        if not fits_fan_in(weight, module):
            return self._note(
                qualified, "skipped", module, None, "fan-in of 1: standardizing would set its weight to 0"
            )
        known = qualified not in self.pairs.unknown_activation
        activation = self.pairs.activation_before.get(qualified)
        built = build_convolution(
            weight, module, source, activation, activation_known=known, scale=self.scales.get(qualified, 1.0)
        )
        self.reparameterized.add(qualified)
        self._replace(module, built.layer)
        return self._note(qualified, "replaced", module, built.layer, built.detail)

    def _batch_norm(self, qualified: str, module: nn.Module) -> None:
        feeding = self.pairs.feeding(qualified)
        holds = self.reparameterized.isdisjoint(feeding)
        stale = "" if holds else "; its statistics are no longer those of its input"
        if self.skip(module, qualified):
            self.fresh_statistics |= not holds
            return self._note(qualified, "kept", module, None, f"skipped as asked{stale}")
        source = read_batch_norm(module)
        if isinstance(source, str):
            self.fresh_statistics |= not holds
            return self._note(qualified, "skipped", module, None, source + stale)
        if is_already(self.name.act, module, holds):
            return self._keep_batch_norm(qualified, module, holds)
        rank = self.pairs.rank.get(qualified)
        if rank is None and feeding and isinstance(self.model.get_submodule(feeding[0]), nn.Linear):
            rank = 2
        spatial = self.pairs.spatial.get(qualified)
        built = build_norm(
            self.name.act, source, statistics_hold=holds, rank=rank, spatial=spatial, name=qualified or "(model)"
        )
        self.fresh_statistics |= built.fresh_statistics
        self.dead += built.dead
        if built.few_values:
            warnings.warn(f"{qualified}: {built.few_values}; fewer groups give steadier statistics", stacklevel=4)
        if isinstance(self.name.act, NoNorm):
            built = self._nothing(qualified, built, feeding, source)
        layer = built.layer
        rank = rank or (source.dimensions or 2) + 2
        if source.act is not None and source.drop is not None:
            layer = NormAndActivation(built.layer, source.drop, source.act)
            self.renamed[qualified] = f"{qualified}.norm".lstrip(".")
        self.ranks[self.renamed.get(qualified, qualified)] = rank
        self._replace(module, layer)
        return self._note(qualified, "replaced", module, built.layer, built.detail)

    def _keep_batch_norm(self, qualified: str, module: nn.Module, holds: bool) -> None:
        detail = "already what is asked for"
        if not holds and isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            self.fresh_statistics = True
            detail = "statistics start fresh"
        self._note(qualified, "kept", module, None, detail)

    def _nothing(self, qualified: str, built: Built, feeding: list[str], source: BatchNormSource) -> Built:
        """What stands in place of a removed normalization: nothing, or a copy where in-place code would hit its input."""
        guessed = self.pairs.seen.isdisjoint((qualified, *feeding))
        overwritten = qualified in self.pairs.overwritten or (guessed and not feeding)
        if qualified in self.ends and isinstance(built.layer, nn.Identity):
            scalar = SkipInit(source.num_features, device=source.device, dtype=source.dtype)
            built = Built(scalar, "ends a residual branch: a scalar that starts at 0")
        layer, details = built.layer, [built.detail, self._bias_in_place_of_norm(feeding, source)]
        if overwritten and isinstance(layer, nn.Identity):
            layer = nn.ZeroPad1d(0)  # torch's own layer that copies
            details.append("copies, so that nothing overwrites its input")
        return Built(layer, "; ".join(filter(None, details)))

    def _bias_in_place_of_norm(self, feeding: list[str], source: BatchNormSource) -> str:
        """Give each layer that fed the removed normalization a bias, starting at the normalization's."""
        gained = []
        for qualified in feeding:
            layer = self.model.get_submodule(qualified)
            if getattr(layer, "bias", None) is None and not self.skip(layer, qualified):
                weight = layer.weight
                assert isinstance(weight, torch.Tensor)
                start = torch.zeros(source.num_features) if source.bias is None else source.bias.detach()
                trains = source.bias if isinstance(source.bias, nn.Parameter) else weight
                start = start.to(weight.device, weight.dtype, copy=True)
                layer.bias = nn.Parameter(start, requires_grad=trains.requires_grad)
                gained.append(qualified)
        if gained:
            return f"its bias moved to {', '.join(gained)}"
        return f"its bias is dropped: {', '.join(feeding)} has one" if feeding and source.bias is not None else ""

    def _protect_shortcuts(self) -> None:
        """Make activations write to new memory: without a normalization before it, one in place would overwrite a shortcut."""
        for module in self.model.modules():
            if getattr(module, "inplace", False) is True:
                module.inplace = False  # type: ignore[assignment]

    def _replace(self, old: nn.Module, new: nn.Module) -> None:
        own = list(old.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):  # frozen stays frozen
            for module in set(new.modules()) - set(old.modules()):
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(False)
        keep_own_attributes(old, new)
        self.places.replace(old, new)

    def _note(self, qualified: str, action: Action, was: nn.Module, now: nn.Module | None, detail: str) -> None:
        after = type(was).__name__ if now is None else type(now).__name__
        self.entries.append(Entry(name=qualified, action=action, was=type(was).__name__, now=after, detail=detail))
