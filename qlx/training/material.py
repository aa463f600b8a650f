"""What a training reads: examples prepared for the model, and the files that go with the result."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlx.checkpoint import bytes_digest, canonical_json
from qlx.errors import InputRefused, Mismatch, require
from qlx.inputs import (
    EVAL_ROWS,
    PREPROCESSOR_FILE,
    TEMPLATE_FILE,
    TOKENIZER_FILES,
    Batch,
    Encoded,
    ImagePreprocessor,
    ImageSplit,
    KeypointSplit,
    TextCodec,
    TextSplit,
    encode_split,
    image_batches,
    keypoint_batch,
    keypoint_batches,
    load_split,
    load_tokenizer,
    rows_for,
    split_digest,
    text_batches,
    train_tokenizer,
    with_tokens,
)
from qlx.models import Labels, image_shape, is_plain_vit, model_config, probe_texts
from qlx.recipe import Recipe

GENERATION_FILE = "generation_config.json"

__all__ = [
    "GENERATION_FILE",
    "DataDigests",
    "ImageMaterial",
    "KeypointMaterial",
    "Material",
    "TextMaterial",
    "frame_preprocessor",
    "given_template",
    "load_material",
    "material_digest",
    "require_room",
]


@dataclass(frozen=True)
class DataDigests:
    """`sha256:…` of the examples to train on, and of those held out, before any limit on texts."""

    train: str
    held_out: str


@dataclass(frozen=True)
class ImageMaterial:
    """Images for a classifier. `files` are the preprocessing files of the result, by name."""

    train: ImageSplit
    evaluation: ImageSplit
    preprocessor: ImagePreprocessor
    files: dict[str, bytes]
    digests: DataDigests

    @property
    def labels(self) -> Labels:
        """The classes of the data."""
        return Labels(self.train.classes)

    @property
    def counts(self) -> tuple[int, int]:
        """Number of examples to train on and held out."""
        return len(self.train), len(self.evaluation)

    def batches(self) -> Iterator[Batch]:
        """The held-out examples."""
        return image_batches(self.evaluation, self.preprocessor, EVAL_ROWS)

    def probe(self, recipe: Recipe) -> Batch:
        """The first held-out images."""
        return next(image_batches(self.evaluation, self.preprocessor, recipe.probe.count))


@dataclass(frozen=True)
class KeypointMaterial:
    """Frames with places for a heatmap model. `files` are the preprocessing files of the result, by name."""

    train: KeypointSplit
    evaluation: KeypointSplit
    preprocessor: ImagePreprocessor
    files: dict[str, bytes]
    digests: DataDigests

    @property
    def labels(self) -> Labels:
        """The keypoints of the data."""
        return Labels(self.train.names)

    @property
    def counts(self) -> tuple[int, int]:
        """Number of examples to train on and held out."""
        return len(self.train), len(self.evaluation)

    def batches(self) -> Iterator[Batch]:
        """The held-out examples."""
        return keypoint_batches(self.evaluation, self.preprocessor, EVAL_ROWS)

    def probe_items(self, count: int) -> list[int]:
        """The held-out examples that a probe keeps: spread over the clips, as neighbours are alike."""
        last = len(self.evaluation) - 1
        return sorted({round(at * last / (count - 1)) for at in range(count)})

    def probe(self, recipe: Recipe) -> Batch:
        """The examples of `probe_items`."""
        items = self.probe_items(recipe.probe.count)
        return keypoint_batch(self.evaluation, self.preprocessor, items)


@dataclass(frozen=True)
class TextMaterial:
    """Token ids for a causal language model. `files` are the tokenizer's files, by name.

    `new_ids` are those of the recipe's new tokens, which `files` already know.
    """

    train: list[Encoded]
    evaluation: list[Encoded]
    codec: TextCodec
    files: dict[str, bytes]
    digests: DataDigests
    examples: TextSplit
    new_ids: tuple[int, ...] = ()

    @property
    def counts(self) -> tuple[int, int]:
        """Number of examples to train on and held out."""
        return len(self.train), len(self.evaluation)

    def batches(self) -> Iterator[Batch]:
        """The held-out examples."""
        return text_batches(
            self.evaluation, self.codec.pad_id, rows_for(self.evaluation, self.codec)
        )

    def probe(self, recipe: Recipe) -> Batch:
        """The ends of the first held-out texts."""
        return probe_texts(
            self.evaluation,
            self.codec.pad_id,
            count=recipe.probe.count,
            max_length=recipe.probe.max_length,
            vocabulary=self.codec.tokenizer.get_vocab_size(),
        )

    def fast_tokenizer(self, work: Path) -> Any:
        """The tokenizer as transformers' class, for the trainer; `work` is where its files may lie."""
        transformers = require("transformers", "train")
        path = work / "tokenizer.json"
        path.write_bytes(self.files["tokenizer.json"])
        pad = self.codec.tokenizer.id_to_token(self.codec.pad_id)
        return transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(path), pad_token=pad, eos_token=self.codec.end
        )


Material = ImageMaterial | KeypointMaterial | TextMaterial


def material_digest(material: Material) -> str:
    """Identity of all that a training reads beside its base: examples, and how they are prepared."""
    known = {name: bytes_digest(data) for name, data in material.files.items()}
    digests = [material.digests.train, material.digests.held_out]
    return bytes_digest(canonical_json({"data": digests, "files": known}))


def load_material(recipe: Recipe, base: Path | None, work: Path) -> Material:
    """Read a recipe's data and prepare it with the base's files, or with new ones where there is no base.

    Raises:
        InputRefused: the data, or the base's preprocessing files, are missing or unusable.
    """
    train, evaluation = load_split(recipe.data, "train"), load_split(recipe.data, "eval")
    digests = DataDigests(split_digest(train), split_digest(evaluation))
    if isinstance(train, KeypointSplit) and isinstance(evaluation, KeypointSplit):
        preprocessor = frame_preprocessor(recipe, base)
        files = {PREPROCESSOR_FILE: preprocessor.to_bytes()}
        return KeypointMaterial(train, evaluation, preprocessor, files, digests)
    if isinstance(train, ImageSplit) and isinstance(evaluation, ImageSplit):
        preprocessor = _preprocessor(recipe, base)
        files = {
            PREPROCESSOR_FILE: preprocessor.to_bytes()
            if base is None
            else (base / PREPROCESSOR_FILE).read_bytes()
        }
        return ImageMaterial(train, evaluation, preprocessor, files, digests)
    assert isinstance(train, TextSplit)
    assert isinstance(evaluation, TextSplit)
    if not recipe.training.packing:
        require_room(recipe, base, recipe.data.max_length)
    files = _tokenizer_files(recipe, base, train)
    new_tokens = recipe.adapter.new_tokens if recipe.adapter else ()
    files, new_ids = with_tokens(files, new_tokens)
    codec = _codec(files, work)
    data, only = recipe.data, recipe.training.completion_only
    learned = encode_split(train, codec, data, completion_only=only, limit=data.train_limit)
    held_out = encode_split(evaluation, codec, data, completion_only=only, limit=data.eval_limit)
    require_room(recipe, base, max(len(item.ids) for item in (*learned, *held_out)))
    return TextMaterial(
        train=learned,
        evaluation=held_out,
        codec=codec,
        files=files,
        digests=digests,
        examples=evaluation,
        new_ids=new_ids,
    )


def _preprocessor(recipe: Recipe, base: Path | None) -> ImagePreprocessor:
    if base is not None:
        return ImagePreprocessor.from_directory(base)
    section = recipe.base.from_scratch
    assert section is not None
    return ImagePreprocessor(size=section.image_shape)


def frame_preprocessor(recipe: Recipe, base: Path | None) -> ImagePreprocessor:
    """Whole frames resized to the model's size, with the base's colours.

    ViTPose's own preprocessing cuts a person out of the image by a box; there is none here.

    Raises:
        Mismatch: the base sees another number of frames at once than the recipe gives it.
    """
    if base is None:
        return replace(_preprocessor(recipe, base), frames=recipe.data.frames)
    known = ImagePreprocessor.from_directory(base)
    plain = is_plain_vit(base)
    config = model_config(base, "image-classification" if plain else "heatmap")
    channels, height, width = image_shape(config)
    if not plain and channels != 3 * recipe.data.frames:
        raise Mismatch(
            f"{base}: sees {channels // 3} frames at once, data.frames is {recipe.data.frames}; they must agree"
        )
    return replace(
        known,
        size=(height, width),
        crop=None,
        kind=ImagePreprocessor.kind,
        frames=recipe.data.frames,
    )


def require_room(recipe: Recipe, base: Path | None, longest: int) -> None:
    """Check that the model has a position for every token of texts of at most `longest`.

    That is `data.max_length`, but where texts are packed: there it is the length of a row, in which each text's
    positions begin anew.

    Raises:
        Mismatch: the model's context is shorter.
    """
    room: int | None
    if base is None:
        assert recipe.base.from_scratch is not None
        room, where = recipe.base.from_scratch.max_length, "base.from_scratch.max_length"
    else:
        room = getattr(model_config(base, "causal-lm"), "max_position_embeddings", None)
        where = f"{base}: max_position_embeddings of config.json"
    if room is not None and longest > room:
        raise Mismatch(
            f"texts may have {longest} tokens (data.max_length is {recipe.data.max_length}), and {where} is {room}: "
            "lower the first, or raise the second where the model takes more"
        )


def _tokenizer_files(recipe: Recipe, base: Path | None, train: TextSplit) -> dict[str, bytes]:
    given = given_template(recipe)
    if base is not None:
        load_tokenizer(base)  # what is missing or no tokenizer is named here
        wanted = (*TOKENIZER_FILES, GENERATION_FILE)
        files = {name: (base / name).read_bytes() for name in wanted if (base / name).is_file()}
        if any(example.messages for example in train.examples[:1]):
            files.setdefault(TEMPLATE_FILE, TextCodec.from_directory(base).template.encode())
        return files | given
    section = recipe.base.from_scratch
    assert section is not None
    texts = (_all_text(example) for example in train.examples)
    return train_tokenizer(texts, section.vocab_size) | given


def given_template(recipe: Recipe) -> dict[str, bytes]:
    """The recipe's own chat template as the file that it becomes; empty without one.

    Raises:
        InputRefused: it cannot be read.
    """
    if recipe.data.chat_template is None:
        return {}
    path = Path(recipe.data.chat_template)
    try:
        return {TEMPLATE_FILE: path.read_text("utf-8").encode()}
    except (OSError, UnicodeDecodeError) as error:
        raise InputRefused(f"data.chat_template: {path} cannot be read ({error})") from error


def _all_text(example: Any) -> str:
    return "\n".join(
        [
            example.prompt or "",
            example.completion,
            *(message["content"] for message in example.messages),
        ]
    )


def _codec(files: dict[str, bytes], work: Path) -> TextCodec:
    directory = work / "tokenizer"
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return TextCodec.from_directory(directory)
