import contextlib
import random
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from batchless.data import video_files
from batchless.data.video_files import clip_files, read_clip
from small_clips import numbered, write_frames, write_video


def everything(length):
    return range(length)


def numbers(clip):
    """Which frames they are, by their grey value."""
    return [round(image.float().mean().item() / 8) for image in clip.images]


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.mkv", "a.mov"])
def test_the_frames_of_a_file_are_found_by_their_number(tmp_path, name):
    path = write_video(tmp_path / name, numbered(20))
    clip = read_clip(path, everything)
    assert (clip.length, clip.damaged, clip.images.dtype, clip.images.shape) == (
        20,
        False,
        torch.uint8,
        (20, 3, 24, 32),
    )
    assert numbers(clip) == list(range(20))
    assert numbers(read_clip(path, lambda length: (17, 3, 3, length - 1))) == [17, 3, 3, 19]


def test_a_codec_that_reorders_frames(tmp_path):
    path = write_video(tmp_path / "a.mp4", numbered(20), codec="libx264")
    assert numbers(read_clip(path, everything)) == list(range(20))


def test_a_folder_of_frames_is_read_in_the_order_of_its_numbers(tmp_path):
    folder = write_frames(tmp_path / "clip", numbered(12))
    (folder / "notes.txt").write_text("no picture")
    clip = read_clip(folder, everything)
    assert numbers(clip) == list(range(12))
    assert numbers(read_clip(folder, lambda length: (10, length - 1))) == [10, 11]


def test_a_phones_video_is_turned_upright(tmp_path):
    frames = [np.zeros((24, 32, 3), np.uint8) for _ in range(3)]
    for frame in frames:
        frame[:8, :8] = 250  # top left
    path = write_video(tmp_path / "a.mp4", frames)
    content = bytearray(path.read_bytes())
    # The matrix of the track header: a quarter turn clockwise, as phones write it.
    at = content.index(b"tkhd") + 4 + 4 + 20 + 16
    content[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 24 << 16, 0, 1 << 30)
    path.write_bytes(content)
    image = read_clip(path, everything).images[0].float().mean(0)
    assert image.shape == (32, 24)
    assert image[:6, -6:].mean() > 200, "what was top left is now top right"
    assert image[:6, :6].mean() < 50


def test_a_truncated_file_gives_what_it_has_and_says_so(tmp_path):
    path = write_video(
        tmp_path / "a.avi", [np.random.default_rng(i).integers(0, 255, (24, 32, 3), np.uint8) for i in range(20)]
    )
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    clip = read_clip(path, everything)
    assert clip.damaged
    assert 0 < clip.length < 20
    assert len(clip.images) == clip.length


def test_flipped_bytes_are_never_more_than_one_line(tmp_path):
    content = write_video(tmp_path / "a.avi", numbered(20)).read_bytes()
    for seed in range(30):
        damaged, rng = bytearray(content), random.Random(seed)
        for _ in range(1 + seed * 3):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path = tmp_path / "damaged.avi"
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError), naming(path):
            assert len(read_clip(path, lambda length: (0, length - 1)).images) == 2


@contextlib.contextmanager
def naming(path):
    """A ValueError in the block must be one line that begins with the file."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith(str(path)) or "\n" in str(error):
            raise AssertionError(str(error)) from error
        raise


def audio_only(path):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def header_only(path):
    frames = write_video(path, numbered(4))
    content = frames.read_bytes()
    path.write_bytes(content[: content.index(b"movi") + 4])


def playlist(path):
    """FFmpeg would open any file that it names."""
    write_video(path.with_name("secret.mp4"), numbered(4))
    path.write_text("ffconcat version 1.0\nfile secret.mp4\n")


HOSTILE = {
    "empty": (lambda path: path.write_bytes(b""), "cannot be read as a video"),
    "text": (lambda path: path.write_text("not a video"), "cannot be read as a video"),
    "random": (lambda path: path.write_bytes(random.Random(0).randbytes(4000)), "cannot be read as a video"),
    "audio": (audio_only, "no video stream"),
    "no frame": (header_only, "not one frame is in it"),
    "playlist": (playlist, "cannot be read as a video"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_clip_is_one_line_that_names_it(tmp_path, kind):
    make, message = HOSTILE[kind]
    path = tmp_path / "clip.avi"
    make(path)
    with pytest.raises(ValueError, match=message) as caught:
        read_clip(path, everything)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_frames_that_are_too_large_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", numbered(4))
    monkeypatch.setattr(video_files, "_MOST_PIXELS", 32 * 24 - 1)
    with pytest.raises(ValueError, match="frames of 32x24 pixels"):
        read_clip(path, everything)


def test_a_film_is_no_clip(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", numbered(20))
    monkeypatch.setattr(video_files, "_LONGEST_SECONDS", 1)
    with pytest.raises(ValueError, match="lasts 2 s"):
        read_clip(path, everything)


def test_missing_and_uneven_clips_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.mp4: there is no such video file"):
        read_clip(tmp_path / "gone.mp4", everything)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no picture in this folder"):
        read_clip(tmp_path / "empty", everything)
    folder = write_frames(tmp_path / "clip", numbered(3))
    Image.new("RGB", (5, 5)).save(folder / "4.png")
    with pytest.raises(ValueError, match="clip: its frames have several sizes"):
        read_clip(folder, everything)
    (folder / "2.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"2\.png: cannot be read as an image"):
        read_clip(folder, lambda length: (1,))


def test_the_clips_of_a_class_folder(tmp_path):
    write_video(tmp_path / "b.mp4", numbered(2))
    write_video(tmp_path / "deeper" / "a.avi", numbered(2))
    write_frames(tmp_path / "frames", numbered(2))
    (tmp_path / ".hidden.mp4").touch()
    (tmp_path / "notes.txt").touch()
    assert clip_files(tmp_path) == [str(tmp_path / name) for name in ("b.mp4", "deeper/a.avi", "frames")]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="none: no clip in this class folder"):
        clip_files(tmp_path / "none")


REAL = {
    "demo_demo.mp4": (280, 256, 340),
    "tests_data_rawvideo_dataset_part_0.mp4": (32, 256, 340),
    "tests_data_test.avi": (164, 240, 320),
    "tests_data_test.mp4": (300, 256, 340),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files(real_data, name):
    if not (real_data / "clips").is_dir():
        pytest.skip(f"needs the clips in {real_data / 'clips'}")
    length, height, width = REAL[name]
    clip = read_clip(real_data / "clips" / name, lambda length: (0, length // 2, length - 1))
    assert (clip.length, clip.damaged) == (length, False)
    assert clip.images.shape == (3, 3, height, width)
    assert not torch.equal(clip.images[0], clip.images[2])
