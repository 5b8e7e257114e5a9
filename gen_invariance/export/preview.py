"""A page that shows what an export did: class sizes before and after, and sources beside their results."""

from __future__ import annotations

import base64
import io
from collections import Counter, defaultdict
from collections.abc import Mapping
from html import escape
from pathlib import Path

from PIL import Image

from gen_invariance.data.readers.pictures import UnusablePictureError
from gen_invariance.export.formats.base import Entry, Format, Row
from gen_invariance.export.manifest import read_manifest
from gen_invariance.export.pictures import decode
from gen_invariance.files import write_text

_CLASSES, _SOURCES, _RESULTS, _SIDE = 12, 3, 6, 96

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Augmented images</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
table { border-collapse: collapse; } td, th { padding: .15rem .6rem; text-align: right; }
th:first-child, td:first-child, .bar { text-align: left; } .bar { width: 24rem; }
.bar span { display: inline-block; height: .8rem; vertical-align: middle; }
.old { background: #3b6ea5; } .new { background: #e08a3c; }
figure { display: inline-block; margin: .2rem .8rem .6rem 0; } img { image-rendering: pixelated; margin-right: 2px; }
img.source { outline: 2px solid #3b6ea5; outline-offset: -2px; }
</style></head><body>
<h1>Augmented images</h1>
"""


def write_preview(out: Path, data: Format, entries: Mapping[str, Entry]) -> None:
    """Write `out`/preview.html, one file with its pictures inside, from the manifest and the images written.

    The classes that grew most are shown, a few sources of each. Rows are read one at a time.
    """
    old, new, reasons = Counter(), Counter(), Counter()
    samples: dict[int, dict[str, list[Row]]] = defaultdict(dict)  # of each class: first results of the first sources
    for row in read_manifest(out):
        label, source = row["label"], row["source"]
        if row["status"] == "rejected":
            reasons[row["reason"]] += 1
        if row["status"] != "kept" or row["part"] != "train":
            continue
        (old if row["kind"] == "original" else new)[label] += 1
        if row["kind"] == "generated" and (source in samples[label] or len(samples[label]) < _SOURCES):
            samples[label].setdefault(source, []).append(row)
            del samples[label][source][_RESULTS:]
    rejected = f"{_counted(reasons.total(), 'result')} {'was' if reasons.total() == 1 else 'were'} rejected"
    page = [
        _HEAD + f"<p>{_counted(old.total(), 'original')}, {_counted(new.total(), 'new image')}.",
        f"Blue: originals; orange: new.\n{rejected}. The manifest lists all of them.</p>",
        '<table><tr><th>class</th><th>before</th><th>after</th><th class="bar"></th></tr>',
    ]
    largest = max([1, *(old[label] + new[label] for label in range(len(data.class_names)))])
    for label, name in enumerate(data.class_names):
        bars = "".join(
            f'<span class="{kind}" style="width: {100 * count / largest:.1f}%"></span>'
            for kind, count in (("old", old[label]), ("new", new[label]))
        )
        cells = f"<td>{escape(name)}</td><td>{old[label]}</td><td>{old[label] + new[label]}</td>"
        page.append(f'<tr>{cells}<td class="bar">{bars}</td></tr>')
    page.append("</table>")
    if reasons:
        page.append("<h2>Why results were rejected</h2><ul>")
        page += [f"<li>{count}: {escape(reason)}</li>" for reason, count in reasons.most_common()]
        page.append("</ul>")
    page.append("<h2>Sources (framed) and their results</h2>")
    for label, _ in sorted(new.items(), key=lambda item: (-item[1], item[0]))[:_CLASSES]:
        page.append(f"<h3>{escape(data.class_names[label])}</h3>")
        page += [_figure(out, data, entries[source], rows) for source, rows in samples[label].items()]
    write_text(out / "preview.html", "\n".join([*page, "</body></html>\n"]))


def _figure(out: Path, data: Format, source: Entry, rows: list[Row]) -> str:
    try:
        images = [f'<img class="source" src="{_thumbnail(data.read(source))}" alt="source">']
    except (OSError, UnusablePictureError):  # it was readable before; the manifest is what counts
        return ""
    images += [f'<img src="{_thumbnail(data.read_back(out, row))}" alt="result">' for row in rows]
    return f"<figure>{''.join(images)}</figure>"


def _thumbnail(content: bytes) -> str:
    """The image as a data address."""
    image = decode(content, side=_SIDE)
    scale = _SIDE / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BILINEAR).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
