"""Self-contained pages: no network, no build step, and nothing of the data is parsed as markup.

The data goes in as JSON that can't close its element, is read by the page's scripts and set as
text. A content security policy allows these scripts and styles, by their hashes, and nothing else.
What all pages share (how they look, how numbers read, how elements are made) is in `look/`.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retool.files.durable import replacing

LOOK = Path(__file__).with_name("look")


def make_html(
    kind: str, data: Any, scripts: Sequence[Sequence[Path]], styles: Sequence[Sequence[Path]]
) -> str:
    """A page of this kind ("run report") about `data`: one element for each group of files."""
    made_scripts = [_joined(files) for files in scripts]
    made_styles = [_joined(files) for files in styles]
    parts = {
        "POLICY": content_policy(made_scripts, made_styles),
        "KIND": f"retool: {kind}",
        "STYLES": "".join(f"<style>{style}</style>\n" for style in made_styles),
        "NAME": kind,
        "DATA": embed(data),
        "SCRIPTS": "".join(f"<script>{script}</script>\n" for script in made_scripts),
    }
    rest = (LOOK / "page.html").read_text(encoding="utf-8")
    pieces = []
    for name, content in parts.items():  # in the template's order: what is put in is never searched
        head, _, rest = rest.partition(f"{{{{{name}}}}}")
        pieces += [head, content]
    return "".join([*pieces, rest])


def _joined(files: Sequence[Path]) -> str:
    texts = [file.read_text(encoding="utf-8").strip() for file in files]
    return "\n" + "\n".join(texts) + "\n"


def embed(data: Any) -> str:
    """JSON that is safe inside a script element.

    It has no `<`, `>` or `&`, and no separator that old parsers take for a line's end.
    """
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def content_policy(scripts: Sequence[str], styles: Sequence[str]) -> str:
    """A content security policy that allows the texts of these elements, and nothing else."""
    script_hashes = " ".join(map(_hash, scripts))
    style_hashes = " ".join(map(_hash, styles))
    return (
        f"default-src 'none'; script-src {script_hashes}; style-src {style_hashes}; "
        "base-uri 'none'; form-action 'none'"
    )


def write_page(html: str, path: Path, option: str) -> None:
    """Write it whole or not at all; lone surrogates become question marks.

    Raises ValueError where `path` can't be written; `option` is how to give another.
    """
    try:
        with replacing(path, lasting=False) as file:
            file.write(html.encode("utf-8", errors="replace"))
    except OSError as error:
        raise ValueError(
            f"{path} can't be written ({error.strerror or error}). Give another place: {option}."
        ) from error


def _hash(source: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() + "'"
