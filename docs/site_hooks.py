"""What `make docs` does besides MkDocs itself: it takes in documents that stand outside docs/, makes
the tables of keys and metrics from the code, and refuses a page that would load anything from another
host.
"""

from __future__ import annotations

import posixpath
import re
import sys
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from retool.config.help import by_group, shown_value  # noqa: E402
from retool.config.schema import REQUIRED, Leaf, leaves  # noqa: E402
from retool.report.glossary import BY_PATTERN, MEANINGS, Meaning  # noqa: E402
from retool.rl.config import RLConfig  # noqa: E402
from retool.rl.config import names as rl_names  # noqa: E402
from retool.sft.config import SYNONYMS as SFT_SYNONYMS  # noqa: E402
from retool.sft.config import SFTConfig  # noqa: E402

# Documents of the repository that the site shows, too: where they stand is their address
OUTSIDE = ("benchmarks/RESULTS.md", "benchmarks/results/*.md", "CHANGELOG.md", "CONTRIBUTING.md")
SOURCES = ("examples/*.py", "examples/*.sh")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
FENCES = re.compile(r"(^ *```.*?^ *```$)", re.DOTALL | re.MULTILINE)
CELL_KEY = re.compile(r"(?<=<code>)[^<\s]{20,}(?=</code>)")
MARKER = re.compile(r"^<!-- made of the code: ([\w ]+) -->$", re.MULTILINE)
LOADED = re.compile(
    r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(?:https?:)?//|<link[^>]*rel=["']?"""
    r"""(?:stylesheet|preload|preconnect)[^>]*href=["']?(?:https?:)?//|@import\s+url\(["']?https?:"""
)


# --- what MkDocs calls ---


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the repository's other documents, the examples, and the pages made of the code."""
    for path in _matching(OUTSIDE):
        files.append(File.generated(config, path, content=(ROOT / path).read_text("utf-8")))
    for path in _matching(SOURCES):
        files.append(File.generated(config, f"{path}.md", content=_source_page(path)))
    for command, schema, synonyms in (
        ("sft", SFTConfig, SFT_SYNONYMS),
        ("rl", RLConfig, rl_names.SYNONYMS),
    ):
        text = "\n".join(_keys_page(command, schema, synonyms))
        files.append(File.generated(config, f"keys-{command}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make the tables that the page asks for, and let its links lead to pages of the site."""
    markdown = MARKER.sub(lambda found: "\n".join(TABLES[found[1]]()), markdown)
    generated = page.file.abs_src_path is None or not page.file.abs_src_path.startswith(
        config.docs_dir
    )
    folder = posixpath.dirname(page.file.src_uri)
    here = folder if generated else posixpath.normpath(f"docs/{folder}")
    parts = FENCES.split(markdown)
    for index in range(0, len(parts), 2):
        parts[index] = LINK.sub(lambda found: _link(found, here, folder, files), parts[index])
    return "".join(parts)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let long keys break where they have a dot, not in the middle of a word."""
    return CELL_KEY.sub(lambda found: re.sub(r"(?<=[._=/])", "<wbr>", found[0]), html)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse what a reader's browser would load from another host."""
    if found := LOADED.search(output):
        raise PluginError(f"{page.file.src_uri} loads something from another host: {found[0]}")
    return output


# --- links and pages ---


def _matching(patterns: tuple[str, ...]) -> Iterator[str]:
    for pattern in patterns:
        for path in sorted(ROOT.glob(pattern)):
            yield path.relative_to(ROOT).as_posix()


def _link(found: re.Match[str], here: str, folder: str, files: Files) -> str:
    """A link of the repository as one of the site; its text alone where the site lacks the target.

    `here` is the document's folder in the repository, `folder` its folder on the site.
    """
    picture, text, target, anchor = found.groups()
    if ":" in target or target.startswith("/"):
        return found[0]
    path = posixpath.normpath(posixpath.join(here, target))
    if not (ROOT / path).exists() and not target.startswith("keys-"):
        return found[0]  # MkDocs says so
    address = path.removeprefix("docs/")
    for candidate in (address, f"{address}.md"):
        if files.get_file_from_path(candidate) is not None:
            relative = posixpath.relpath(candidate, folder or ".")
            return f"{picture}[{text}]({relative}{anchor or ''})"
    return text


def _source_page(path: str) -> str:
    language = "python" if path.endswith(".py") else "bash"
    return f"# {path}\n\n```{language}\n{(ROOT / path).read_text('utf-8')}```\n"


# --- what is made of the code ---


def _keys_page(command: str, schema: type, synonyms: Mapping[str, str]) -> Iterator[str]:
    """Every key of a command, by group."""
    yield f"# Keys of `retool {command}`"
    yield ""
    yield f"What `retool {command} --help` says. Write `key=value` on the command line, or the same"
    yield "keys in a YAML file that you name by `config=run.yaml`."
    others: dict[str, list[str]] = {}
    for other, ours in synonyms.items():
        others.setdefault(ours, []).append(other)
    for group, keys in by_group(schema, list(leaves(schema))).items():
        yield from ("", f"## {group or 'without a group'}", "")
        for leaf in keys:
            yield from _key_lines(leaf, others.get(leaf.key, []))


def _key_lines(leaf: Leaf, other_names: list[str]) -> Iterator[str]:
    """A key and what it does, as a term and its definition."""
    default = "required" if leaf.default is REQUIRED else f"default `{shown_value(leaf.default)}`"
    yield f"`{leaf.key}` · {_plain(leaf.expected)} · {default}"
    names = ", ".join(f"`{name}`" for name in other_names)
    also = f" Also spelt {names}." if names else ""
    yield from (f":   {_plain(leaf.doc)}{also}", "")


def _plain(text: str) -> str:
    """Text in which nothing is Markdown or HTML."""
    return re.sub(r"([|*_\\`\[\]{}])", r"\\\1", escape(text, quote=False))


def _metrics() -> Iterator[str]:
    """Every metric's meaning."""
    yield from ("| metric | | unit | better |", "|---|---|---|---|")
    known: dict[str, Meaning] = {**MEANINGS, **BY_PATTERN}
    for name, meaning in known.items():
        written = name.replace("(.+)", "…").replace(r"(\d+)", "N").replace("|", " or ")
        says = f"**{_plain(meaning.title)}.** {_plain(meaning.says)}"
        says = says.replace("{0}", "…").replace("{1}", "N")
        yield f"| `{written}` | {says} | {meaning.unit} | {meaning.better} |"


def _synonyms(names: Mapping[str, str]) -> Iterator[str]:
    yield from ("| written elsewhere | the key here |", "|---|---|")
    for other, ours in names.items():
        if other != ours:
            yield f"| `{other}` | `{ours}` |"


def _ignored() -> Iterator[str]:
    yield from ("| key | elsewhere it … |", "|---|---|")
    for key, does in rl_names.IGNORED.items():
        yield f"| `{key}` | {_plain(does)} |"


TABLES: dict[str, Any] = {
    "metrics": _metrics,
    "sft synonyms": lambda: _synonyms(SFT_SYNONYMS),
    "rl synonyms": lambda: _synonyms(rl_names.SYNONYMS),
    "rl ignored": _ignored,
}
