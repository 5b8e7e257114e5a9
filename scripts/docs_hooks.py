"""For the documentation site: what mkdocs.yml cannot say.

A room's page in docs/reference lists its modules in reading order; those it does not list follow. Docstrings say
`many_above, few_below: bounds of ...` once; the parser of the site looks for one name a line.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import griffe

_GROUPED = re.compile(r"^(?P<indent> {4,})(?P<names>\w+(?:, \w+)+): (?P<text>.*(?:\n(?P=indent) +\S.*)*)", re.MULTILINE)
_SECTION = re.compile(r"^(?P<title>(?:Args|Attributes):\n)(?P<body>(?:(?: {4,}.*)?\n?)+)", re.MULTILINE)

_BOOST = {"results": 0.01, "reference": 0.0005}  # the search counts a word in a title a thousand times


def on_page_markdown(markdown: str, *, page: Any, **kwargs: Any) -> str:
    """Called by mkdocs: a room's page with all modules of the room; the search shows pages in prose first."""
    place = Path(page.file.src_uri)
    if place.parts[0] in _BOOST:
        page.meta.setdefault("search", {"boost": _BOOST[place.parts[0]]})
    if place.parent.name != "reference":
        return markdown
    if place.stem == "index":
        return markdown.replace("<!-- public names -->", table_of_public_names())
    room = Path("gen_invariance", place.stem)
    if room.is_dir():
        markdown += "".join(f"\n::: {module}\n" for module in modules_of(room) if f"::: {module}\n" not in markdown)
    return note_what_is_public(markdown)


def public_names() -> dict[str, str]:
    """Module of each public name."""
    tree = ast.parse(Path("gen_invariance/__init__.pyi").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def table_of_public_names() -> str:
    """Each public name with the first line of its docstring."""
    lines = ["| name | what it is |", "|---|---|"]
    for name, module in public_names().items():
        tree = ast.parse(Path(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8"))
        found = next(node for node in tree.body if getattr(node, "name", None) == name)
        about = (ast.get_docstring(found) or "").partition("\n")[0]
        lines.append(f"| [`{name}`][{module}.{name}] | {about} |")
    return "\n".join(lines)


def note_what_is_public(markdown: str) -> str:
    """`markdown` with a line, before its first module, on what of it is public."""
    modules = re.findall(r"^::: (\S+)", markdown, flags=re.MULTILINE)
    public = [f"[`{name}`][{module}.{name}]" for name, module in public_names().items() if module in modules]
    rest = "all else is private and may change in any version."
    note = f"Public on this page: {', '.join(public)}; {rest}" if public else f"Nothing on this page is public: {rest}"
    return markdown.replace("\n::: ", f"\n{note}\n\n::: ", 1)


def modules_of(room: Path) -> list[str]:
    """Dotted names of the modules in a folder."""
    return [".".join(path.with_suffix("").parts) for path in sorted(room.rglob("*.py")) if path.stem != "__init__"]


class GroupedParameters(griffe.Extension):
    """Splits grouped names in the sections Args and Attributes of every docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of `obj`, if it has one."""
        if obj.docstring is not None:
            obj.docstring.value = separated(obj.docstring.value)


def separated(docstring: str) -> str:
    """`docstring` with one name a line in its sections Args and Attributes.

    Example:
        >>> print(separated("Sizes.\\n\\nArgs:\\n    high, wide: of it."))
        Sizes.
        <BLANKLINE>
        Args:
            high: of it.
            wide: of it.
    """
    return _SECTION.sub(lambda section: section["title"] + _GROUPED.sub(_one_a_line, section["body"]), docstring)


def _one_a_line(found: re.Match[str]) -> str:
    return "\n".join(f"{found['indent']}{name}: {found['text']}" for name in found["names"].split(", "))
