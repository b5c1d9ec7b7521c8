"""Docstrings as the site shows them: what is written for a reader of the source becomes
Markdown.
"""

import re
from typing import Any

import griffe


def to_markdown(text: str) -> str:
    """The docstring with its tables and formulas as code, and its example as one."""
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    text = re.sub(r"^Example::$", "For example:", text, flags=re.MULTILINE)
    text = re.sub(r"^\.\. math:: (.+)$", r"    \1", text, flags=re.MULTILINE)
    return re.sub(
        r"^==[= ]+$.*^==[= ]+$",
        lambda table: f"```text\n{table[0]}\n```",
        text,
        flags=re.MULTILINE | re.DOTALL,
    )


class Docstrings(griffe.Extension):
    """Rewrites every docstring that has been read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
