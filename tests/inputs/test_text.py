"""Tokenizers and chat templates: the same ids and texts as transformers, and what is refused."""

import dataclasses
import itertools
import json
import shutil

import pytest

from qlx.errors import CorruptCheckpoint, InputRefused, UnsafeInput, Unsupported
from qlx.inputs import (
    TextCodec,
    TextExample,
    load_tokenizer,
    render_chat,
    train_tokenizer,
    with_tokens,
)

TEXTS = ["def add(a, b):\n    return a + b\n" * 20, "class Ünïcode:\n    '''Doc.'''\n" * 20]
CHAT = (
    {"role": "user", "content": "Document this: def f()"},
    {"role": "assistant", "content": "Return f."},
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    for name, content in train_tokenizer(TEXTS, 300).items():
        (path / name).write_bytes(content)
    return path


@pytest.fixture(scope="module")
def codec(directory):
    return TextCodec.from_directory(directory)


def test_training_is_deterministic(directory):
    again = train_tokenizer(TEXTS, 300)
    assert {name: (directory / name).read_bytes() for name in again} == again
    assert train_tokenizer(TEXTS[:1], 300) != again


def test_vocabulary_has_every_byte():
    with pytest.raises(Unsupported, match="261"):
        train_tokenizer(TEXTS, 200)


def test_same_ids_as_transformers(directory, codec):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(directory)
    for text in [*TEXTS, "naïve 中文 \x00 tab\t"]:
        assert codec.tokenizer.encode(text).ids == theirs(text)["input_ids"]
        assert codec.decode(codec.tokenizer.encode(text).ids) == text
    assert (theirs.pad_token_id, theirs.eos_token_id) == (codec.pad_id, codec.end_id)
    rendered = theirs.apply_chat_template(
        list(CHAT[:1]), add_generation_prompt=True, tokenize=False
    )
    assert (
        codec.chat(CHAT[:1], answer_next=True)
        == rendered
        == "<|user|>Document this: def f()<|end|><|assistant|>"
    )


def test_answer_is_told_from_the_prompt(codec):
    prompt, answer = codec.parts(TextExample(messages=CHAT))
    assert codec.tokenizer.decode(answer, skip_special_tokens=False) == "Return f.<|end|>"
    assert codec.tokenizer.decode(prompt, skip_special_tokens=False).endswith("<|assistant|>")
    assert codec.decode(prompt + answer) == "Document this: def f()Return f."


def test_labels_hide_the_prompt_only_when_asked(codec):
    example = TextExample(prompt="def f(", completion="a):")
    prompt, completion = codec.parts(example)
    assert completion[-1] == codec.end_id
    ids, labels = codec.encode(example, 64, completion_only=True)
    assert ids == prompt + completion
    assert labels == [-100] * len(prompt) + completion
    assert codec.encode(example, 64, completion_only=False)[1] == ids


LONGER = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Times 2?"},
    {"role": "assistant", "content": "8"},
)


def learned(codec, labels):
    """The texts of the stretches that count."""
    runs = itertools.groupby(labels, key=lambda label: label != -100)
    return [codec.tokenizer.decode(list(run), skip_special_tokens=False) for on, run in runs if on]


@pytest.mark.parametrize(
    ("answers", "expected"), [("last", ["8<|end|>"]), ("all", ["4<|end|>", "8<|end|>"])]
)
def test_the_last_answer_or_all_are_learned(codec, answers, expected):
    """Token by token: answers with their ends, and nothing that others say or that marks a turn."""
    example = TextExample(messages=LONGER)
    ids, labels = codec.encode(example, 99, completion_only=True, answers=answers)
    whole = "<|system|>Be brief.<|end|><|user|>2 + 2?<|end|><|assistant|>4<|end|>"
    whole += "<|user|>Times 2?<|end|><|assistant|>8<|end|>"
    assert codec.tokenizer.decode(ids, skip_special_tokens=False) == whole
    assert learned(codec, labels) == expected
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    short, cut = codec.encode(example, 9, completion_only=True, answers=answers)
    assert (short, cut) == (ids[-9:], labels[-9:])


def test_roles_are_told_apart(codec):
    """The same words said by others are not learned: the check above can fail."""
    swapped = [{**message, "role": "user"} for message in LONGER[:-1]]
    example = TextExample(messages=(*swapped, LONGER[-1]))
    labels = codec.encode(example, 99, completion_only=True, answers="all")[1]
    assert learned(codec, labels) == ["8<|end|>"]


def test_a_template_that_forgets_earlier_answers_can_only_learn_the_last(codec):
    forgetting = dataclasses.replace(
        codec,
        template="{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['content'] }};{% endif %}"
        "{% endfor %}",
    )
    example = TextExample(messages=LONGER)
    labels = forgetting.encode(example, 99, completion_only=True)[1]
    assert learned(codec, labels) == ["8;"]
    with pytest.raises(InputRefused, match=r"rewrites.*data\.answers"):
        forgetting.encode(example, 99, completion_only=True, answers="all")


def test_without_a_template_the_default_one_is_used(directory, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    codec = TextCodec.from_directory(tmp_path)
    assert (
        codec.chat(CHAT, answer_next=False)
        == "User: Document this: def f()\nAssistant: Return f.<|end|>"
    )
    labels = codec.encode(TextExample(messages=LONGER), 99, completion_only=True, answers="all")[1]
    assert learned(codec, labels) == ["4<|end|>", "8<|end|>"]


def test_too_long_prompt_loses_its_beginning(codec):
    example = TextExample(prompt=TEXTS[0], completion="done")
    prompt, completion = codec.parts(example)
    ids, labels = codec.encode(example, 20, completion_only=True)
    assert len(ids) == len(labels) == 20
    assert ids[-len(completion) :] == completion
    assert ids[: 20 - len(completion)] == prompt[len(completion) - 20 :]


def test_special_tokens_as_objects_and_named_templates(directory, tmp_path):
    config = {
        "eos_token": {"content": "<|end|>", "lstrip": False},
        "chat_template": [
            {"name": "tool_use", "template": "x"},
            {"name": "default", "template": "{{ eos_token }}!"},
        ],
    }
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    codec = TextCodec.from_directory(tmp_path)
    assert codec.pad_id == codec.end_id
    assert codec.chat(CHAT, answer_next=False) == "<|end|>!"


def test_wrong_files_are_refused(directory, tmp_path):
    with pytest.raises(InputRefused, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CorruptCheckpoint):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|nowhere|>"}')
    with pytest.raises(CorruptCheckpoint, match="nowhere"):
        TextCodec.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ ''.__class__.__mro__ }}", UnsafeInput),
        ("{{ messages.append(1) }}", UnsafeInput),
        ("{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", UnsafeInput),
        ("x" * 300_000, UnsafeInput),
        ("{{ raise_exception('roles must alternate') }}", InputRefused),
        ("{% for %}", InputRefused),
    ],
)
def test_templates_stay_in_the_sandbox(template, error):
    with pytest.raises(error):
        render_chat(template, CHAT, answer_next=False)


def test_template_that_rewrites_the_prompt_is_refused(codec):
    rewriting = dataclasses.replace(
        codec, template="{{ messages | length }}{{ messages[-1]['content'] }}"
    )
    with pytest.raises(InputRefused, match="rewrites"):
        rewriting.parts(TextExample(messages=CHAT))


def test_a_configuration_that_is_no_object_is_refused(directory, tmp_path):
    shutil.copytree(directory, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CorruptCheckpoint, match=r"tokenizer_config\.json: holds a list"):
        TextCodec.from_directory(tmp_path / "copy")


def test_new_tokens_come_behind_all_others_and_are_one_token_each(tmp_path):
    files = train_tokenizer(["some text about tools " * 20], 300)
    more, ids = with_tokens(files, ("<|tool|>", "<|end_of_tool|>"))
    count = load(files, tmp_path / "old").get_vocab_size()
    assert ids == (count, count + 1)
    old, new = load(files, tmp_path / "old"), load(more, tmp_path / "new")
    text = "use<|tool|>add<|end_of_tool|> it"
    encoded = new.encode(text)
    assert [i for i in encoded.ids if i >= count] == [*ids]
    assert new.decode(encoded.ids) == text  # no special token, so it is shown
    assert old.encode("no such token").ids == new.encode("no such token").ids
    assert old.encode(text).ids != encoded.ids
    assert with_tokens(files, ()) == (files, ())
    assert with_tokens(files, ("<|tool|>", "<|end_of_tool|>")) == (more, ids)


def test_a_token_of_the_vocabulary_is_not_new(tmp_path):
    files = train_tokenizer(["some text"], 300)
    for known in ("<|user|>", "a"):
        with pytest.raises(InputRefused, match="is in the base's vocabulary already"):
            with_tokens(files, ("<|tool|>", known))


def load(files, directory):
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return load_tokenizer(directory)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages[0] | tojson(ensure_ascii=True, sort_keys=True) }}", '{"content": "\\u00fc", "role": "user"}'),
        ("{{ messages[0] | tojson(separators=(',', ':')) }}", '{"role":"user","content":"ü"}'),
        ("a{% generation %}{% set b = 1 %}{{ messages[0].content }}{% endgeneration %}{{ b }}", "aü"),
        ("{{ strftime_now('%Y') if strftime_now is defined else 'no day' }}", "no day"),
    ],
)  # fmt: skip
def test_templates_have_what_transformers_gives_them_but_the_day(template, text):
    message = {"role": "user", "content": "ü"}
    assert render_chat(template, [message], answer_next=False) == text


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ messages[0] + 1 }}", "{{ strftime_now('%Y') }}", "{{ 'a' * messages }}"]
)  # fmt: skip
def test_templates_that_fail_are_refused(template):
    with pytest.raises(InputRefused, match="cannot render these messages"):
        render_chat(template, CHAT, answer_next=False)
