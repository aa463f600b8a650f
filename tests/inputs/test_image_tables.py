"""Labelled images in parquet files, as the library datasets writes them and otherwise."""

import io

import numpy as np
import pytest
from PIL import Image

from qlx.errors import CorruptCheckpoint, InputRefused
from qlx.inputs import as_image, load_split, split_digest
from qlx.recipe import DataSection

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def section(path, **fields):
    return DataSection(source="images", path=str(path), **fields)


def pictures(count, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, (9, 7, 3)).astype(np.uint8) for _ in range(count)]


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="png")
    return stream.getvalue()


def write(path, labels, *, image="image", label="label", seed=0, metadata=None):
    encoded = [png(each) for each in pictures(len(labels), seed)]
    table = arrow.table({image: encoded, label: labels})
    parquet.write_table(
        table if metadata is None else table.replace_schema_metadata(metadata), path
    )
    return path


def test_a_file_of_datasets_gives_pictures_and_names(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    shown = pictures(10)
    rows = {"image": [Image.fromarray(each) for each in shown], "label": [0, 1] * 5}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "all.parquet")
    data = section(tmp_path / "all.parquet", eval_fraction=0.2)
    train, held_out = load_split(data, "train"), load_split(data, "eval")
    assert train.classes == held_out.classes == ("cat", "dog")
    assert (len(train), len(held_out)) == (8, 2)
    assert not {*train.images} & {*held_out.images}
    found = {
        np.asarray(as_image(image)).tobytes(): label
        for image, label in zip(
            [*train.images, *held_out.images], [*train.labels, *held_out.labels], strict=True
        )
    }
    assert found == {each.tobytes(): at % 2 for at, each in enumerate(shown)}
    assert split_digest(train) == split_digest(load_split(data, "train")) != split_digest(held_out)


def test_a_directory_with_its_own_parts(tmp_path):
    write(tmp_path / "train-00000-of-00002.parquet", ["b", "a", "c"])
    write(tmp_path / "train-00001-of-00002.parquet", ["a"], seed=1)
    write(tmp_path / "test-00000-of-00001.parquet", ["c", "a"], seed=2)
    train, held_out = (load_split(section(tmp_path), part) for part in ("train", "eval"))
    assert train.classes == held_out.classes == ("a", "b", "c")
    rows = [*zip(pictures(3), "bac", strict=True), *zip(pictures(1, 1), "a", strict=True)]
    for split, known in ((train, rows), (held_out, zip(pictures(2, 2), "ca", strict=True))):
        found = {
            image: split.classes[label]
            for image, label in zip(split.images, split.labels, strict=True)
        }
        assert found == {png(picture): name for picture, name in known}
    write(tmp_path / "test-00000-of-00001.parquet", ["d", "a"], seed=2)
    with pytest.raises(InputRefused, match=r"test-00000.*class 'd' does not occur in the training"):
        load_split(section(tmp_path), "eval")


def test_numbers_without_names_and_other_column_names(tmp_path):
    file = write(tmp_path / "x.parquet", [0, 2, 1, 2], image="img", label="labels")
    split = load_split(section(file), "train")
    assert split.classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("labels", "fields", "message"),
    [
        ([0, 1], {"image": "picture"}, "has no column 'image' .it has picture, label"),
        ([0, 1], {"label": "kind"}, "has no column 'label'"),
        ([0, 0], {}, "two classes at least"),
        ([0, -1], {}, r"row 2: label is '-1'"),
        (["a", None], {}, r"row 2: label is 'None'"),
        ([0, 5], {"metadata": {"huggingface": "NAMES"}}, "label 5, but 2 classes have names"),
        ([0, 1], {"metadata": {"huggingface": "BAD"}}, "no list of texts"),
    ],
)
def test_wrong_tables_are_refused_by_name(tmp_path, labels, fields, message):
    described = {"NAMES": '["a", "b"]', "BAD": '[1, "b"]'}
    if "metadata" in fields:
        names = described[fields["metadata"]["huggingface"]]
        content = f'{{"info": {{"features": {{"label": {{"names": {names}}}}}}}}}'
        fields = {"metadata": {"huggingface": content}}
    write(tmp_path / "x.parquet", labels, **fields)
    with pytest.raises(InputRefused, match=rf"x\.parquet.*{message}"):
        load_split(section(tmp_path / "x.parquet"), "train")


def test_what_is_no_table_or_no_picture_is_refused(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"nothing")
    with pytest.raises(InputRefused, match="not a parquet file"):
        load_split(section(tmp_path / "x.parquet"), "train")
    with pytest.raises(InputRefused, match="no such file"):
        load_split(section(tmp_path / "y.parquet"), "train")
    parquet.write_table(
        arrow.table({"image": [b"x", b"y"], "label": [0, 1]}), tmp_path / "x.parquet"
    )
    with pytest.raises(InputRefused, match="not an image"):
        load_split(section(tmp_path / "x.parquet"), "train")
    table = arrow.table({"image": [{"path": "a.png"}] * 2, "label": [0, 1]})
    parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(InputRefused, match=r"row 1: image holds no encoded image"):
        load_split(section(tmp_path / "x.parquet"), "train")
    bad = arrow.table({"image": [b"x"], "label": [0]}).replace_schema_metadata({"huggingface": "{"})
    parquet.write_table(bad, tmp_path / "x.parquet")
    with pytest.raises((InputRefused, CorruptCheckpoint)):
        load_split(section(tmp_path / "x.parquet"), "train")
