"""Chat templates: Jinja from the model's own files, never from a request, in a sandbox without attributes to reach.

The environment is the one transformers uses (immutable sandbox, `tojson`, `raise_exception`,
loop controls), so a template renders the same text in both.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from qlx.errors import InputRefused, UnsafeInput, require

__all__ = ["DEFAULT_TEMPLATE", "Message", "render_chat"]

Message = Mapping[str, str]
"""`role` (system, user or assistant) and `content`."""

DEFAULT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
"""Used when the tokenizer has no chat template of its own."""

_MAX_TEMPLATE = 2**18
_MAX_TEXT = 2**22


def render_chat(
    template: str,
    messages: Sequence[Message],
    *,
    answer_next: bool,
    specials: Mapping[str, str] | None = None,
) -> str:
    """Render messages; with `answer_next` the text ends where the assistant's answer begins.

    `specials` are token texts by name (`eos_token`, `bos_token`, `pad_token`) for the template to use.

    Raises:
        UnsafeInput: the template or its output is too large, or it tries to leave the sandbox.
        InputRefused: the template refuses these messages or does not parse.
    """
    if len(template) > _MAX_TEMPLATE:
        raise UnsafeInput(f"the chat template is {len(template)} characters long, refused")
    jinja2 = require("jinja2", "train")
    try:
        compiled = _compiled(template)
        variables = {"bos_token": "", "eos_token": "", **(specials or {})}
        pieces: list[str] = []
        length = 0
        for piece in compiled.generate(
            messages=list(messages), add_generation_prompt=answer_next, **variables
        ):
            length += len(piece)
            if length > _MAX_TEXT:
                raise UnsafeInput(
                    "the chat template produced more than 4 million characters, refused"
                )
            pieces.append(piece)
    except jinja2.exceptions.SecurityError as error:
        raise UnsafeInput(f"the chat template tries to leave its sandbox ({error})") from error
    except jinja2.TemplateError as error:
        raise InputRefused(f"the chat template cannot render these messages ({error})") from error
    return "".join(pieces)


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    return _environment().from_string(template)


def _environment() -> Any:
    sandbox = require("jinja2.sandbox", "train")
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    return environment


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    jinja2 = require("jinja2", "train")
    raise jinja2.TemplateError(message)
