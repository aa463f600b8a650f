"""TrackNet's layout: what is read, what is refused with file and line, and what is held out."""

import numpy as np
import pytest
from PIL import Image

from qlx.errors import InputRefused
from qlx.inputs import ImagePreprocessor, eval_batches, keypoint_batch, load_split, split_digest
from qlx.inputs.tracknet import read_clips
from qlx.recipe import DataSection
from tests.clips_support import draw_clips, write_labels

HEADER = "file name,visibility,x-coordinate,y-coordinate,status\n"


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return draw_clips(tmp_path_factory.mktemp("clips"), clips=5, frames=6, absent=2)


def section(path, **fields):
    return DataSection(source="tracknet", path=str(path), **fields)


def test_frames_and_places(clips):
    first, *_ = found = read_clips(clips)
    assert [clip.directory.name for clip in found] == ["Clip2", "Clip4", "Clip1", "Clip3", "Clip5"]
    assert [path.name for path in first.frames] == [f"{at:04}.png" for at in range(6)]
    assert first.places[:, 2].tolist() == [1, 1, 1, 1, 0, 0]
    x, y, _ = first.places[0]
    pixels = np.asarray(Image.open(first.frames[0]), float)
    ball = np.linalg.norm(pixels - (230, 240, 90), axis=-1) < 60
    row, column = np.argwhere(ball).mean(axis=0)
    assert (column, row) == pytest.approx((x, y), abs=0.6)


def test_clips_in_the_order_of_their_numbers(tmp_path):
    draw_clips(tmp_path, clips=12, frames=1)
    assert [clip.directory.name for clip in read_clips(tmp_path)][:4] == [
        "Clip2",
        "Clip4",
        "Clip6",
        "Clip8",
    ]
    assert read_clips(tmp_path)[4].directory.name == "Clip10"


def test_a_clip_is_on_one_side_only(clips):
    for seed in range(4):
        data = section(clips, eval_fraction=0.4, seed=seed)
        sides = [load_split(data, side) for side in ("train", "eval")]
        parents = [{item[-1].parent for item in side.frames} for side in sides]
        assert [len(names) for names in parents] == [3, 2]
        assert not parents[0] & parents[1]
    assert len(sides[0]) == 18


def test_three_frames_end_with_the_labelled_one(clips):
    split = load_split(section(clips, frames=3), "train")
    names = [[path.name for path in item] for item in split.frames[:4]]
    assert names == [
        ["0000.png", "0000.png", "0000.png"],
        ["0000.png", "0000.png", "0001.png"],
        ["0000.png", "0001.png", "0002.png"],
        ["0001.png", "0002.png", "0003.png"],
    ]
    assert len({path.parent for path in split.frames[6]}) == 1


def test_a_limit_is_spread_over_the_clips(clips):
    whole = load_split(section(clips, eval_fraction=0.2), "train")
    some = load_split(section(clips, eval_fraction=0.2, train_limit=8), "train")
    assert len(whole) == 24
    assert len(some) == 8
    assert {item[-1].parent for item in some.frames} == {item[-1].parent for item in whole.frames}
    assert split_digest(some) != split_digest(whole)
    assert split_digest(whole) == split_digest(
        load_split(section(clips, eval_fraction=0.2), "train")
    )


def test_pixels_of_three_frames_and_of_one(clips):
    """Stacked along the channels, each as the one-frame preprocessing makes it."""
    split = load_split(section(clips, frames=3), "train")
    three = keypoint_batch(split, ImagePreprocessor(size=(24, 40), frames=3), [0, 3])
    assert three.inputs["pixel_values"].shape == (2, 9, 24, 40)
    one = ImagePreprocessor(size=(24, 40))
    for row, item in zip(
        three.inputs["pixel_values"], (split.frames[0], split.frames[3]), strict=True
    ):
        np.testing.assert_array_equal(row, np.concatenate(list(one(item))))
    assert three.labels.shape == (2, 1, 5)
    assert three.labels[0, 0, 3:].tolist() == [96, 54]
    np.testing.assert_array_equal(three.labels[:, :, :3], split.places[[0, 3]])


def test_the_number_of_frames_is_part_of_the_preprocessing(clips, tmp_path):
    prepare = ImagePreprocessor(size=(24, 40), frames=3)
    (tmp_path / "preprocessor_config.json").write_bytes(prepare.to_bytes())
    assert ImagePreprocessor.from_directory(tmp_path) == prepare
    batches = list(eval_batches(section(clips, frames=3, eval_fraction=0.2), tmp_path, size=4))
    assert [batch.inputs["pixel_values"].shape[0] for batch in batches] == [4, 2]
    assert b"num_frames" not in ImagePreprocessor(size=(24, 40)).to_bytes()
    image = Image.new("RGB", (20, 20), "red")
    still = prepare([image])
    np.testing.assert_array_equal(still, prepare([[image] * 3]))
    with pytest.raises(InputRefused, match="sees 3 frames at once, not 2"):
        prepare([[image] * 2])


def test_frames_are_not_decoded_before_they_are_needed(clips):
    """Only the first is looked at; what is wrong with another shows when it is its turn."""
    last = read_clips(clips)[-1].frames[-1]
    content = last.read_bytes()
    last.write_bytes(b"no image")
    try:
        split = load_split(section(clips), "train")
        assert (
            any(last in item for item in split.frames)
            or last in load_split(section(clips), "eval").frames[-1]
        )
        with pytest.raises(InputRefused, match=last.name):
            ImagePreprocessor(size=(8, 8))([last])
    finally:
        last.write_bytes(content)


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ("0000.png,1,4,x,0\n", r"Label.csv: line 2: y-coordinate 'x' is not a place"),
        ("0000.png,0,,,\n0001.png,1,,,0\n", r"line 3: x-coordinate '' is not a place"),
        ("0000.png,1,-3,5,0\n", r"line 2: x-coordinate '-3'"),
        ("0000.png,1,nan,5,0\n", r"line 2: x-coordinate 'nan'"),
        ("0000.png,4,3,5,0\n", r"line 2: visibility '4' is not one of 0, 1, 2, 3"),
        ("9999.png,1,3,5,0\n", r"line 2: no frame '9999.png'"),
        ("../Clip1/0000.png,1,3,5,0\n", r"line 2: no frame"),
        ("0000.png,1,3\n", r"line 2: y-coordinate ''"),
        ("0000.png,1,3,5,0\n0000.png,1,3,5,0\n", "labels 0000.png twice"),
        ("", "labels no frame"),
    ],
)
def test_a_wrong_label_is_refused_with_its_line(tmp_path, rows, match):
    draw_clips(tmp_path, clips=1, frames=2)
    (file,) = tmp_path.glob("game*/Clip*/Label.csv")
    file.write_text(HEADER + rows)
    with pytest.raises(InputRefused, match=match):
        read_clips(tmp_path)


def test_a_missing_column_and_missing_clips(tmp_path):
    with pytest.raises(InputRefused, match="no such directory"):
        read_clips(tmp_path / "nowhere")
    with pytest.raises(InputRefused, match="no clips"):
        read_clips(tmp_path)
    draw_clips(tmp_path, clips=1, frames=2)
    with pytest.raises(InputRefused, match="cannot be divided"):
        load_split(section(tmp_path), "train")
    (file,) = tmp_path.glob("game*/Clip*/Label.csv")
    file.write_text("name,visibility\n0000.png,0\n")
    with pytest.raises(InputRefused, match="line 1: the column 'file name' is missing"):
        read_clips(tmp_path)


def test_a_file_from_a_spreadsheet_is_read(tmp_path):
    """With a byte order mark, spaces after commas and Windows line ends."""
    draw_clips(tmp_path, clips=1, frames=2)
    (file,) = tmp_path.glob("game*/Clip*/Label.csv")
    text = HEADER.replace(",", ", ") + "0000.png, 1, 3, 5, 0\n0001.png, 0, , ,\n"
    file.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert read_clips(tmp_path)[0].places.tolist() == [[3, 5, 1], [0, 0, 0]]
    write_labels(file, [("0000.png", 1, 3, 5, 0)])
    assert len(read_clips(tmp_path)[0]) == 1
