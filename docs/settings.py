"""The tables of settings in configs/README.md, from the fields and comments of `Config`.

python docs/settings.py    # writes them below the line that names this script
"""

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "iresnet_jax"
PAGE = ROOT / "configs" / "README.md"
MARK = "<!-- tables by docs/settings.py -->\n"
NUMBERS = {  # names of annotations in arguments.py
    "Count": "integer in [1, inf)",
    "CountOrNone": "integer in [0, inf)",
    "Positive": "(0, inf)",
    "NotNegative": "[0, inf)",
    "Decay": "[0, 1)",
}


def settings() -> Iterator[str]:
    """A table for each group of settings, from the fields and comments of `Config` and the
    dataclasses that it consists of.
    """
    classes = config_classes()
    config, lines = classes["Config"]
    fields = [node for node in config.body if isinstance(node, ast.AnnAssign)]
    alone = [node for node in fields if ast.unparse(node.annotation) not in classes]
    yield from ["", "### Of the whole run", "", *table("", alone, lines)]
    for node in fields:
        yield from group(classes, "", node)


def group(
    classes: dict[str, tuple[ast.ClassDef, list[str]]], prefix: str, node: ast.AnnAssign
) -> Iterator[str]:
    """The table of a field that is a dataclass of settings, and those of such fields in it;
    nothing of others.
    """
    if (annotation := ast.unparse(node.annotation)) not in classes:
        return
    found, lines = classes[annotation]
    name, fields = (
        f"{prefix}{ast.unparse(node.target)}",
        [field for field in found.body if isinstance(field, ast.AnnAssign)],
    )
    inner = [field for field in fields if ast.unparse(field.annotation) == "NoiseSpec"]
    said = (ast.get_docstring(found) or "").partition("\n\nAttributes:")[0]
    yield from ["", f"### {name}", "", *said.replace("``", "`").splitlines(), ""]
    yield from table(f"{name}.", [field for field in fields if field not in inner], lines)
    if name == "model":
        stage, lines = classes["StageSpec"]
        fields = [field for field in stage.body if isinstance(field, ast.AnnAssign)]
        fields = [field for field in fields if ast.unparse(field.target) != "branch"]  # in Python
        words = attributes(ast.get_docstring(stage) or "")
        yield from ["", "### model.stages[i]", "", *table("", fields, lines, words)]
    for field in inner:
        yield from group(classes, f"{name}.", field)


def config_classes() -> dict[str, tuple[ast.ClassDef, list[str]]]:
    """Classes whose names end in ``Config``, `NoiseSpec` and `StageSpec`, with the lines of their
    files.
    """
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text("utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and (
                node.name.endswith("Config") or node.name in ("NoiseSpec", "StageSpec")
            ):
                found[node.name] = (node, source.splitlines())
    return found


def table(
    prefix: str, fields: list[ast.AnnAssign], lines: list[str], words: Mapping[str, str] = {}
) -> Iterator[str]:
    """Rows for fields of a dataclass, whose meaning is in words or in comments."""
    yield from ["| setting | default | allowed | meaning |", "|---|---|---|---|"]
    for field in fields:
        default = f"`{ast.unparse(field.value)}`" if field.value else "none"
        cells = (
            f"`{prefix}{ast.unparse(field.target)}`",
            default,
            allowed(field.annotation),
            words.get(ast.unparse(field.target)) or meaning(field, lines),
        )
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def allowed(annotation: ast.expr) -> str:
    """Values that an annotation allows, in words."""
    text = ast.unparse(annotation)
    if text in NUMBERS:
        return NUMBERS[text]
    if found := re.search(r"Range\('(.+?)'\)", text):
        return ("integer in " if text.startswith("Annotated[int") else "") + found[1]
    if found := re.fullmatch(r"(tuple\[)?Literal(\[.+?\])(, \.\.\.\])?", text):
        values = ", ".join(f"`{value}`" for value in ast.literal_eval(found[2]))
        return f"several of {values}" if found[1] else values
    words = {
        "bool": "`True`, `False`",
        "LogdetConfig": "as `logdet`",
        "tuple[Count, ...]": "integers in [1, inf)",
        "tuple[Count, ...] | None": "`None`, integers in [1, inf)",
        "tuple[Positive, ...]": "numbers in (0, inf)",
        "tuple[float, ...]": "numbers",
        "tuple[int, ...] | None": "`None`, integers",
        "tuple[StageSpec, ...]": "see model.stages[i]",
        "tuple[tuple[str, float], ...]": "pairs",
        "str": "text",
    }
    return words.get(text, f"`{text}`")


def meaning(field: ast.AnnAssign, lines: list[str]) -> str:
    """The comment above a field, or on its line."""
    above, number = [], field.lineno - 2
    while lines[number].lstrip().startswith("#"):
        above.insert(0, lines[number].lstrip().removeprefix("#").strip())
        number -= 1
    beside = re.findall(
        r"  # (?!noqa)(.*)$", "\n".join(lines[field.lineno - 1 : field.end_lineno]), re.MULTILINE
    )
    return " ".join([*above, *beside])


def attributes(docstring: str) -> dict[str, str]:
    """What an ``Attributes:`` section says of each field."""
    section = docstring.partition("Attributes:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()).replace("``", "`") for name, text in found}


def page() -> str:
    """The whole page: what is written by hand, and the tables."""
    by_hand = PAGE.read_text("utf-8").partition(MARK)[0]
    return by_hand + MARK + "\n".join(settings()) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
