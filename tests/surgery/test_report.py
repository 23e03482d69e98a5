"""The report of a conversion tells every layer once, in order, and prints as a table."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import batchless as bl
from batchless.surgery import ConversionReport, Entry


class OwnNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Conv2d(8, 8, 3),
        nn.GroupNorm(2, 8),
        nn.Conv2d(8, 7, 3),
        OwnNorm(7),
        nn.Conv2d(7, 2, 1),
    )


EXAMPLE = torch.zeros(1, 3, 16, 16)


def test_every_convolution_and_normalization_is_told_once_in_order():
    _, report = bl.convert(network(), "bcn-micro+ws", example=EXAMPLE)
    told = [(entry.name, entry.action, entry.was, entry.now) for entry in report.entries]
    assert told == [
        ("0.0", "replaced", "Conv2d", "WSConv2d"),
        ("0.1", "replaced", "BatchNorm2d", "BatchChannelNorm"),
        ("1", "replaced", "Conv2d", "WSConv2d"),
        ("2", "kept", "GroupNorm", "GroupNorm"),
        ("3", "replaced", "Conv2d", "WSConv2d"),
        ("4", "skipped", "OwnNorm", "OwnNorm"),
        ("5", "kept", "Conv2d", "Conv2d"),
    ]


def test_replaced_kept_and_skipped_are_all_there_is():
    _, report = bl.convert(network(), "gn+ws", example=EXAMPLE)
    assert [entry.name for entry in report.replaced] == ["0.0", "0.1", "1", "3"]
    assert [entry.name for entry in report.kept] == ["2", "5"]
    assert [entry.name for entry in report.skipped] == ["4"]
    assert len(report.replaced) + len(report.kept) + len(report.skipped) == len(report.entries)


def test_reasons_group_counts_and_gammas_are_told():
    _, report = bl.convert(network(), "bcn-micro(groups=4)+sws", example=EXAMPLE)
    details = {entry.name: entry.detail for entry in report.entries}
    assert details["0.0"] == "gamma 1.0000 (no activation before it)"
    assert details["0.1"] == "4 groups of 2; statistics start fresh"
    assert details["1"] == "gamma 1.7129 (relu)"
    assert details["2"] == "not a batch normalization"
    assert details["4"].startswith("OwnNorm overrides forward and no rule knows it")
    assert details["5"] == "no normalization follows it"


@pytest.mark.parametrize(("example", "found_by"), [(EXAMPLE, "example"), (None, "structure")])
def test_the_table_prints_all(example, found_by):
    _, report = bl.convert(network(), "gn(groups=4)+ws", example=example)
    lines = str(report).splitlines()
    assert lines[0] == f"gn(groups=4)+ws: 4 layers replaced, 2 kept, 1 skipped; pairs found by {found_by}"
    assert lines[1] == ""
    assert lines[2].split() == ["layer", "action", "was", "now", "detail"]
    rows = lines[3 : 3 + len(report.entries)]
    for row, entry in zip(rows, report.entries, strict=True):
        assert row.split(None, 4) == [
            entry.name,
            entry.action,
            entry.was,
            entry.now,
            *([entry.detail] if entry.detail else []),
        ]
    columns = {line.index(word) for line, word in zip(rows, [entry.action for entry in report.entries], strict=True)}
    assert len(columns) == 1
    assert [line for line in lines if line.startswith("note: ")] == [f"note: {note}" for note in report.notes]
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bn", []),
        ("sync-bn", []),
        ("frozen-bn", []),
        ("gn", ["became gn"]),
        ("none", ["became none", "nothing normalizes"]),
        ("gn+ws", ["2 convolutions compute", "became gn"]),
        ("bcn-micro+ws", ["2 convolutions compute", "became bcn-micro", "recalibrate"]),
        ("bn+ws", ["2 convolutions compute", "recalibrate"]),
        ("bcn-micro", ["became bcn-micro"]),
    ],
)
def test_notes_say_what_of_the_function_changed(name, expected):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    _, report = bl.convert(model, name, example=EXAMPLE)
    assert len(report.notes) == len(expected)
    assert all(part in note for part, note in zip(expected, report.notes, strict=True))


def test_reports_are_values():
    first, second = (bl.convert(network(), "gn", example=EXAMPLE)[1] for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
    assert first != bl.convert(network(), "gn")[1]


words = st.text(st.characters(categories=["Ll", "Nd"], include_characters="."), min_size=1, max_size=12)
entries = st.builds(
    Entry,
    name=words,
    action=st.sampled_from(["replaced", "kept", "skipped"]),
    was=words,
    now=words,
    detail=words | st.just(""),
)


@given(entries=st.lists(entries, max_size=6), notes=st.lists(words, max_size=2))
def test_any_report_prints_one_line_per_entry_and_note_and_counts_them(entries, notes):
    report = ConversionReport(normalizer="gn", found_by="structure", entries=tuple(entries), notes=tuple(notes))
    lines = str(report).splitlines()
    assert len(lines) == 3 + len(entries) + (1 + len(notes) if notes else 0)
    counts = [len(report.replaced), len(report.kept), len(report.skipped)]
    assert sum(counts) == len(entries)
    assert lines[0].startswith("gn: {} layers replaced, {} kept, {} skipped".format(*counts))
