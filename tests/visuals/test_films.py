"""Videos play, with captions and intended paths in them."""

import time

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import pytest

from trm_helpers.visuals import films


def test_a_path_adds_a_quarter_of_what_each_command_aims_at():
    actions = np.array([[1, 0, 0, 0.5, 0, 0, -1], [0, -0.4, 0.8, 0, 0, 0, 1]])
    path = films.intended_path(np.array([0.1, 0.2, 0.3]), actions)
    np.testing.assert_allclose(path, [[0.1125, 0.2, 0.3], [0.1125, 0.195, 0.31]])


def test_dots_are_orange_until_the_next_look_then_blue():
    picture = np.zeros((40, 60, 3), np.uint8)
    pixels = np.array([[10, 20], [30, 20], [np.nan, 5], [50, 10], [70, 10]])
    drawn = films.draw_path(picture, pixels, executed=1)
    assert picture.max() == 0  # the frame itself is left alone
    assert drawn[20, 10].tolist() == [0xE6, 0x9F, 0x00]
    assert drawn[20, 30].tolist() == drawn[10, 50].tolist() == [0x56, 0xB4, 0xE9]
    assert drawn.any(axis=-1).sum() <= 3 * 25


def test_a_grid_frames_each_film_by_its_outcome_once_it_has_ended(tmp_path):
    for name, length, grey in (("a", 3, 60), ("b", 5, 120), ("c", 2, 180)):
        frame = np.full((300, 512, 3), grey, np.uint8)
        frame[:, 256:] = 250  # the wrist camera
        films.write_video(tmp_path / f"{name}.mp4", [frame] * length)
    path = films.write_grid(tmp_path / "grid.mp4", [tmp_path / f"{n}.mp4" for n in "abc"],
                            ["init state 0", "init state 1", "init state 2"], [True, False, True])
    with imageio.get_reader(path) as reader:
        read = list(reader.iter_data())
    assert len(read) == 5
    band = read[0].shape[0] // 2 - 192
    assert read[0].shape == (2 * (192 + band), 2 * 192, 3)
    assert band == 27 and read[0][:band].max() > 200  # white letters

    def edge(frame, row, column):
        """Colour on the left edge of a tile, halfway down."""
        return frame[row * (192 + band) + band + 96, column * 192 + 2].astype(int)

    green, red = np.array([0x00, 0x9E, 0x73]), np.array([0xD5, 0x5E, 0x00])
    for column, grey in enumerate((60, 120)):
        assert abs(read[0][band + 96, 192 * column + 96].astype(int) - grey).max() < 20
    assert abs(edge(read[1], 0, 0) - 60).max() < 20 < abs(edge(read[2], 0, 0) - 60).max()
    for frame in read[2:]:
        assert abs(edge(frame, 0, 0) - green).max() < 60
        assert abs(edge(frame, 1, 0) - green).max() < 60
    assert abs(edge(read[4], 0, 1) - red).max() < 60
    assert read[4][-40:, -40:].max() < 20  # no film
    path = films.write_grid(tmp_path / "row.mp4", [tmp_path / f"{n}.mp4" for n in "abc"],
                            ["a", "b", "c"], [True] * 3, columns=3)
    with imageio.get_reader(path) as reader:
        assert reader.get_next_data().shape == (192 + band + 1, 3 * 192, 3)  # even


def test_labels_of_one_line_and_of_several_share_a_grid(tmp_path):
    film = films.write_video(tmp_path / "a.mp4", [np.full((320, 640, 3), 80, np.uint8)] * 2)
    labels = ["task 3", "put the wine bottle on top of the cabinet"]
    grid = films.write_grid(tmp_path / "grid.mp4", [film] * 2, labels, [True, False])
    with imageio.get_reader(grid) as reader:
        height, width, _ = reader.get_next_data().shape
    assert height >= 192 + 2 * (27 - films._MARGIN) + films._MARGIN and width == 2 * 192
    with pytest.raises(ValueError, match="frames is empty"):
        films.write_grid(tmp_path / "none.mp4", [], [], [])


def test_a_film_frame_has_a_large_view_the_policys_own_text_time_and_an_end():
    main, own = np.full((320, 320, 3), 200, np.uint8), np.full((64, 64, 3), 90, np.uint8)
    views = {"agent view": own, "wrist camera": own // 2}
    half = films.film_frame(main, views, ["pick up the bowl " * 3, "reach"], 0.5)
    assert half.shape == (320, 640, 3) and (half[:, :320] == 200).all()
    assert (half[160:, 320:480] == 90).all() and (half[160:, 480:] == 45).all()
    text = half[:110, 320:]
    assert text.max() > 200 and text[:, -9:].max() == 0  # white, within the margin
    bar = half[129, 328:632]
    assert (bar[:150] == [0x56, 0xB4, 0xE9]).all() and (bar[155:] == 0x44).all()
    for success, colour in ((True, [0x00, 0x9E, 0x73]), (False, [0xD5, 0x5E, 0x00])):
        end = films.film_frame(main, views, [], 1, "success after 3.6 s", success)
        assert (end[3, :320] == colour).all() and (end[61:, :320] == 200).all()
        assert (end[20:40, 8:250] == 0).all(axis=-1).any()  # black letters


def test_video_plays_with_even_sides(tmp_path):
    frames = [np.full((33, 47, 3), 20 * i, np.uint8) for i in range(10)]
    path = films.write_video(tmp_path / "videos" / "episode.mp4", iter(frames), fps=20)
    with imageio.get_reader(path) as reader:
        meta, read = reader.get_meta_data(), list(reader.iter_data())
    assert (meta["codec"], meta["pix_fmt"].split("(")[0], meta["fps"]) == ("h264", "yuv420p", 20)
    assert meta["size"] == (48, 34)
    whole = path.read_bytes()
    assert 0 < whole.index(b"moov") < whole.index(b"mdat")  # a browser plays it while it loads
    assert len(read) == 10
    for i, frame in enumerate(read):
        assert abs(frame.astype(float) - 20 * i).max() < 6  # lossy
    assert [file.name for file in path.parent.iterdir()] == ["episode.mp4"]


@pytest.mark.parametrize(
    ("name", "frames", "message"),
    [
        ("a.mp4", [], "frames is empty"),
        ("a.mp4", [np.zeros((8, 8, 3), np.uint8), np.zeros((8, 6, 3), np.uint8)], "frame 1 has"),
        ("a.mp4", [np.zeros((8, 8, 3))], "frame 0 has shape .* float64"),
        ("a.gif", [np.zeros((8, 8, 3), np.uint8)], "ends in .mp4"),
    ],
)
def test_video_refuses_and_leaves_nothing(tmp_path, name, frames, message):
    with pytest.raises(ValueError, match=message):
        films.write_video(tmp_path / name, frames)
    assert list(tmp_path.iterdir()) == []


def test_a_film_that_the_disk_did_not_take_whole_is_refused(tmp_path, monkeypatch):
    """ffmpeg as on a disk that is full when it writes the end, which the writer does not notice."""
    cut = tmp_path / "bin" / "ffmpeg"
    cut.parent.mkdir()
    cut.write_text(f"""#!/bin/sh
{imageio_ffmpeg.get_ffmpeg_exe()} "$@"
for last in "$@"; do :; done
case "$last" in *.mp4) truncate --size=900 "$last";; esac
""")
    cut.chmod(0o755)
    frames = [np.full((32, 48, 3), 20 * i, np.uint8) for i in range(10)]
    before = films.write_video(tmp_path / "videos" / "a.mp4", frames).read_bytes()
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(cut))
    with pytest.raises(OSError, match="a.mp4 has 0 frames of 10; is the disk full"):
        films.write_video(tmp_path / "videos" / "a.mp4", frames)
    assert [file.name for file in (tmp_path / "videos").iterdir()] == ["a.mp4"]
    assert (tmp_path / "videos" / "a.mp4").read_bytes() == before


def test_frames_are_counted_by_an_ffmpeg_that_counts_no_copied_ones(tmp_path, monkeypatch):
    """As version 7 of imageio-ffmpeg 0.6, which Kaggle has."""
    script = tmp_path / "ffmpeg"
    script.write_text(f"""#!/bin/sh
case "$*" in *copy*) exec 2> /dev/null;; esac
exec {imageio_ffmpeg.get_ffmpeg_exe()} "$@"
""")
    script.chmod(0o700)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(script))
    film = films.write_video(tmp_path / "x.mp4", np.zeros((5, 32, 32, 3), np.uint8))
    assert films._count_frames(film) == 5


def test_an_ffmpeg_that_hangs_is_given_up(tmp_path, monkeypatch):
    hanging = tmp_path / "bin" / "ffmpeg"
    hanging.parent.mkdir()
    hanging.write_text("#!/bin/sh\nexec sleep 600\n")
    hanging.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(hanging))
    monkeypatch.setattr(films, "_PATIENCE", 0.5)
    frames = [np.zeros((480, 640, 3), np.uint8)] * 10  # more than a pipe takes
    began = time.monotonic()
    for given in (frames, frames[:1], [np.zeros((8, 8, 3), np.uint8)]):
        with pytest.raises(OSError, match="killed, or no frame in 0.5 s"):
            films.write_video(tmp_path / "videos" / "a.mp4", given)
    assert time.monotonic() - began < 20 and not list((tmp_path / "videos").iterdir())
