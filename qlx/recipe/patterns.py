"""Regular expressions for names of modules, in recipes and in adapters of unknown origin."""

import re

__all__ = ["refused_pattern"]

_LONGEST = 300
_REPEATS = 3


def refused_pattern(text: str) -> str | None:
    """Why an expression is not matched against names, None if it is.

    Refused is what can backtrack without end (a repeated group) or for long (many wildcards), so that no adapter's
    configuration can hold up who reads it. Recipes are held to the same: what is trained has to be read again.
    """
    repeats = len(re.findall(r"[*+}]", text))
    if len(text) > _LONGEST:
        return f"it is longer than {_LONGEST} characters"
    if re.search(r"\)\s*[*+{]", text):
        return "a repeated group is too complex to match safely"
    if repeats > _REPEATS:
        return f"more than {_REPEATS} of *, + and }} are too complex to match safely"
    try:
        re.compile(text)
    except re.error as error:
        return f"it is no regular expression: {error}"
    return None
