import json
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchless.data.clip_sampling import FrameSampling
from batchless.data.clips import ClipFiles, ClipSubset, MiddleFrames, open_clips
from small_clips import CLASSES, numbered, write_clips, write_frames, write_video

LENGTHS, FRAMES = st.integers(1, 200), st.integers(1, 32)
SAMPLINGS = st.builds(
    FrameSampling,
    frames=FRAMES,
    way=st.sampled_from(["segments", "dense"]),
    stride=st.integers(1, 5),
    views=st.integers(1, 4),
)


@given(SAMPLINGS, LENGTHS, st.integers(0, 99))
def test_positions_are_in_the_clip_and_rise(sampling, length, seed):
    chosen = [sampling.for_training(length, Random(seed)), *sampling.for_evaluation(length)]
    assert len(chosen) == 1 + sampling.views
    for positions in chosen:
        assert len(positions) == sampling.frames
        assert list(positions) == sorted(positions)
        assert positions[0] >= 0
        assert positions[-1] < length
        if length >= sampling.span:
            assert len(set(positions)) == sampling.frames


@given(LENGTHS, FRAMES, st.integers(0, 99))
def test_there_is_one_frame_in_every_segment(length, frames, seed):
    sampling = FrameSampling(frames=frames)
    for number, position in enumerate(sampling.for_training(length, Random(seed))):
        first = length * number // frames
        assert first <= position <= max(length * (number + 1) // frames - 1, first)
    # The middle is taken of the segment as it is, not of whole frames: [number, number + 1) * length / frames.
    for positions in sampling.for_evaluation(length):
        for number, position in enumerate(positions):
            assert length * number // frames <= position
            assert position * frames < length * (number + 1)


@given(LENGTHS, FRAMES)
def test_the_middle_of_the_segments_is_that_of_the_authors(length, frames):
    """ops/dataset.py of TSM, `_get_test_indices`."""
    tick = length / float(frames)
    expected = [int(tick / 2.0 + tick * number) for number in range(frames)]
    (found,) = FrameSampling(frames=frames).for_evaluation(length)
    # Where a middle is a whole number, the order of the operations may round it either way.
    assert all(abs(a - b) <= 1 for a, b in zip(found, expected, strict=True))
    assert found == tuple(length * (2 * number + 1) // (2 * frames) for number in range(frames)) or length % frames


def test_every_frame_comes_up_in_training():
    sampling = FrameSampling(frames=4)
    seen = {position for seed in range(200) for position in sampling.for_training(18, Random(seed))}
    assert seen == set(range(18))


def test_dense_windows_are_spread_over_the_clip():
    sampling = FrameSampling(frames=4, way="dense", stride=2, views=2)
    assert sampling.span == 7
    assert sampling.for_evaluation(19) == ((3, 5, 7, 9), (9, 11, 13, 15))
    assert {sampling.for_training(8, Random(seed))[0] for seed in range(50)} == {0, 1}


def test_settings_out_of_range():
    for wrong in ({"frames": 0}, {"stride": 0}, {"views": 0}, {"way": "all"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            FrameSampling(**wrong)


def first(length):
    return (0,)


def test_folders_of_files_and_of_frames(tmp_path):
    root = write_clips(tmp_path / "clips", train=4, test=2)
    train, test = open_clips(root, "train"), open_clips(str(root), "test")
    assert train.classes == test.classes == CLASSES
    assert [train.label(index) for index in range(len(train))] == [0, 0, 1, 1]
    assert (len(train), len(test)) == (4, 2)
    assert train.source(0) == str(root / "train" / "left" / "000.mp4")
    assert test.clip(1, first).images.shape == (1, 3, 16, 16)
    assert MiddleFrames(clips=train).image(0).shape == (3, 16, 16)
    assert ClipSubset(dataset=train, indices=(3, 0)).label(0) == 1


@pytest.mark.parametrize(("separator", "named"), [(" ", False), (",", False), ("\t", True), (", ", True)])
def test_lists(tmp_path, separator, named):
    write_video(tmp_path / "videos of one day" / "a,b.mp4", numbered(3))
    write_frames(tmp_path / "frames", numbered(3))
    labels = ("run", "jump") if named else ("1", "0")
    (tmp_path / "train.csv").write_text(
        f"videos of one day/a,b.mp4{separator}{labels[0]}\nframes{separator}{labels[1]}\n"
    )
    (tmp_path / "val.csv").write_text(f"{tmp_path / 'frames'}{separator}{labels[1]}\n\n")
    train, test = open_clips(tmp_path, "train"), open_clips(tmp_path, "test")
    assert train.classes == test.classes == (("jump", "run") if named else ("0", "1"))
    assert [train.label(0), train.label(1), test.label(0)] == [1, 0, 0]
    assert [train.clip(0, first).length, test.clip(0, first).length] == [3, 3]
    (tmp_path / "classes.txt").write_text("walk\nsit\nstand\n")
    assert open_clips(tmp_path, "train").classes == (("jump", "run") if named else ("walk", "sit", "stand"))


def test_lists_in_disorder_are_named(tmp_path):
    (tmp_path / "train.csv").write_text("a.mp4 0\nb.mp4 1\n")
    (tmp_path / "test.csv").write_text("c.mp4 2\n")
    with pytest.raises(ValueError, match=r"test\.csv, clip 1 \(c\.mp4\): label '2' is none of the 2 classes"):
        open_clips(tmp_path, "test")
    (tmp_path / "test.csv").write_text("c.mp4\n")
    with pytest.raises(ValueError, match=r"test\.csv, line 1: 'c\.mp4' is not a path"):
        open_clips(tmp_path, "test")
    (tmp_path / "test.csv").write_text("\n")
    with pytest.raises(ValueError, match=r"test\.csv: no clip in it"):
        open_clips(tmp_path, "test")
    (tmp_path / "test.csv").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"test\.csv cannot be read"):
        open_clips(tmp_path, "test")


def write_something_v1(root):
    folder = root / "20bn-something-something-v1"
    for number in (1, 2, 3):
        write_frames(folder / str(number), numbered(2 + number))
    name = "something-something-v1"
    (root / f"{name}-labels.csv").write_text("Turning something\nMoving something, then stopping\n")
    (root / f"{name}-train.csv").write_text("1;Turning something\n2;Moving something, then stopping\n")
    (root / f"{name}-validation.csv").write_text("3;Turning something\n")


def write_something_v2(root, prefix="something-something-v2-", below="."):
    for number in (1, 2, 3):
        write_video(root / "20bn-something-something-v2" / f"{number}.webm", numbered(2 + number), codec="libvpx-vp9")
    labels = root / below
    labels.mkdir(exist_ok=True)
    (labels / f"{prefix}labels.json").write_text(
        json.dumps({"Moving something, then stopping": "0", "Turning something": "1"})
    )
    entries = [
        {"id": "1", "label": "turning a cup", "template": "Turning [something]"},
        {"id": "2", "template": "Moving [something], then stopping"},
        {"id": "3", "template": "Turning [something]"},
    ]
    (labels / f"{prefix}train.json").write_text(json.dumps(entries[:2]))
    (labels / f"{prefix}validation.json").write_text(json.dumps(entries[2:]))


SOMETHING = {
    "v1": write_something_v1,
    "v2": write_something_v2,
    "v2 of today": lambda root: write_something_v2(root, prefix="", below="labels"),
}


@pytest.mark.parametrize("kind", SOMETHING)
def test_something_something(tmp_path, kind):
    SOMETHING[kind](tmp_path)
    train, test = open_clips(tmp_path, "train"), open_clips(tmp_path, "test")
    assert train.classes == test.classes == ("Moving something, then stopping", "Turning something")
    assert [train.label(0), train.label(1), test.label(0)] == [1, 0, 1]
    assert [train.clip(0, first).length, train.clip(1, first).length, test.clip(0, first).length] == [3, 4, 5]


def test_something_something_in_disorder_is_named(tmp_path):
    write_something_v2(tmp_path)
    train = tmp_path / "something-something-v2-train.json"
    for content, message in (
        ("[{}]", "entry 1: no id and template"),
        ('[{"id": "1", "template": "Flying"}]', "entry 1: 'Flying' is not one of the classes"),
        ('[{"id": "../1", "template": "Turning [something]"}]', "'../1' is no name of a clip"),
        ("{}", "a list is expected"),
        ("[", "is no JSON"),
        ("[]", "no clip in it"),
    ):
        train.write_text(content)
        with pytest.raises(ValueError, match=message):
            open_clips(tmp_path, "train")
    (tmp_path / "something-something-v2-labels.json").write_text('{"a": "0", "b": "2"}')
    with pytest.raises(ValueError, match="the numbers of the 2 classes are not 0 to 1"):
        open_clips(tmp_path, "train")
    (tmp_path / "20bn-something-something-v2").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="no folder of clips"):
        open_clips(tmp_path, "train")


def test_what_is_no_dataset(tmp_path):
    with pytest.raises(ValueError, match="does not exist; name a folder"):
        open_clips(tmp_path / "gone", "train")
    with pytest.raises(ValueError, match="no known layout of clips"):
        open_clips(tmp_path, "train")
    with pytest.raises(ValueError, match="there are 'train' and 'test'"):
        open_clips(None, "val")
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "val" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match="train/a: no clip in this class folder"):
        open_clips(tmp_path, "train")


def test_a_clip_that_cannot_be_read_is_named():
    clips = ClipFiles(files=(("/nowhere/a.mp4", 0),), classes=("a",))
    with pytest.raises(ValueError, match=r"/nowhere/a\.mp4: there is no such video"):
        clips.clip(0, first)
