import base64
import csv
import json
import re
import shutil
import struct
import subprocess
import zlib
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from gen_invariance.errors import DataError, OutputError, SettingsError
from gen_invariance.records import Record, RecordWriter, as_frame
from gen_invariance.report.metrics import PUBLISHED
from gen_invariance.report.pages import Picture
from gen_invariance.report.report_page import write_report
from gen_invariance.report.settings import ReportSettings
from gen_invariance.report.summary import prepare_results
from gen_invariance.report.tables import class_tables, method_tables, to_latex, to_markdown

EVIL = "<script>document.title='owned'</script>"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def png(width=4, height=3):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\x80" * width) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def figure(title="Accuracy by class", **changes):
    return Picture(**{"title": title, "caption": "Falls.", "alt": "A falling line.", "png": png(), **changes})


def records(values, *, metric="balanced_accuracy", benchmark="digits", **changes):
    facts = {"benchmark": benchmark, "metric": metric, "config_digest": "cfg1", "commit": "abc", "seconds": 30.0}
    facts |= {"versions": {"torch": "2.13.0"}, "command": "gen-invariance demo", **changes}
    return [
        Record(method=method, seed=seed, value=value, **facts)
        for method, row in values.items()
        for seed, value in enumerate(row)
    ]


def some_records():
    made = records({"DRS": [0.44, 0.46, 0.45], "learned": [0.68, 0.69, 0.67], "oracle": [0.70, 0.69, 0.71]})
    made += records({"DRS": [1.2, 1.3, 1.1], "learned": [0.6, 0.5, 0.7], "oracle": [0.5, 0.4, 0.3]}, metric="mean_ekld")
    for k, name in enumerate([EVIL, "b & c", "d"]):
        facts = {"metric": "accuracy", "class_index": k, "class_name": name, "class_count": 10 * k + 5}
        made += records({"DRS": [0.1 * k] * 3, "learned": [0.2 * k] * 3}, **facts)
    return as_frame(made)


class Page(HTMLParser):
    """Tags with attributes, and the text that a reader sees."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._hidden = [], "", 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._hidden += tag in ("script", "style")

    def handle_endtag(self, tag):
        self._hidden -= tag in ("script", "style")

    def handle_data(self, data):
        self.text += "" if self._hidden else data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def page(tmp_path):
    settings = ReportSettings(title=EVIL, baseline="DRS", references=("oracle",))
    path = write_report(
        some_records(),
        tmp_path / "report",
        settings,
        pictures=[figure(EVIL), figure()],
        notes=[EVIL],
        command="scripts/demo 'x y'",
    )
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_and_what_lies_beside_it(page, tmp_path):
    folder = tmp_path / "report"
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert found == ["figures/01-script-document-title-owned-script.png", "figures/02-accuracy-by-class.png",
                     "records.csv", "report.html", "summary.csv", "table.md", "table.tex"]  # fmt: skip
    assert (folder / found[1]).read_bytes() == png()
    with open(folder / "records.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(some_records())
    assert json.loads(rows[0]["versions"]) == {"torch": "2.13.0"}
    with open(folder / "summary.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 6 + 6


def test_foreign_text_stays_text(page):
    assert len(page.all("script")) == 1
    assert page.text.count(EVIL) >= 4  # title, heading, note, class name
    assert "b & c" in page.text
    assert [image["alt"] for image in page.all("img")] == ["A falling line."] * 2


def test_the_page_needs_no_other_file_and_no_network(page, tmp_path):
    text = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"https?://|@import|url\(", text) == []
    addresses = [value for _, tag in page.tags for name, value in tag.items() if name in ("src", "href")]
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert "default-src 'none'" in page.all("meta")[3]["content"]
    image = page.all("img")[0]
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == png()
    assert (image["width"], image["height"]) == ("4", "3")


def test_table_and_figures_can_be_reached_by_keyboard(page):
    heads = [tag for tag in page.all("th") if tag.get("scope") == "col"]
    assert len(heads) == len(page.all("button")) == 4 + 4  # methods: name, seeds, two metrics; classes: name, size, two
    assert {tag["aria-sort"] for tag in heads} == {"none"}
    boxes = [tag for tag in page.all("div") if tag.get("class") == "scroll"]
    assert len(boxes) == 4
    assert all(tag["tabindex"] == "0" and tag["aria-label"] for tag in boxes)


def test_the_environment_says_how_to_get_these_figures_again(page):
    for fact in (
        "scripts/demo 'x y'",
        "gen-invariance demo",
        "torch 2.13.0",
        "cfg1",
        "abc",
        "0, 1, 2",
        "4.5 minutes over 9",
    ):
        assert fact in page.text


def table_of(frame, **settings):
    (table,) = method_tables(prepare_results(frame, baseline=settings.pop("baseline", None)), **settings)
    return table


def cells(table, method):
    row = next(row for row in table.rows if row.name == method)
    return dict(zip(table.columns, row.cells, strict=True))


def test_a_cell_shows_mean_interval_and_paired_difference():
    table = table_of(some_records(), baseline="DRS", references=["oracle"])
    assert table.columns == ("Seeds", "Balanced accuracy (%)", "Mean eKLD (nats)")
    # Student's quantile for two degrees of freedom is 4.303; both spreads are .01, so ± 4.303 * .01 / sqrt(3).
    assert cells(table, "learned")["Balanced accuracy (%)"].text == "68.0 ± 2.5"
    assert cells(table, "learned")["Balanced accuracy (%)"].difference == "+23.0 ± 2.5, p .250 (floor .250)"
    assert cells(table, "oracle")["Mean eKLD (nats)"].difference == "−0.800 ± 0.248, p .250 (floor .250)"
    assert cells(table, "DRS")["Balanced accuracy (%)"].difference == ""
    assert {row.name: row.remark for row in table.rows} == {"DRS": "baseline", "learned": "", "oracle": "reference"}


def test_a_gain_is_shown_with_who_pays_for_it():
    """The paired change of each shot group stands behind the last of them, and nothing of groups nobody measured."""
    made = []
    for group, gain in (("many", -0.261), ("few", 0.23), ("balanced", 0.01)):
        made += records({"DRS": [0.5] * 5, "a": [0.5 + gain + noise / 100 for noise in (-2, -1, 0, 1, 2)]},
                        metric=f"{group}_accuracy")  # fmt: skip
    table = table_of(as_frame(made), baseline="DRS")
    names = ("Balanced", "Many-shot", "Few-shot")
    assert table.columns == ("Seeds", *(f"{name} accuracy (%)" for name in names), "Bought where (points)")
    assert cells(table, "a")["Bought where (points)"].text == "many −26.1, few +23.0"
    assert cells(table, "DRS")["Bought where (points)"].text == "–"
    assert cells(table, "a")["Few-shot accuracy (%)"].difference.endswith(", p .0625 (floor .0625)")
    assert "Bought where (points)" not in table_of(as_frame(made)).columns
    for text in (to_markdown([table]), to_latex([table])):
        assert "many" in text
        assert "floor .0625" in text


def test_few_pairs_are_no_headline():
    def remark(**draws):
        values = {name: [0.5 + 0.01 * seed for seed in range(number)] for name, number in draws.items()}
        return table_of(as_frame(records(values)), baseline="DRS").remark

    assert remark(DRS=5, a=5) == ""
    assert remark(DRS=4, a=4) == "Fewer than five draws: not a headline. The comparison with DRS rests on 4 pairs."
    text = "Fewer than five draws: not a headline. The comparison of a, b with DRS rests on 1 to 3 pairs."
    assert remark(DRS=5, a=3, b=1, c=5) == text
    assert table_of(as_frame(records({"a": [0.5]}))).remark == ""  # nothing is compared
    table = table_of(as_frame(records({"DRS": [0.5], "a": [0.6]})), baseline="DRS")
    assert "not a headline" in to_markdown([table])
    assert "% Fewer than five draws" in to_latex([table])


def test_what_was_measured_on_other_data_is_not_compared():
    """Pairs are pairs on the same images: the others are left out, and the table says so."""
    values = {"DRS": [0.5, 0.6, 0.7], "a": [0.8, 0.8, 0.9]}
    made = [replace(record, data_digest=f"{record.seed}" + "x" * (record.method == "a" and record.seed == 1))
            for record in records(values)]  # fmt: skip
    table = table_of(as_frame(made), baseline="DRS")
    assert cells(table, "a")["Balanced accuracy (%)"].difference.startswith("+25.0 ± ")  # of seeds 0 and 2
    assert table.remark.endswith("rests on 2 pairs.")
    assert "No paired difference is shown of a and DRS at seed 1: their data differ." in table.footnotes
    assert not any(cell.best for row in table.rows for cell in row.cells)
    elsewhere = as_frame([*made, *records({"a": [0.1]}, benchmark="other")])
    other = method_tables(prepare_results(elsewhere, baseline="DRS"))[1]
    assert "No paired difference is shown: DRS was not measured on other." in other.footnotes


def test_best_is_marked_only_beyond_the_paired_interval():
    def best(values, metric="balanced_accuracy", **settings):
        table = table_of(as_frame(records(values, metric=metric)), **settings)
        return [row.name for row in table.rows if row.cells[1].best]

    clear = {"a": [0.50, 0.60, 0.70], "b": [0.40, 0.51, 0.59], "c": [0.1, 0.2, 0.3]}
    assert best(clear) == ["a"]  # means overlap widely over seeds, the pairs do not
    assert best(clear, metric="mean_ekld") == ["c"]
    assert best({**clear, "b": [0.40, 0.61, 0.69]}) == []
    assert best({**clear, "oracle": [0.9, 0.9, 0.9]}, references=["oracle"]) == ["a"]
    assert best({"a": [0.9], "b": [0.1]}) == []  # one seed has no interval
    assert best({"a": [0.9, 0.9]}) == []
    assert best(clear, metric="mean_width") == []  # nobody said which direction is better


def test_one_seed_and_missing_figures_have_no_made_up_spread():
    frame = as_frame(records({"a": [0.5], "b": [0.6]}) + records({"a": [3.0]}, metric="fit_seconds"))
    table = table_of(frame, baseline="a")
    assert cells(table, "b")["Balanced accuracy (%)"].text == "60.0"
    assert cells(table, "b")["Balanced accuracy (%)"].difference == "+10.0"
    assert cells(table, "b")["Fitting the nuisance (s)"].text == "–"
    assert np.isnan(cells(table, "b")["Fitting the nuisance (s)"].sort)


def test_published_figures_stand_only_where_they_were_verified():
    assert {(key, entry.value) for key, entry in PUBLISHED.items()} == {
        (("cifar10_lt_if100", "ce_drs+git"), 0.7876), (("cifar100_lt_if100", "ce_drs+git"), 0.4435)}  # fmt: skip
    assert "Published" not in table_of(some_records()).columns
    frame = as_frame(records({"CE": [0.7], "ce_drs+git": [0.78]}, benchmark="cifar10_lt_if100"))
    table = table_of(frame)
    assert cells(table, "ce_drs+git")["Published"].text == "78.76 %"
    assert cells(table, "CE")["Published"].text == "not available"
    assert any("2203.09739" in line and "not run here" not in line for line in table.footnotes)
    alone = table_of(as_frame(records({"CE": [0.4]}, benchmark="cifar100_lt_if100")))
    assert any("ce_drs+git (not run here) 44.35 %" in line for line in alone.footnotes)


def test_markdown_and_latex_escape_what_would_act():
    frame = as_frame(records({"a|b_*<i>": [0.5, 0.6], "50% & $x_1^2$ \\cmd {~}": [0.1, 0.2]}))
    table = table_of(frame)
    markdown = to_markdown([table])
    assert "a\\|b\\_\\*\\<i\\>" in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} == {4}
    latex = to_latex([table])
    assert r"50\% \& \$x\_1\textasciicircum{}2\$ \textbackslash{}cmd \{\textasciitilde{}\}" in latex
    assert r"55.0 $\pm$ 63.5" in latex
    assert latex.count("\\\\\n") == 3


def test_classes_are_listed_by_index_with_their_size_where_it_is_known():
    facts = {"metric": "ekld", "class_index": 10, "class_name": "late"}
    made = records({"a": [0.5, 0.7], "b": [0.2, 0.4]}, **facts)
    for count, name in [(6, "early"), (7, "early")]:
        facts = {"metric": "ekld", "class_index": 2, "class_name": name, "class_count": count, "seed": count}
        made.append(Record(benchmark="digits", method="a", value=1.0, config_digest="cfg1", **facts))
    (table,) = class_tables(prepare_results(as_frame(made)))
    assert table.columns == ("Training images (mean)", "eKLD (nats): a", "eKLD (nats): b")
    shown = [(row.name, *(cell.text for cell in row.cells)) for row in table.rows]
    assert shown == [("early", "6.5", "1.000", "–"), ("late", "–", "0.600", "0.300")]


def test_a_class_that_is_large_in_one_seed_and_small_in_another_is_averaged_over_both():
    made = []
    for seed, (group, count, value) in enumerate([("many", 90, 0.9), ("few", 10, 0.1), ("few", 20, 0.2)]):
        facts = {"metric": "accuracy", "class_index": 0, "class_name": "k", "class_count": count, "group": group}
        made.append(Record(benchmark="digits", method="a", seed=seed, value=value, config_digest="cfg1", **facts))
    (table,) = class_tables(prepare_results(as_frame(made)))
    assert [cell.text for cell in table.rows[0].cells] == ["40", "40.0"]


def test_failed_cells_are_named_until_they_are_finished(tmp_path):
    writer = RecordWriter(tmp_path / "records")
    first, second = records({"DRS": [0.5, 0.6]})
    writer.write_cell([first])
    writer.write_failure(second, ValueError("no image of 'k'"))
    path = write_report(tmp_path, tmp_path / "a", pictures=())
    assert "DRS on digits, seed 1: ValueError: no image of 'k'" in Page(path.read_text()).text
    writer.write_cell([second])
    path = write_report(tmp_path, tmp_path / "a", pictures=())
    assert "Cells that failed" not in Page(path.read_text()).text


def test_bad_input_is_refused_and_nothing_is_written(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(DataError, match="at least one record"):
        write_report(some_records().iloc[:0], out)
    with pytest.raises(SettingsError, match="baseline 'x' has no record"):
        write_report(some_records(), out, ReportSettings(baseline="x"))
    mixed = as_frame(records({"a": [0.1]}) + records({"a": [0.2]}, config_digest="cfg2"))
    with pytest.raises(DataError, match="'cfg1', 'cfg2'"):
        write_report(mixed, out)
    with pytest.raises(DataError, match="is not a PNG"):
        figure(png=b"GIF89a")
    with pytest.raises(DataError, match="no alternative text"):
        figure(alt=" ")
    assert not out.exists()
    assert "20.0" in write_report(mixed, out, ReportSettings(config_digest="cfg2")).read_text()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_report(some_records(), tmp_path / "file" / "report", pictures=())


def in_browser(path, *, width, script):
    """Run `script` in the page with a window of `width` pixels; what it returns, as JSON."""
    probe = path.with_name("probe.html")
    text = path.read_text(encoding="utf-8")
    listen = "<script>window.faults=[];addEventListener('error',e=>faults.push(String(e.message)),true);</script>"
    report = f"document.body.dataset.answer=JSON.stringify((()=>{{{script}}})())"
    wrapped = text.replace("<title>", listen + "<title>").replace("</body>", f"<script>{report}</script></body>")
    # A headless window may refuse to be as narrow as a phone; a frame of that width is laid out like one.
    probe.write_text(wrapped, encoding="utf-8")
    outer = path.with_name("outer.html")
    outer.write_text(
        f"<iframe id=f src=probe.html style='width:{width}px;height:800px;border:0'></iframe><script>f.onload=()=>"
        "{document.body.dataset.answer=f.contentDocument.body.dataset.answer}</script>"
    )
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += ["--virtual-time-budget=4000", "--window-size=1300,900", "--dump-dom", outer.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    answer = Page(shown).all("body")[0]["data-answer"]
    return json.loads(answer)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [390, 1200])
def test_in_a_browser_tables_sort_figures_load_and_the_page_never_scrolls_sideways(page, tmp_path, width):
    script = """
      const table = document.querySelector("table.sortable");
      const names = () => [...table.tBodies[0].rows].map(r => r.cells[0].firstChild.data);
      const press = n => { table.tHead.rows[0].cells[n].querySelector("button").click(); return names(); };
      document.querySelectorAll("details").forEach(d => d.open = true);
      return {first: names(), accuracy: press(2), again: press(2), name: press(0), ekld: press(3),
        sort: [...table.tHead.rows[0].cells].map(c => c.getAttribute("aria-sort")),
        wide: document.documentElement.scrollWidth, inner: innerWidth, title: document.title, faults: window.faults,
        images: [...document.images].map(i => i.complete && i.naturalWidth)};
    """
    found = in_browser(tmp_path / "report" / "report.html", width=width, script=script)
    assert found["inner"] == width
    assert found["wide"] <= width
    assert found["first"] == ["DRS", "learned", "oracle"]
    assert found["accuracy"] == ["oracle", "learned", "DRS"]
    assert found["again"] == ["DRS", "learned", "oracle"]
    assert found["name"] == ["DRS", "learned", "oracle"]
    assert found["ekld"] == ["DRS", "learned", "oracle"]
    assert found["sort"] == ["none", "none", "none", "descending"]
    assert found["title"] == EVIL
    assert found["faults"] == []
    assert found["images"] == [4, 4]
