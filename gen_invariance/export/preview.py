"""A page that shows what an export did: class sizes before and after, and sources beside their results."""

from __future__ import annotations

import base64
import io
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment
from PIL import Image

from gen_invariance.export.formats.base import Entry, Form
from gen_invariance.export.manifest import read_manifest
from gen_invariance.export.pictures import UnusablePictureError, decode
from gen_invariance.files import write_text

_CLASSES, _SOURCES, _RESULTS, _SIDE = 12, 3, 6, 96

_PAGE = """<!doctype html>
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
<p>{{ total_old }} original{{ "s" if total_old != 1 }}, {{ total_new }} new image{{ "s" if total_new != 1 }}.
Blue: originals; orange: new.
{{ rejected }} result{{ "s were" if rejected != 1 else " was" }} rejected. The manifest lists all of them.</p>
<table><tr><th>class</th><th>before</th><th>after</th><th class="bar"></th></tr>
{% for name, old, new in classes %}<tr><td>{{ name }}</td><td>{{ old }}</td><td>{{ old + new }}</td><td class="bar">
<span class="old" style="width: {{ '%.1f' | format(100 * old / largest) }}%"></span><span class="new"
 style="width: {{ '%.1f' | format(100 * new / largest) }}%"></span></td></tr>
{% endfor %}</table>
{% if reasons %}<h2>Why results were rejected</h2><ul>
{% for reason, count in reasons %}<li>{{ count }}: {{ reason }}</li>{% endfor %}</ul>{% endif %}
<h2>Sources (framed) and their results</h2>
{% for name, figures in pictures %}<h3>{{ name }}</h3>
{% for source, results in figures %}<figure><img class="source" src="{{ source }}" alt="source">
{% for result in results %}<img src="{{ result }}" alt="result">{% endfor %}</figure>{% endfor %}
{% endfor %}
</body></html>
"""


def write_preview(out: Path, form: Form, entries: Mapping[str, Entry]) -> Path:
    """Write `out`/preview.html, one file with its pictures inside, from the manifest and the images written.

    The classes that grew most are shown, a few sources of each. Rows are read one at a time.
    """
    old, new, reasons = Counter(), Counter(), Counter()
    shown: dict[int, dict[str, list[dict]]] = defaultdict(dict)
    for row in read_manifest(out):
        if row["status"] == "rejected":
            reasons[row["reason"]] += 1
        if row["status"] != "kept" or row["part"] != "train":
            continue
        (old if row["kind"] == "original" else new)[row["label"]] += 1
        if row["kind"] == "generated":
            _keep(shown[row["label"]], row)
    grown = [label for label, _ in sorted(new.items(), key=lambda item: (-item[1], item[0]))][:_CLASSES]
    page = (
        Environment(autoescape=True)
        .from_string(_PAGE)
        .render(
            classes=[(name, old[label], new[label]) for label, name in enumerate(form.class_names)],
            largest=max((old[label] + new[label] for label in range(len(form.class_names))), default=1) or 1,
            total_old=old.total(),
            total_new=new.total(),
            rejected=reasons.total(),
            reasons=reasons.most_common(),
            pictures=[(form.class_names[label], _figures(out, form, entries, shown[label])) for label in grown],
        )
    )
    write_text(out / "preview.html", page)
    return out / "preview.html"


def _keep(sources: dict[str, list[dict]], row: dict) -> None:
    """Remember the row if it is one of the first few results of one of the first few sources."""
    if row["source"] in sources or len(sources) < _SOURCES:
        results = sources.setdefault(row["source"], [])
        if len(results) < _RESULTS:
            results.append(row)


def _figures(
    out: Path, form: Form, entries: Mapping[str, Entry], sources: Mapping[str, list[dict]]
) -> list[tuple[str, list[str]]]:
    figures = []
    for key, rows in sources.items():
        try:
            source = _picture(decode(form.read(entries[key])))
        except (OSError, UnusablePictureError):  # it was readable before; the manifest is what counts
            continue
        figures.append((source, [_picture(decode(form.read_back(out, row))) for row in rows]))
    return figures


def _picture(image: Image.Image) -> str:
    """A thumbnail as a data address."""
    scale = _SIDE / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BILINEAR).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
