"""Image preprocessing against transformers' own PIL processors, pixel for pixel."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from qlx.errors import CorruptCheckpoint, InputRefused, Unsupported
from qlx.inputs import PREPROCESSOR_FILE, ImagePreprocessor, as_image, open_image

SIZES = [(48, 32), (33, 97), (64, 64), (20, 30)]


@pytest.fixture(scope="module")
def pictures():
    random = np.random.default_rng(0)
    arrays = [
        random.integers(0, 256, (height, width, 3)).astype(np.uint8) for height, width in SIZES
    ]
    return [Image.fromarray(array) for array in arrays] + [Image.fromarray(arrays[0]).convert("L")]


def _vit(size):
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": size, "width": size}, do_convert_rgb=True)


def _deit():
    from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil

    return DeiTImageProcessorPil(
        size={"height": 40, "width": 40}, crop_size={"height": 32, "width": 32}, do_convert_rgb=True
    )


def _dinov2():
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    return BitImageProcessorPil(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, do_convert_rgb=True
    )


@pytest.mark.parametrize(
    "make",
    [lambda: _vit(32), lambda: _vit(17), _deit, _dinov2],
    ids=["vit", "vit17", "deit", "dinov2"],
)
def test_same_pixels_as_transformers(make, pictures, tmp_path):
    theirs = make()
    theirs.save_pretrained(tmp_path)
    ours = ImagePreprocessor.from_directory(tmp_path)
    expected = np.stack([np.asarray(theirs(picture)["pixel_values"][0]) for picture in pictures])
    np.testing.assert_array_equal(ours(pictures), expected)
    other = dataclasses.replace(ours, resample=2 if ours.resample == 3 else 3)
    assert np.abs(other(pictures) - expected).max() > 0.01


@pytest.mark.parametrize(
    "preprocessor",
    [
        ImagePreprocessor(),
        ImagePreprocessor(size=40, crop=(32, 32), resample=3, kind="BitImageProcessor"),
        ImagePreprocessor(size=None, mean=None, std=None, rescale=None),
    ],
)
def test_written_file_reads_back(preprocessor, tmp_path):
    (tmp_path / PREPROCESSOR_FILE).write_bytes(preprocessor.to_bytes())
    assert ImagePreprocessor.from_directory(tmp_path) == preprocessor


def test_written_file_works_in_transformers(tmp_path, pictures):
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    ours = ImagePreprocessor(size=(16, 24))
    (tmp_path / PREPROCESSOR_FILE).write_bytes(ours.to_bytes())
    theirs = ViTImageProcessorPil.from_pretrained(tmp_path)
    expected = np.asarray(theirs(pictures[0])["pixel_values"][0])
    np.testing.assert_array_equal(ours(pictures[:1])[0], expected)


def test_arrays_and_paths_are_images_too(tmp_path, pictures):
    pictures[0].save(tmp_path / "a.png")
    ours = ImagePreprocessor(size=(16, 16))
    expected = ours(pictures[:1])
    np.testing.assert_array_equal(ours([np.asarray(pictures[0])]), expected)
    np.testing.assert_array_equal(ours([tmp_path / "a.png"]), expected)


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"size": {"height": -1, "width": 4}, "do_normalize": False}, CorruptCheckpoint),
        ({"size": {"height": 10**9, "width": 4}, "do_normalize": False}, CorruptCheckpoint),
        ({"size": {"longest_edge": 4}, "do_normalize": False}, CorruptCheckpoint),
        ({"image_mean": [0.5], "image_std": [0.5]}, CorruptCheckpoint),
        ({}, CorruptCheckpoint),
        ([], CorruptCheckpoint),
        ({"do_pad": True}, Unsupported),
    ],
)
def test_wrong_configurations_are_refused(config, error, tmp_path):
    (tmp_path / PREPROCESSOR_FILE).write_text(json.dumps(config))
    with pytest.raises(error, match=PREPROCESSOR_FILE):
        ImagePreprocessor.from_directory(tmp_path)


def test_missing_configuration_is_not_guessed(tmp_path):
    with pytest.raises(InputRefused, match="missing"):
        ImagePreprocessor.from_directory(tmp_path)


def test_not_an_image_is_refused(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(b"no picture")
    with pytest.raises(InputRefused, match=r"x\.png"):
        open_image(path)
    with pytest.raises(InputRefused):
        ImagePreprocessor()([np.zeros((4, 4, 3), np.float32)])


def test_huge_image_is_refused_before_decoding(monkeypatch):
    from qlx.inputs import images

    buffer = io.BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, "PNG")
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    buffer.seek(0)
    with pytest.raises(InputRefused, match="too many"):
        open_image(buffer)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_of_grey_are_scaled(kind, pictures):
    """Pillow's own conversion cuts them off: nearly everything becomes white."""
    grey = np.asarray(pictures[-1])
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    file = io.BytesIO()
    wide.save(file, kind)
    for found in (open_image(io.BytesIO(file.getvalue())), as_image(wide)):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(pictures[-1].convert("RGB")))
    assert np.asarray(wide.convert("RGB")).mean() > 250  # the control


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_values_without_a_white_are_refused(dtype):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), 3, dtype)).save(file, "TIFF")
    with pytest.raises(InputRefused, match="no known white"):
        open_image(file)
