"""What the documentation site adds to docs/: README and its siblings, pages of the public API, formulas, outward links.

The API's pages are made from the table in `loraloom/__init__.py`: a comment there begins a page, a name is an entry.
"""

import ast
import importlib
import io
import posixpath
import re
import tokenize
import tomllib
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent
PAGES = {"index.md": "README.md", "changelog.md": "CHANGELOG.md"}
PAGES |= {"contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md"}
LINK = re.compile(r"(\]\()(?!https?:|mailto:|#)([^)\s]+)(\))")
ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):<code>~?(?:[\w.]+\.)?(\w+)</code>")
FORMULA = re.compile(r'<(div|span) class="arithmatex">\s*\\[\[(](.*?)\\[\])]\s*</\1>', re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    # Not as repo_url: the theme would ask GitHub for the number of stars.
    config.extra["social"] = [{"icon": "fontawesome/brands/git-alt", "link": _repository(), "name": "Repository"}]
    config.nav.insert(-1, {"API": [{title: path} for title, path, _ in _api()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path, source in PAGES.items():
        head = "---\nhide: [navigation]\n---\n\n" if path == "index.md" else ""
        files.append(File.generated(config, path, content=head + (ROOT / source).read_text(encoding="utf-8")))
    for title, path, names in _api():
        files.append(File.generated(config, path, content=_api_page(title, names)))
    return files


def on_page_markdown(markdown: str, page, config: MkDocsConfig, files: Files) -> str:
    """Links as they are in the repository become links of the site, or of the repository if the site lacks the file."""
    source = PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    sites = {target: uri for uri, target in PAGES.items()}

    def resolve(found: re.Match[str]) -> str:
        path, _, anchor = found[2].partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        inside = sites.get(target, target.removeprefix("docs/"))
        if files.get_file_from_path(inside) is None:
            return f"{found[1]}{_repository()}/blob/main/{target}{found[3]}"
        relative = posixpath.relpath(inside, posixpath.dirname(page.file.src_uri) or ".")
        return f"{found[1]}{relative}{f'#{anchor}' if anchor else ''}{found[3]}"

    return LINK.sub(resolve, markdown)


def on_page_content(html: str, page, config: MkDocsConfig, files: Files) -> str:
    """Formulas become MathML, which browsers draw without a script or a font of ours."""
    html = ROLE.sub(r"<code>\1</code>", html)
    return FORMULA.sub(_formula, html)


def _formula(found: re.Match[str]) -> str:
    tag, display = found[1], "block" if found[1] == "div" else "inline"
    return f'<{tag} class="formula">{convert(unescape(found[2]).strip(), display)}</{tag}>'


def _repository() -> str:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]


def _api() -> list[tuple[str, str, list[str]]]:
    """(title, page, names) for each comment in the table of public names."""
    source = (ROOT / "src/loraloom/__init__.py").read_text(encoding="utf-8")
    table = next(
        node for node in ast.parse(source).body if isinstance(node, ast.Assign) and "_EXPORTS" in ast.dump(node)
    )
    lines = range(table.lineno, table.end_lineno + 1)
    pages: list[tuple[str, str, list[str]]] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.start[0] not in lines:
            continue
        if token.type == tokenize.COMMENT:
            title = token.string.lstrip("# ")
            title = title[0].upper() + title[1:]
            pages.append((title, f"api/{re.sub(r'[^a-z]+', '-', title.lower())}.md", []))
        elif token.type == tokenize.STRING and not token.string.strip("\"'").startswith("loraloom."):
            pages[-1][2].append(ast.literal_eval(token.string))
    return pages


def _api_page(title: str, names: list[str]) -> str:
    loraloom = importlib.import_module("loraloom")
    entries = []
    for name in names:
        value = getattr(loraloom, name)
        entries.append(f"::: {value.__module__}.{value.__qualname__}\n    options:\n      heading: loraloom.{name}\n")
    return "\n".join([f"# {title}\n", *entries])
