"""Inputs without torch: built-in and user data, image preprocessing, tokenizers, chat templates, batches, scores.

Training, verification and the runtime all prepare their inputs here, so that none can differ.
"""

from qlx.inputs.batches import Batch, eval_batches, image_batches, pad_batch, text_batches
from qlx.inputs.chat import DEFAULT_TEMPLATE, Message, render_chat
from qlx.inputs.images import PREPROCESSOR_FILE, ImagePreprocessor, open_image
from qlx.inputs.scoring import Score, log_softmax, negative_log_likelihood
from qlx.inputs.splits import (
    Encoded,
    ImageSplit,
    Split,
    TextSplit,
    encode_split,
    load_split,
    split_digest,
)
from qlx.inputs.text import (
    TEMPLATE_FILE,
    TOKENIZER_FILES,
    TextCodec,
    TextExample,
    load_tokenizer,
    train_tokenizer,
)

__all__ = [
    "DEFAULT_TEMPLATE",
    "PREPROCESSOR_FILE",
    "TEMPLATE_FILE",
    "TOKENIZER_FILES",
    "Batch",
    "Encoded",
    "ImagePreprocessor",
    "ImageSplit",
    "Message",
    "Score",
    "Split",
    "TextCodec",
    "TextExample",
    "TextSplit",
    "encode_split",
    "eval_batches",
    "image_batches",
    "load_split",
    "load_tokenizer",
    "log_softmax",
    "negative_log_likelihood",
    "open_image",
    "pad_batch",
    "render_chat",
    "split_digest",
    "text_batches",
    "train_tokenizer",
]
