"""Text to token ids and back, through the `tokenizers` library; never through code that data names.

A directory's `tokenizer.json` is the tokenizer; `tokenizer_config.json` names its special tokens and,
there or in `chat_template.jinja`, the chat template.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qlx.checkpoint import canonical_json, load_object
from qlx.errors import CorruptCheckpoint, InputRefused, Unsupported, require
from qlx.inputs.chat import DEFAULT_TEMPLATE, Message, render_chat

__all__ = [
    "TEMPLATE_FILE",
    "TOKENIZER_FILE",
    "TOKENIZER_FILES",
    "TextCodec",
    "TextExample",
    "load_tokenizer",
    "train_tokenizer",
    "with_tokens",
]

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    CONFIG_FILE,
    TEMPLATE_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
)
"""Files a tokenizer consists of; those that exist are carried from checkpoint to checkpoint."""

PAD, END = "<|pad|>", "<|end|>"
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
IGNORED = -100
"""The label of a position that does not count."""

Answers = Literal["last", "all"]
"""Which of the assistant's messages in a chat are learned."""

_REWRITES = "the chat template rewrites earlier messages, so the answer cannot be told apart; "


def load_tokenizer(directory: Path) -> Any:
    """The `tokenizers.Tokenizer` of a directory, with no padding or truncation switched on.

    Raises:
        InputRefused: there is no `tokenizer.json`.
        CorruptCheckpoint: it does not parse.
    """
    path = Path(directory) / TOKENIZER_FILE
    if not path.is_file():
        raise InputRefused(
            f"{path}: missing; save the model with a fast tokenizer (tokenizer.json)"
        )
    tokenizer = _parsed(path.read_bytes(), path)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _parsed(content: bytes, path: Path) -> Any:
    """A `tokenizers.Tokenizer` of its file's content; `path` is named where it is none."""
    tokenizers = require("tokenizers", "train")
    try:
        return tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:
        raise CorruptCheckpoint(f"{path}: not a tokenizer ({error})") from error


@dataclass(frozen=True)
class TextExample:
    """One training text: a completion after a prompt (perhaps an empty one), or a chat ending with an answer.

    Without prompt and messages it is running text, which may be joined with others. With `messages`, prompt and
    completion come out of the chat template.
    """

    prompt: str | None = None
    completion: str = ""
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True)
class TextCodec:
    """A tokenizer with what encoding examples needs: pad and end tokens and the chat template.

    `end` and `begin` are token texts or None; `pad_id` is always valid.
    """

    tokenizer: Any
    pad_id: int
    end: str | None
    begin: str | None = None
    template: str = DEFAULT_TEMPLATE
    specials: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_directory(cls, directory: Path) -> "TextCodec":
        """Read the tokenizer files of a directory.

        Raises:
            InputRefused: there is no `tokenizer.json`.
            CorruptCheckpoint: the files do not parse, or name tokens the vocabulary lacks.
            UnsafeInput: the chat template is too large.
        """
        directory = Path(directory)
        tokenizer = load_tokenizer(directory)
        path = directory / CONFIG_FILE
        config = load_object(path) if path.is_file() else {}
        specials = {
            name: _token_text(config.get(name)) for name in ("pad_token", "eos_token", "bos_token")
        }
        named = {name: text for name, text in specials.items() if text is not None}
        for name, text in named.items():
            if tokenizer.token_to_id(text) is None:
                raise CorruptCheckpoint(f"{path}: {name} {text!r} is not in the vocabulary")
        pad = named.get("pad_token", named.get("eos_token"))
        return cls(
            tokenizer=tokenizer,
            pad_id=0 if pad is None else tokenizer.token_to_id(pad),
            end=named.get("eos_token"),
            begin=named.get("bos_token"),
            template=_template(directory, config),
            specials=named,
        )

    @property
    def end_id(self) -> int | None:
        """Id of the end token."""
        return None if self.end is None else int(self.tokenizer.token_to_id(self.end))

    def chat(self, messages: Sequence[Message], *, answer_next: bool) -> str:
        """The chat template applied; with `answer_next` it ends where the assistant's answer begins."""
        return render_chat(self.template, messages, answer_next=answer_next, specials=self.specials)

    def parts(self, example: TextExample) -> tuple[list[int], list[int]]:
        """Token ids of the prompt and of the completion, the end token included.

        Raises:
            InputRefused: the chat template changes the prompt when the answer is added.
        """
        if not example.messages:
            prompt = self.tokenizer.encode(example.prompt).ids if example.prompt else []
            first = not example.prompt
            completion = self.tokenizer.encode(example.completion, add_special_tokens=first).ids
            return prompt, self._ended(completion)
        prompt = self.chat(example.messages[:-1], answer_next=True)
        whole = self.chat(example.messages, answer_next=False)
        if not whole.startswith(prompt):
            raise InputRefused(_REWRITES + "give prompt and completion instead")
        return self._ids(prompt), self._ids(whole[len(prompt) :])

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _earlier_answers(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """The prompt of a chat, and its labels: the answers in it, each with what ends it.

        An answer's tokens stand apart from those before it, as the model that makes it will see them.

        Raises:
            InputRefused: the chat template changes what it wrote when a message is added.
        """
        ids: list[int] = []
        labels: list[int] = []
        seen = ""
        for at in [at for at, message in enumerate(messages) if message["role"] == "assistant"]:
            question = self.chat(messages[:at], answer_next=True)
            answer = self.chat(messages[: at + 1], answer_next=False)
            if not (question.startswith(seen) and answer.startswith(question)):
                raise InputRefused(_REWRITES + "leave out data.answers")
            asked = self._ids(question[len(seen) :])
            ids += asked
            labels += [IGNORED] * len(asked)
            if at < len(messages) - 1:
                said = self._ids(answer[len(question) :])
                ids += said
                labels += said
            seen = answer
        return ids, labels

    def _ended(self, ids: list[int]) -> list[int]:
        end = self.end_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def encode(
        self,
        example: TextExample,
        max_length: int,
        *,
        completion_only: bool,
        answers: Answers = "last",
    ) -> tuple[list[int], list[int]]:
        """Ids and labels of one example; the prompt loses its beginning if both do not fit.

        Labels are -100 on the prompt when `completion_only`, else equal to the ids; with `all` answers those
        that the assistant gave earlier in a chat keep theirs.
        """
        prompt, completion = self.parts(example)
        hidden = [IGNORED] * len(prompt) if completion_only else prompt
        if completion_only and example.messages and answers == "all":
            prompt, hidden = self._earlier_answers(example.messages)
        completion = completion[:max_length]
        room = max_length - len(completion)
        prompt, hidden = (prompt[-room:], hidden[-room:]) if room else ([], [])
        return [*prompt, *completion], [*hidden, *completion]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of some token ids, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def _token_text(value: Any) -> str | None:
    """A special token is written as text or as an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _template(directory: Path, config: Mapping[str, Any]) -> str:
    path = directory / TEMPLATE_FILE
    if path.is_file():
        try:
            return path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise CorruptCheckpoint(f"{path}: not UTF-8 text ({error})") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {
            entry.get("name"): entry.get("template")
            for entry in template
            if isinstance(entry, dict)
        }
        template = named.get("default")
    return template if isinstance(template, str) else DEFAULT_TEMPLATE


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> dict[str, bytes]:
    """Train a byte-level BPE tokenizer; the same texts give the same bytes.

    Returns:
        The files of the tokenizer by name: `tokenizer.json`, `tokenizer_config.json` and the chat template.

    Raises:
        Unsupported: `vocab_size` is too small for the 256 bytes and the special tokens.
    """
    library = require("tokenizers", "train")
    bytes_alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    specials = [PAD, END, *_ROLES]
    if vocab_size < len(bytes_alphabet) + len(specials):
        raise Unsupported(
            f"vocab_size {vocab_size} is too small; a byte-level tokenizer needs {256 + len(specials)} or more"
        )
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=bytes_alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return {
        TOKENIZER_FILE: tokenizer.to_str(pretty=False).encode(),
        CONFIG_FILE: canonical_json(
            {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": PAD, "eos_token": END}
        ),
        TEMPLATE_FILE: _ROLE_TEMPLATE.encode(),
    }


def with_tokens(
    files: Mapping[str, bytes], tokens: Sequence[str]
) -> tuple[dict[str, bytes], tuple[int, ...]]:
    """The files of a tokenizer that knows more tokens, and their ids, which come after all others.

    The new ones are ordinary tokens (decoding shows them) that no other text is ever joined with.

    Raises:
        InputRefused: one is in the vocabulary already, or the tokenizer cannot take it.
        CorruptCheckpoint: the file does not parse.
    """
    if not tokens:
        return dict(files), ()
    library = require("tokenizers", "train")
    tokenizer = _parsed(files[TOKENIZER_FILE], Path(TOKENIZER_FILE))
    known = set(tokenizer.get_vocab(with_added_tokens=True).values())
    for token in tokens:
        if tokenizer.token_to_id(token) is not None:
            raise InputRefused(
                f"adapter.new_tokens: {token!r} is in the base's vocabulary already; leave it out"
            )
    tokenizer.add_tokens([library.AddedToken(token, normalized=False) for token in tokens])
    ids = tuple(tokenizer.token_to_id(token) for token in tokens)
    if known & set(ids) or any(
        tokenizer.encode(t).ids.count(i) != 1 for t, i in zip(tokens, ids, strict=True)
    ):
        raise InputRefused("adapter.new_tokens: this base's tokenizer cannot take new tokens")
    return {**files, TOKENIZER_FILE: tokenizer.to_str(pretty=False).encode()}, ids


_ROLE_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
