"""Chat templates: Jinja from the model's own files, never from a request, in a sandbox without attributes to reach.

The environment is the one transformers uses (immutable sandbox, `tojson`, `raise_exception`,
loop controls, marks of what the assistant says), so a template renders the same text in both. One thing
is missing, `strftime_now`: a text that depends on the day would change the model's inputs
from one day to the next, and templates that ask whether it is there have a fixed day instead.
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

_FAILURES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What a template's own expressions raise, as `{{ 1 / 0 }}` does."""
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
        InputRefused: the template refuses these messages, fails on them, or does not parse.
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
    except (jinja2.TemplateError, *_FAILURES) as error:
        raise InputRefused(f"the chat template cannot render these messages ({error})") from error
    return "".join(pieces)


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    return _environment().from_string(template)


def _environment() -> Any:
    sandbox = require("jinja2.sandbox", "train")
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _generation_tag()],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    return environment


def _generation_tag() -> type:
    """`{% generation %}…{% endgeneration %}`, which marks what the assistant says and changes no text."""
    extension, nodes = require("jinja2.ext", "train").Extension, require("jinja2.nodes", "train")

    class Generation(extension):  # type: ignore[misc, valid-type]
        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return Generation


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> None:
    jinja2 = require("jinja2", "train")
    raise jinja2.TemplateError(message)
