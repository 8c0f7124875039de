"""Hooks of MkDocs (mkdocs.yml): what the site needs beyond the pages of docs/.

- CONTRIBUTING.md and CHANGELOG.md become pages.
- A link to a file outside docs/, e.g. ``../examples/digits.toml``, leads to a page that shows this file.
- ``::: dbmpi.NAME`` is rendered from the module that defines the public name.
- Roles in docstrings, e.g. ``:meth:``, are left out, as mkdocstrings shows them as they are written.
- The build ends if a public name is not documented (tools/documented.py).
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel

sys.path.insert(0, str(Path(__file__).parent))
import documented

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

PROJECT = Path(__file__).parent.parent
FROM_ROOT = ("CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"(?<=\]\()(?P<target>[^)#\s:]+)(?P<anchor>#[^)\s]*)?(?=\))")
CODE = re.compile(r"`[^`]+`")
ROLE = re.compile(r":(?:attr|class|func|meth|mod):(?=<code>)")
LANGUAGES = {".py": "python", ".toml": "toml", ".sbatch": "bash", ".sh": "bash"}


def on_config(config: MkDocsConfig) -> None:
    """End the build if the API page is not whole."""
    problems = documented.problems((PROJECT / "docs" / "api.md").read_text(encoding="utf-8"))
    if problems:
        raise PluginError("\n".join(["the public names are not documented:", *problems]))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside docs/, and one for each other file that a page links to."""
    for name in FROM_ROOT:
        files.append(File.generated(config, name, abs_src_path=str(PROJECT / name)))
    for page in list(files.documentation_pages()):
        for match in LINK.finditer(page.content_string):
            path = _path(page.src_uri, match["target"])
            if _page(path) == f"{path}.md" and files.get_file_from_path(f"{path}.md") is None:
                files.append(_shown(config, path))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links and public names into what MkDocs and mkdocstrings resolve."""
    here = page.file.src_uri

    def linked(match: re.Match[str]) -> str:
        found = _page(_path(here, match["target"]))
        target = match["target"] if found is None else posixpath.relpath(found, posixpath.dirname(here) or ".")
        return target + (match["anchor"] or "")

    markdown = LINK.sub(linked, markdown)
    # In a row of a table, Python-Markdown keeps the backslash of a \\| that is code.
    markdown = re.sub(
        r"^\|.*\|$", lambda row: CODE.sub(lambda m: m[0].replace(r"\|", "|"), row[0]), markdown, flags=re.M
    )
    return re.sub(r"^::: dbmpi\.(\w+)$", _rendered, markdown, flags=re.MULTILINE)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leave out the roles before names in docstrings."""
    return ROLE.sub("", html)


def _rendered(match: re.Match[str]) -> str:
    """Return what renders a public name from where it is defined, under its public name."""
    name = match[1]
    return f"::: {documented.home(name)}\n    options:\n      heading: dbmpi.{name}\n      toc_label: dbmpi.{name}"


def _path(page: str, target: str) -> str:
    """Return what a link leads to, from the project's root."""
    folder = "" if page in FROM_ROOT else posixpath.join("docs", posixpath.dirname(page))
    return posixpath.normpath(posixpath.join(folder, target))


def _page(path: str) -> str | None:
    """Return the page or file of the site that stands for a path of the project, if one does."""
    if path in FROM_ROOT:
        return path
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{path}.md" if not path.startswith("..") and (PROJECT / path).is_file() else None


def _shown(config: MkDocsConfig, path: str) -> File:
    """Return a page that shows a file of the project."""
    language = LANGUAGES.get(Path(path).suffix, "text")
    code = (PROJECT / path).read_text(encoding="utf-8")
    content = f"# {path}\n\n````{language}\n{code.rstrip()}\n````\n"
    file = File.generated(config, f"{path}.md", content=content)
    file.inclusion = InclusionLevel.NOT_IN_NAV
    return file
