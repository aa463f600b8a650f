"""The tokenizer in a GGUF file, from a directory's `tokenizer.json`.

llama.cpp knows byte-level BPE by the name of the rule that cuts a text into words, and BPE over
characters (SentencePiece's) by a score for each token. A rule it has no name for is refused: another
one would cut texts differently without a word.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlx.checkpoint import load_json
from qlx.errors import Unsupported

__all__ = ["add_tokenizer"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens, by llama.cpp's numbers."""

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_RULES: Mapping[str, str] = {
    _WORDS.format(digits=r"\p{N}{1,3}"): "llama-bpe",
    _WORDS.format(digits=r"\p{N}"): "qwen2",
}


def add_tokenizer(writer: Any, directory: Path, size: int) -> bool:
    """Add the vocabulary of `size` tokens, its rules and chat template to a `gguf.GGUFWriter`.

    Returns:
        Whether there is a tokenizer; a file without one runs on numbers of tokens only.

    Raises:
        Unsupported: a tokenizer that llama.cpp has no name for.
    """
    path = directory / "tokenizer.json"
    content = load_json(path) if path.is_file() else None
    if not isinstance(content, dict):
        writer.add_tokenizer_model("no_vocab")
        return False
    import gguf

    model = content["model"]
    if model.get("type") != "BPE":
        raise Unsupported(f"{path}: a tokenizer of type {model.get('type')!r}; BPE can be written")
    tokens, types = _tokens(content, size)
    by_characters = bool(model.get("byte_fallback"))
    writer.add_tokenizer_model("llama" if by_characters else "gpt2")
    writer.add_tokenizer_pre("default" if by_characters else _rule(content, path))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if by_characters:
        writer.add_token_scores(_scores(tokens, model["merges"]))
        writer.add_add_space_prefix(_adds_space(content))
    gguf.SpecialVocab(directory, load_merges=not by_characters, n_vocab=size).add_to_gguf(
        writer, quiet=True
    )
    return True


def _tokens(content: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """All tokens by number, and their types; numbers that the vocabulary lacks are unused ones."""
    tokens = [f"[PAD{at}]" for at in range(size)]
    types = [UNUSED] * size
    unknown = content["model"].get("unk_token")
    for text, at in content["model"]["vocab"].items():
        tokens[at] = text
        is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        types[at] = BYTE if is_byte else UNKNOWN if text == unknown else NORMAL
    for added in content.get("added_tokens") or ():
        at = added["id"]
        if types[at] != UNKNOWN:
            types[at] = CONTROL if added.get("special") else USER_DEFINED
        tokens[at] = added["content"]
    return tokens, types


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """Minus the rank of the first merge that makes a token, so that the best score is merged first."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _adds_space(content: Mapping[str, Any]) -> bool:
    """Whether a text gets a space in front before it is cut."""
    parts = [*_parts(content.get("normalizer"), "normalizers"),
             *_parts(content.get("pre_tokenizer"), "pretokenizers")]  # fmt: skip
    return any(
        part.get("type") == "Prepend"
        or (part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never")
        for part in parts
    )


def _parts(section: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if section is None:
        return []
    return list(section[key]) if section.get("type") == "Sequence" else [section]


def _rule(content: Mapping[str, Any], path: Path) -> str:
    """The name of the rule by which a byte-level tokenizer cuts a text into words."""
    parts = _parts(content.get("pre_tokenizer"), "pretokenizers")
    kinds = [part.get("type") for part in parts]
    own_rule = bool(parts) and kinds[-1] == "ByteLevel" and parts[-1].get("use_regex", True)
    if own_rule and kinds == ["ByteLevel"]:
        return "gpt-2"
    if own_rule and kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    split = kinds == ["Split", "ByteLevel"] and not own_rule
    pattern = str(parts[0].get("pattern", {}).get("Regex")) if split else ""
    if pattern not in _RULES:
        raise Unsupported(
            f"{path}: cuts texts into words by a rule that has no name in llama.cpp known here; "
            "convert the merged directory with llama.cpp's own script"
        )
    return _RULES[pattern]
