"""HTML pages: one self-contained file each, made from a template of `report/templates`."""

from __future__ import annotations

import base64
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from gen_invariance.errors import DataError
from gen_invariance.files import write_text

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def write_page(template: str, out: Path | str, **values: Any) -> Path:
    """Fill a template, write it to the file `out`, whole or not at all, and return the path.

    Args:
        template: file name in `report/templates`, such as "report.html.j2".
        out: path of the page.
        values: what the template names; text is escaped.

    Raises:
        jinja2.UndefinedError: a value that the template names is missing.
        OutputError: read-only or full disk.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gen_invariance.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    write_text(out, environment.get_template(template).render(values))
    return Path(out)


def data_uri(content: bytes, media_type: str = "image/png") -> str:
    """`content` as an address that needs no file."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


@dataclass(frozen=True)
class Picture:
    """A picture of a page.

    Attributes:
        title: heading.
        caption: what is seen and how to read it.
        alt: the picture in words, for people who do not see it.
        png: the file's bytes.

    Raises:
        DataError: not a PNG, or no alternative text.
    """

    title: str
    caption: str
    alt: str
    png: bytes

    def __post_init__(self) -> None:
        if not self.png.startswith(_PNG_SIGNATURE) or len(self.png) < 24:
            raise DataError(f"figure {self.title!r} is not a PNG; give the bytes of one")
        if not self.alt.strip():
            raise DataError(f"figure {self.title!r} has no alternative text; say in words what it shows")

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return struct.unpack(">II", self.png[16:24])

    @property
    def data_uri(self) -> str:
        """The picture as an address that needs no file."""
        return data_uri(self.png)
