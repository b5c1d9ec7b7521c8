"""Hooks of the site's build: files of the repository that pages link to, and names of the package.

A dotted name in backticks, such as `iresnet_jax.load`, becomes a link to its place in the
reference; the build fails if there is none. A page of the reference names its modules in a comment.
"""

import ast
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "iresnet_jax"
SHOWN_FILES = (".json", ".jsonl", ".png", ".md")  # of benchmarks/, which pages link to


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the repository's own pages and records."""
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
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
    markdown = markdown.replace("<!-- names -->", names_of_the_package())
    markdown = re.sub(
        r"<!-- modules:(.*?)-->", lambda found: modules(found[1]), markdown, flags=re.S
    )
    if page.file.src_uri == "index.md":  # the README; what is no page loses its link
        markdown = markdown.replace("](docs/", "](").replace('src="docs/', 'src="')
        markdown = re.sub(r"\[([^]]+)\]\((?:notebooks/[^)]*|CONTRIBUTING\.md)\)", r"\1", markdown)
    if page.file.src_uri.startswith(("benchmarks/", "configs/")):
        markdown = markdown.replace("](../docs/", "](../")
    if page.file.src_uri.startswith("tests/"):
        markdown = re.sub(r"\[([^]]+)\]\(\.\./CONTRIBUTING[^)]*\)", r"\1", markdown)
    for folder in ("benchmarks", "configs", "tests"):
        markdown = markdown.replace(f"](../{folder}/", f"]({folder}/")
    fences = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    fences[::2] = [linked(text) for text in fences[::2]]
    return "".join(fences)


def modules(names: str) -> str:
    """The docstrings of modules, for mkdocstrings."""
    return "\n".join(f"::: iresnet_jax.{name}\n" for name in names.split())


def linked(text: str) -> str:
    """Text whose dotted names are links; a bar in the code of a table needs its backslash on
    other sites only.
    """
    text = re.sub(r"`[^`\n]+`", lambda code: code[0].replace(r"\|", "|"), text)
    return re.sub(r"(?<!\[)`(iresnet_jax\.[\w.]+)`", r"[`\1`][\1]", text)


def names_of_the_package() -> str:
    """A table of what ``import iresnet_jax as ir`` gives, read from its imports."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    rows = ["| name | what it is |", "|---|---|", "| `ir.load` | `iresnet_jax.load` |"]
    # imported on first use
    late = [node for block in tree.body if isinstance(block, ast.If) for node in block.body]
    for node in [*tree.body, *late]:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("iresnet_jax"):
            rows += [
                f"| `ir.{alias.asname or alias.name}` | `{node.module}.{alias.name}` |"
                for alias in node.names
            ]
    return "\n".join(rows)
