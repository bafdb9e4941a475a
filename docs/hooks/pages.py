# SPDX-License-Identifier: Apache-2.0
"""What mkdocs shows beside the files of docs/: the README and its companions, a page per method from the registry, pictures of
results. Links out of docs/ are turned to where these lie in the site."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
TAKEN = {"README.md": "start.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files of the root that are pages of the site."""
LINK = re.compile(r"(?P<bang>!?)\[(?P<text>[^\]]*)\]\((?P<to>[^)\s#]+)(?P<at>#[^)]*)?\)")
PICTURES = ROOT / "runs" / "method-pictures"


def placed(source: str, text: str) -> str:
    """`text` of the file `source` (a path from the root), its relative links turned to where things lie in the site."""

    def turn(match: re.Match[str]) -> str:
        to = match["to"]
        if ":" in to:
            return match[0]
        path = os.path.normpath(os.path.join(os.path.dirname(source), to))
        at = match["at"] or ""
        if path in TAKEN:
            return f"[{match['text']}]({TAKEN[path]}{at})"
        if path.startswith("docs/"):
            return f"{match['bang']}[{match['text']}]({path.removeprefix('docs/')}{at})"
        if path.startswith("assets/") and path.endswith("README.md"):
            return f"[{match['text']}](cards/{path.split('/')[1]}.md)"
        if path.startswith("results/") and path.endswith(".png"):
            return f"{match['bang']}[{match['text']}]({path})"
        return f"{match['text']} (`{path}`)"

    return LINK.sub(turn, text)


def on_files(files: Any, config: Any) -> Any:
    """Add what is generated."""
    sys.path.insert(0, str(ROOT))
    from mmcompress.eval.docs.methods import site

    found: dict[str, Any] = {to: placed(name, (ROOT / name).read_text()) for name, to in TAKEN.items()}
    for card in sorted((ROOT / "assets").glob("*/README.md")):
        found[f"cards/{card.parent.name}.md"] = card.read_text()
    found |= {f"results/{path.name}": path.read_bytes() for path in (ROOT / "results").glob("*.png")}
    found |= site(None if os.environ.get("MMCOMPRESS_DOCS_WITHOUT_PICTURES") else PICTURES)
    for path, content in found.items():
        files.append(File.generated(config, path, content=content))
    methods = sorted(path for path in found if path.startswith("methods/") and path.endswith(".md"))
    at = next(entry for entry in config.nav if "Methods" in entry)
    at["Methods"] = ["methods/index.md", *(path for path in methods if path != "methods/index.md")]
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn the links of the pages of docs/ themselves."""
    source = page.file.src_uri
    deep = "/" in source or source in TAKEN.values()
    return markdown if deep else placed(f"docs/{source}", markdown)
