"""Inputs without torch: built-in and user data, image preprocessing, tokenizers, chat templates, batches, scores.

Training, verification and the runtime all prepare their inputs here, so that none can differ.
"""

from qlx.inputs.batches import (
    EVAL_ROWS,
    Batch,
    eval_batches,
    image_batches,
    keypoint_batch,
    keypoint_batches,
    pad_batch,
    rows_for,
    text_batches,
)
from qlx.inputs.chat import DEFAULT_TEMPLATE, Message, render_chat
from qlx.inputs.heatmaps import find_peaks, gaussian_target, rescaled
from qlx.inputs.images import PREPROCESSOR_FILE, ImagePreprocessor, as_image, open_image
from qlx.inputs.keypoint_scores import DETECTED, TOLERANCE, KeypointScore
from qlx.inputs.scoring import Score, log_softmax, negative_log_likelihood
from qlx.inputs.splits import (
    Encoded,
    ImageSplit,
    Loaded,
    Split,
    TextSplit,
    encode_split,
    image_files,
    load_split,
    split_digest,
)
from qlx.inputs.text import (
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    TOKENIZER_FILES,
    TextCodec,
    TextExample,
    load_tokenizer,
    train_tokenizer,
    with_tokens,
)
from qlx.inputs.tracknet import ABSENT, KeypointSplit, read_clips

__all__ = [
    "ABSENT",
    "DEFAULT_TEMPLATE",
    "DETECTED",
    "EVAL_ROWS",
    "PREPROCESSOR_FILE",
    "TEMPLATE_FILE",
    "TOKENIZER_FILE",
    "TOKENIZER_FILES",
    "TOLERANCE",
    "Batch",
    "Encoded",
    "ImagePreprocessor",
    "ImageSplit",
    "KeypointScore",
    "KeypointSplit",
    "Loaded",
    "Message",
    "Score",
    "Split",
    "TextCodec",
    "TextExample",
    "TextSplit",
    "as_image",
    "encode_split",
    "eval_batches",
    "find_peaks",
    "gaussian_target",
    "image_batches",
    "image_files",
    "keypoint_batch",
    "keypoint_batches",
    "load_split",
    "load_tokenizer",
    "log_softmax",
    "negative_log_likelihood",
    "open_image",
    "pad_batch",
    "read_clips",
    "render_chat",
    "rescaled",
    "rows_for",
    "split_digest",
    "text_batches",
    "train_tokenizer",
    "with_tokens",
]
