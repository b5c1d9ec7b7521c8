"""Hooks of the site's build: pages that are made from the code, and files of the repository that
pages link to.

A dotted name in backticks, such as `iresnet_jax.load`, becomes a link to its place in the
reference; the build fails if there is none.
"""

import ast
import re
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


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the reference and the repository's own pages and records."""
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
    files.append(File.generated(config, "reference/iresnet_jax.md", content=names_of_the_package()))
    for folder in FOLDERS:
        files.append(File.generated(config, f"reference/{folder}.md", content=reference(folder)))
    shown = [
        path for path in sorted((ROOT / "benchmarks").rglob("*")) if path.suffix in SHOWN_FILES
    ]
    for path in [*shown, ROOT / "configs" / "README.md", ROOT / "tests" / "README.md"]:
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
    if page.file.src_uri.startswith("configs/"):
        markdown = markdown.replace("](../docs/", "](../")
    if page.file.src_uri.startswith("tests/"):
        markdown = re.sub(r"\[([^]]+)\]\(\.\./CONTRIBUTING[^)]*\)", r"\1", markdown)
    for folder in ("benchmarks", "configs", "tests"):
        markdown = markdown.replace(f"](../{folder}/", f"]({folder}/")
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
