"""Built-in and user data: the same examples every time, nothing in both splits, wrong files refused."""

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qlx.errors import InputRefused, Unsupported
from qlx.inputs import (
    ImagePreprocessor,
    TextCodec,
    encode_split,
    eval_batches,
    load_split,
    pad_batch,
    rows_for,
    split_digest,
    train_tokenizer,
)
from qlx.inputs.splits import Encoded
from qlx.recipe import DataSection

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def section(**fields):
    return DataSection.model_validate(fields)


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    for name, content in train_tokenizer(["some text for the tokenizer"], 261).items():
        (path / name).write_bytes(content)
    return TextCodec.from_directory(path)


def test_digits_are_the_same_every_time_and_apart():
    plain, shifted = (section(source="digits", variant=variant) for variant in ("plain", "shifted"))
    train, held_out = load_split(plain, "train"), load_split(plain, "eval")
    assert (len(train), len(held_out)) == (1617, 180)
    assert train.images.shape[1:] == (32, 32, 3)
    assert train.images.dtype == np.uint8
    assert split_digest(load_split(shifted, "eval")) == split_digest(load_split(shifted, "eval"))
    other_seed = section(source="digits", variant="shifted", seed=1)
    digests = {split_digest(load_split(data, "eval")) for data in (plain, shifted, other_seed)}
    assert len(digests) == 3


def test_shifted_copies_of_held_out_digits_are_not_trained_on():
    plain_eval = load_split(section(source="digits"), "eval")
    shifted_train = load_split(section(source="digits", variant="shifted"), "train")
    shifted_eval = load_split(section(source="digits", variant="shifted"), "eval")
    np.testing.assert_array_equal(shifted_eval.labels, plain_eval.labels)
    assert len(shifted_train) == 2 * 1617
    half = len(shifted_train) // 2
    np.testing.assert_array_equal(shifted_train.labels[:half], shifted_train.labels[half:])
    assert (shifted_train.images[:half] != shifted_train.images[half:]).any(axis=(1, 2, 3)).all()


def test_limits_apply(codec):
    assert len(load_split(section(source="digits", train_limit=7), "train")) == 7
    data = section(source="python-docstrings", max_length=64)
    items = encode_split(load_split(data, "train"), codec, data, completion_only=True, limit=5)
    assert len(items) == 5


def test_docstrings_are_instruction_pairs():
    train = load_split(section(source="python-docstrings"), "train")
    held_out = load_split(section(source="python-docstrings"), "eval")
    assert len(train) > 2000
    user, assistant = train.examples[0].messages
    assert user["content"].startswith("Document this: ")
    assert "\n" not in assistant["content"]
    pairs = [
        (e.messages[0]["content"], e.messages[1]["content"])
        for e in (*train.examples, *held_out.examples)
    ]
    assert len(set(pairs)) == len(pairs)


def test_plain_text_is_cut_into_full_blocks(codec):
    data = section(source="python-text", max_length=50)
    split = load_split(data, "eval")
    items = encode_split(split, codec, data, completion_only=True, limit=20)
    assert {len(item.ids) for item in items} == {50}
    joined = codec.tokenizer.encode(split.examples[0].completion).ids
    assert items[0].ids == items[0].labels == joined[:50]
    assert items[1].ids == joined[50:100]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_user_files_hold_the_same_examples(suffix, tmp_path):
    rows = [{"prompt": f'p{at}, "q"\n', "completion": f"ç{at}"} for at in range(10)]
    path = tmp_path / f"data.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    elif suffix == "csv":
        import csv

        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    data = section(source="text", path=str(path), eval_fraction=0.3)
    found = [*load_split(data, "train").examples, *load_split(data, "eval").examples]
    assert sorted((e.prompt, e.completion) for e in found) == sorted(
        (r["prompt"], r["completion"]) for r in rows
    )
    assert len(load_split(data, "eval")) == 3


def test_messages_and_text_columns(tmp_path, codec):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"messages": CHAT}) for _ in range(4)))
    data = section(source="text", path=str(path), max_length=64)
    item = encode_split(load_split(data, "train"), codec, data, completion_only=True)[0]
    assert (
        codec.decode(
            [token for token, label in zip(item.ids, item.labels, strict=True) if label != -100]
        )
        == "hello"
    )
    path.write_text("\n".join(json.dumps({"text": "a" * 40}) for _ in range(4)))
    data = section(source="text", path=str(path), max_length=30)
    assert len(encode_split(load_split(data, "train"), codec, data, completion_only=True)) == 5


def test_a_row_with_an_empty_prompt_is_an_example_of_its_own(tmp_path, codec):
    path = tmp_path / "data.jsonl"
    data = section(source="text", path=str(path), max_length=30)
    for row, count in (({"prompt": "", "completion": "abc"}, 9), ({"text": "abc"}, 2)):
        path.write_text("\n".join(json.dumps(row) for _ in range(10)))
        split = load_split(data, "train")
        assert len(encode_split(split, codec, data, completion_only=True)) == count


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('{"prompt": "a"}', "row 1: needs the columns"),
        ('{"text": "a"}\nnot json', "line 2: not JSON"),
        ("[1]", "line 1"),
        ('{"prompt": 3, "completion": "x"}', "prompt must be text"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "assistant"),
        ('{"messages": [{"role": "root", "content": "x"}]}', "role"),
        ('{"text": "a"}\n{"text": ', r"line 2: not JSON \(Expecting value, column 10\)"),
        (
            '{"text": "a"}\n{"text": "\\ud800 half"}',
            r"row 2: text holds half of a character \(.ud800\)",
        ),
        ('{"messages": [{"role": "user", "content": "\\udc00"}]}', "row 1: content holds half"),
        ('{"text": ""}', "row 1: text is empty"),
        ("", "no examples"),
        ('{"text": "only one"}', "cannot be divided"),
    ],
)
def test_wrong_rows_are_named(content, match, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(InputRefused, match=match):
        load_split(section(source="text", path=str(path)), "train")


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    for name, content, match in (
        (
            "latin.jsonl",
            b'{"text": "a"}\n{"text": "caf\xe9"}\n',
            r"line 2: not UTF-8 text \(byte 13",
        ),
        ("utf16.jsonl", '{"text": "a"}\n'.encode("utf-16"), "line 1: not UTF-8"),
        ("latin.csv", b"text\ncaf\xe9\n", "not UTF-8 text"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputRefused, match=match):
            load_split(section(source="text", path=str(tmp_path / name)), "train")


def test_a_field_of_a_csv_file_may_be_long(tmp_path):
    path = tmp_path / "long.csv"
    path.write_text("text\n" + "x" * 200_000 + "\n" + "y" * 4 + "\n")
    data = section(source="text", path=str(path), eval_fraction=0.5)
    (train,), (held_out,) = (load_split(data, part).examples for part in ("train", "eval"))
    assert {len(train.completion), len(held_out.completion)} == {200_000, 4}
    path.write_text('text\n"a" b\n')
    with pytest.raises(InputRefused, match=r"long\.csv: not a csv file"):
        load_split(data, "train")


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_mark_at_the_start_and_line_ends_of_windows_are_taken(suffix, tmp_path):
    """As Excel and Notepad save them."""
    lines = (
        ["text", *"abcd"] if suffix == "csv" else [f'{{"text": "{letter}"}}' for letter in "abcd"]
    )
    path = tmp_path / f"data.{suffix}"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    data = section(source="text", path=str(path), eval_fraction=0.3)
    found = [*load_split(data, "train").examples, *load_split(data, "eval").examples]
    assert sorted(example.completion for example in found) == list("abcd")


def test_other_files_are_refused(tmp_path):
    for name, error in (
        ("data.pkl", Unsupported),
        ("data.jsonl", InputRefused),
        ("data.parquet", InputRefused),
    ):
        if name.endswith("parquet"):
            (tmp_path / name).write_bytes(b"PAR1 not")
        with pytest.raises(error):
            load_split(section(source="text", path=str(tmp_path / name)), "train")


@pytest.fixture
def image_folder(tmp_path):
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for at in range(5):
            Image.fromarray(random.integers(0, 256, (9, 7, 3)).astype(np.uint8)).save(
                tmp_path / name / f"{at}.png"
            )
    return tmp_path


def test_image_folder(image_folder, tmp_path_factory):
    data = section(source="images", path=str(image_folder), eval_fraction=0.2)
    train, held_out = load_split(data, "train"), load_split(data, "eval")
    assert train.classes == ("cat", "dog")
    assert (len(train), len(held_out)) == (8, 2)
    assert not set(train.images) & set(held_out.images)
    directory = tmp_path_factory.mktemp("model")
    (directory / "preprocessor_config.json").write_bytes(ImagePreprocessor(size=(8, 8)).to_bytes())
    (batch,) = eval_batches(data, directory)
    assert batch.inputs["pixel_values"].shape == (2, 3, 8, 8)


def test_image_folder_with_its_own_splits(image_folder, tmp_path):
    root = tmp_path / "split"
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            target = root / part / name
            target.mkdir(parents=True)
            source = image_folder / name / ("0.png" if part == "train" else "1.png")
            (target / source.name).write_bytes(source.read_bytes())
    data = section(source="images", path=str(root))
    assert [path.name for path in load_split(data, "train").images] == ["0.png", "0.png"]
    assert [path.name for path in load_split(data, "eval").images] == ["1.png", "1.png"]


def test_a_part_of_divided_images_has_all_classes(image_folder, tmp_path_factory):
    """They come class by class, so that a limit or a probe would see the first class alone."""
    root = tmp_path_factory.mktemp("divided")
    for part in ("train", "val"):
        (root / part).symlink_to(image_folder)
    limits = {"train_limit": 5, "eval_limit": 5}
    data = section(source="images", path=str(root), **limits)
    for part in ("train", "eval"):
        split = load_split(data, part)
        assert len(split) == 5
        assert set(split.labels.tolist()) == {0, 1}
        assert [path.parent.name for path in split.images] == [
            split.classes[at] for at in split.labels
        ]
        again, other = load_split(data, part), load_split(data.model_copy(update={"seed": 1}), part)
        assert again.images == split.images != other.images


def test_bad_image_folders_are_refused(tmp_path):
    data = section(source="images", path=str(tmp_path))
    with pytest.raises(InputRefused, match="one directory per class"):
        load_split(data, "train")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with pytest.raises(InputRefused, match="no images"):
        load_split(data, "train")


def test_long_texts_of_many_tokens_are_scored_a_few_at_a_time(codec, monkeypatch):
    vocabulary = codec.tokenizer.get_vocab_size()
    items = [Encoded([5] * length, [5] * length) for length in (3, 100)]
    assert rows_for(items, codec) == 32
    for rows in (40, 7, 1, 0):
        monkeypatch.setattr("qlx.inputs.batches._MOST_LOGITS", rows * 100 * vocabulary)
        assert rows_for(items, codec) == min(32, max(1, rows))


def test_padding_is_on_the_right():
    batch = pad_batch([Encoded([5, 6, 7], [-100, 6, 7]), Encoded([8], [8])], pad_id=9)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[-100, 6, 7], [8, -100, -100]]


def test_inputs_need_no_torch():
    code = "import sys; sys.modules['torch'] = None; import qlx.inputs; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
