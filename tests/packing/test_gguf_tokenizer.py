"""The tokenizer in a GGUF file: tokens, types, rules; and llama.cpp cutting texts as the original does."""

import json

import pytest

from qlx.errors import Unsupported
from qlx.packing.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    add_tokenizer,
)

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "def main():\n    return 12345 + x['key']\n",
    "It's  a test,   isn't it?\n\n\tYES 2024",
    "naïve café 日本語 🙂",
    " leading and trailing  ",
]
SIZE = 400


def byte_level(kind):
    """A byte-level BPE trained on a few lines, which cuts words by the rule of `kind`."""
    pre = tokenizers.pre_tokenizers
    regex = {"llama-bpe": LLAMA_3, "qwen2": LLAMA_3.replace("{1,3}", "")}.get(kind)
    rest = pre.ByteLevel(add_prefix_space=False, use_regex=regex is None)
    first = [] if regex is None else [pre.Split(tokenizers.Regex(regex), "isolated")]
    first = [pre.Digits(individual_digits=True)] if kind == "smollm" else first
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre.Sequence([*first, rest]) if first else rest
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=SIZE - 20,
        special_tokens=["<|pad|>", "<|end|>"],
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_tokens(["<tool>"])
    return json.loads(tokenizer.to_str())


def by_characters():
    """A BPE over characters with bytes to fall back on, as SentencePiece's are converted."""
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    normal = tokenizers.normalizers
    tokenizer.normalizer = normal.Sequence([normal.Prepend("▁"), normal.Replace(" ", "▁")])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=SIZE - 20, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    tokenizer.train_from_iterator([text for text in TEXTS if "日" not in text] * 3, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are ordinary tokens
    return content


def write(directory, content):
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    path = directory / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(SIZE)
    found = add_tokenizer(writer, directory, SIZE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return found, path


def fields(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


RULES = ["gpt-2", "smollm", "llama-bpe", "qwen2"]


@pytest.mark.parametrize("rule", RULES)
def test_byte_level_tokenizers_are_told_by_the_name_of_their_rule(tmp_path, rule):
    content = byte_level(rule)
    found, path = write(tmp_path, content)
    written = fields(path)
    assert found
    assert written["tokenizer.ggml.model"] == "gpt2"
    assert written["tokenizer.ggml.pre"] == rule
    tokens, types = (written[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    assert len(tokens) == len(types) == SIZE
    vocabulary = content["model"]["vocab"] | {
        t["content"]: t["id"] for t in content["added_tokens"]
    }
    assert all(tokens[at] == token for token, at in vocabulary.items())
    assert types[vocabulary["<|pad|>"]] == CONTROL
    assert types[vocabulary["<tool>"]] == USER_DEFINED
    assert types[vocabulary["a"]] == NORMAL
    assert types[-1] == UNUSED
    assert len(written["tokenizer.ggml.merges"]) == len(content["model"]["merges"])
    assert written["tokenizer.ggml.eos_token_id"] == vocabulary["<|end|>"]


def test_tokenizers_over_characters_get_scores_in_the_order_of_merges(tmp_path):
    content = by_characters()
    found, path = write(tmp_path, content)
    written = fields(path)
    assert found
    assert written["tokenizer.ggml.model"] == "llama"
    assert written["tokenizer.ggml.add_space_prefix"] is True
    types, scores = (written[f"tokenizer.ggml.{name}"] for name in ("token_type", "scores"))
    vocabulary = content["model"]["vocab"]
    assert types[vocabulary["<unk>"]] == UNKNOWN
    assert types[vocabulary["<0x0A>"]] == BYTE
    merged = [scores[vocabulary["".join(pair)]] for pair in content["model"]["merges"]]
    assert merged == sorted(merged, reverse=True)
    assert merged[0] == 0


def test_a_directory_without_a_tokenizer_says_so(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    assert not add_tokenizer(writer, tmp_path, SIZE)


@pytest.mark.parametrize("change", ["regex", "kind"])
def test_rules_without_a_name_are_refused(tmp_path, change):
    content = byte_level("qwen2")
    if change == "kind":
        content["model"]["type"] = "Unigram"
    else:
        content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+|\W+"
    with pytest.raises(Unsupported, match="no name in llama.cpp" if change == "regex" else "BPE"):
        write(tmp_path, content)


@pytest.mark.exhaustive
@pytest.mark.parametrize("rule", [*RULES, "characters"])
def test_llama_cpp_cuts_texts_into_the_same_tokens(tmp_path, rule):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python compiles for long")
    content = by_characters() if rule == "characters" else byte_level(rule)
    _, path = write(tmp_path, content)
    reader = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    original = tokenizers.Tokenizer.from_str(json.dumps(content))
    for text in TEXTS:
        found = reader.tokenize(text.encode(), add_bos=False, special=True)
        assert found == original.encode(text).ids, text
