"""Hooks of the site's build: pages that are made from the code, and files of the repository that
pages link to.

A page can say ``<!-- settings -->`` for the tables of all settings. A dotted name in backticks,
such as `iresnet_jax.load`, becomes a link to its place in the reference; the build fails if there
is none.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "iresnet_jax"
FOLDERS = (
    "maths",
    "branches",
    "bijections",
    "models",
    "certification",
    "training",
    "data",
    "runs",
    "evaluation",
)
SHOWN_FILES = (".json", ".jsonl", ".png", ".md")  # of benchmarks/, which pages link to
NUMBERS = {  # names of annotations in arguments.py
    "Count": "integer in [1, inf)",
    "CountOrNone": "integer in [0, inf)",
    "Positive": "(0, inf)",
    "NotNegative": "[0, inf)",
    "Decay": "[0, 1)",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the reference and the repository's own pages and records."""
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
    files.append(File.generated(config, "reference/iresnet_jax.md", content=names_of_the_package()))
    for folder in FOLDERS:
        files.append(File.generated(config, f"reference/{folder}.md", content=reference(folder)))
    shown = [
        path for path in sorted((ROOT / "benchmarks").rglob("*")) if path.suffix in SHOWN_FILES
    ]
    for path in [*shown, ROOT / "tests" / "README.md"]:
        files.append(
            File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path))
        )
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns what a page says for the repository into what it says on the site."""
    del config, files
    if page.file.src_uri.startswith("reference/"):
        return markdown
    if page.file.src_uri == "index.md":  # the README; what is no page loses its link
        markdown = markdown.replace("](docs/", "](").replace('src="docs/', 'src="')
        markdown = re.sub(r"\[([^]]+)\]\((?:notebooks/[^)]*|CONTRIBUTING\.md)\)", r"\1", markdown)
    if page.file.src_uri.startswith("tests/"):
        markdown = re.sub(r"\[([^]]+)\]\(\.\./CONTRIBUTING[^)]*\)", r"\1", markdown)
    markdown = markdown.replace("](../benchmarks/", "](benchmarks/").replace(
        "](../tests/", "](tests/"
    )
    if "<!-- settings -->" in markdown:
        markdown = markdown.replace("<!-- settings -->", "\n".join(settings()))
    fences = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    fences[::2] = [linked(text) for text in fences[::2]]
    return "".join(fences)


def linked(text: str) -> str:
    """Text whose dotted names are links; a bar in the code of a table needs its backslash on
    other sites only.
    """
    text = re.sub(r"`[^`\n]+`", lambda code: code[0].replace(r"\|", "|"), text)
    return re.sub(r"(?<!\[)`(iresnet_jax\.[\w.]+)`", r"[`\1`][\1]", text)


def reference(folder: str) -> str:
    """The page of a folder: every module with its docstrings."""
    modules = [
        path
        for path in sorted((PACKAGE / folder).rglob("*.py"))
        if ast.get_docstring(ast.parse(path.read_text("utf-8")))
    ]
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in modules
    ]
    parts = [f"::: {name}\n    options:\n      heading_level: 2\n" for name in names]
    return "\n".join([f"# iresnet_jax.{folder}\n", *parts])


def names_of_the_package() -> str:
    """The page of what ``import iresnet_jax as ir`` gives, read from its imports."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    rows = ["| name | what it is |", "|---|---|"]
    # imported on first use
    late = [node for block in tree.body if isinstance(block, ast.If) for node in block.body]
    for node in [*tree.body, *late]:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("iresnet_jax"):
            for alias in node.names:
                target = f"{node.module}.{alias.name}"
                rows.append(f"| `ir.{alias.asname or alias.name}` | [`{target}`][{target}] |")
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    beside = [path.stem for path in sorted(PACKAGE.glob("*.py")) if not path.stem.startswith("_")]
    documented = [
        f"::: iresnet_jax.{name}\n    options:\n      heading_level: 2\n"
        for name in functions + beside
    ]
    return "\n".join(
        ["# iresnet_jax\n", "`import iresnet_jax as ir` gives:\n", *rows, "", *documented]
    )


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
    yield from ["", f"### {name}", "", *(ast.get_docstring(found) or "").splitlines(), ""]
    yield from table(f"{name}.", [field for field in fields if field not in inner], lines)
    for field in inner:
        yield from group(classes, f"{name}.", field)


def config_classes() -> dict[str, tuple[ast.ClassDef, list[str]]]:
    """Classes whose names end in ``Config``, and `NoiseSpec`, with the lines of their files."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text("utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and (
                node.name.endswith("Config") or node.name == "NoiseSpec"
            ):
                found[node.name] = (node, source.splitlines())
    return found


def table(prefix: str, fields: list[ast.AnnAssign], lines: list[str]) -> Iterator[str]:
    """Rows for fields of a dataclass."""
    yield from ["| setting | default | allowed | meaning |", "|---|---|---|---|"]
    for field in fields:
        default = ast.unparse(field.value) if field.value else ""
        cells = (
            f"`{prefix}{ast.unparse(field.target)}`",
            f"`{default}`",
            allowed(field.annotation),
            meaning(field, lines),
        )
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def allowed(annotation: ast.expr) -> str:
    """Values that an annotation allows, in words."""
    text = ast.unparse(annotation)
    if text in NUMBERS:
        return NUMBERS[text]
    if found := re.search(r"Range\('(.+?)'\)", text):
        return ("integer in " if text.startswith("Annotated[int") else "") + found[1]
    if text.startswith("Literal["):
        return ", ".join(
            f"`{value}`" for value in ast.literal_eval(text.removeprefix("Literal").strip())
        )
    words = {
        "bool": "`True`, `False`",
        "LogdetConfig": "as `logdet`",
        "tuple[Count, ...]": "integers in [1, inf)",
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
