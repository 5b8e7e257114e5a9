import ast
import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from gen_invariance.errors import DataError, ShapeError
from gen_invariance.records import Record, as_frame
from gen_invariance.report import class_figures, drawing, figures

STRANGE = ["$x$", "a$b", "<script>", "あ\n\t", "", "x" * 300, "50% & _more_^", "\\frac", "\U0001f600", "\x00"]

PLAIN = [f"class {n}" for n in range(10)]


def records(*, classes=6, seeds=3, methods=("DRS", "oracle"), names=None, metrics=("accuracy", "ekld")):
    made = []
    for seed in range(seeds):
        sizes = np.random.default_rng(seed).permutation(np.geomspace(100, 5, classes).astype(int))
        for method in methods:
            for k, size in enumerate(sizes):
                facts = {"benchmark": "b", "method": method, "seed": seed, "config_digest": "c", "class_index": k}
                facts |= {"class_count": int(size), "class_name": names[k] if names else f"k{k}"}
                made += [
                    Record(metric=name, value=(n + 1) / np.log(size + 1), **facts) for n, name in enumerate(metrics)
                ]
    return as_frame(made)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were turned into bytes, so that a test can ask what they show."""
    kept = []
    real = drawing.FigureCanvasAgg
    monkeypatch.setattr(drawing, "FigureCanvasAgg", lambda figure: kept.append(figure) or real(figure))
    return kept


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def overlaps(figure: Figure):
    """Pairs of drawn texts of a figure whose boxes overlap, and texts that leave it."""
    boxes = []
    real = Text.draw

    def note_and_draw(text, renderer):
        if text.get_text().strip() and text.get_visible():
            boxes.append((text.get_text(), text.get_window_extent(renderer).padded(-2)))
        return real(text, renderer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", note_and_draw)
        drawing.FigureCanvasAgg(figure).draw()
    assert boxes
    width, height = figure.bbox.width, figure.bbox.height
    outside = [name for name, box in boxes if min(box.x0, box.y0) < 0 or box.x1 > width or box.y1 > height]
    pairs = itertools.combinations(boxes, 2)
    return [(a, b) for (a, one), (b, other) in pairs if one.overlaps(other)] + outside


def sample_figures(names):
    rng = np.random.default_rng(0)
    frame = records(
        classes=len(names), seeds=1, names=names, methods=names[:5] and ["DRS", *[n for n in names if n][:5]]
    )
    grid = [rng.random((len(names), 8, 8))] * 3
    counts = np.geomspace(500, 5, len(names)).astype(int)
    groups = {"many": counts > 100, "few": counts <= 100}
    width = figures.Widths("Rotation", [1.0, 2.0, 1.5], "degrees", true=2.0, control=[0.1, 0.2, 0.15])
    return {
        "grid": lambda: figures.image_grid(grid, row_labels=names[:3], column_labels=names),
        "bars": lambda: class_figures.class_size_bars(counts, groups, class_names=names),
        "accuracy": lambda: class_figures.accuracy_by_class(frame),
        "ekld": lambda: class_figures.ekld_against_class_size(frame, resamples=50),
        "histogram": lambda: figures.distribution_histogram(
            rng.normal(size=50), rng.normal(size=50), name="a", unit="s"
        ),
        "widths": lambda: figures.widths_with_interval([width, figures.Widths("Gain", [0.1])]),
    }


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("kind", "names"),
    [(kind, STRANGE) for kind in ("grid", "bars", "accuracy", "ekld", "histogram", "widths")]
    + [("bars", PLAIN), ("accuracy", PLAIN)],
)
def test_every_figure_is_a_wide_picture_without_overlapping_text(kind, names, drawn):
    png = sample_figures(names)[kind]()
    assert pixels(png).shape[1] == 1800
    assert pixels(png).std() > 1
    (figure,) = drawn
    assert overlaps(figure) == []


def test_equal_input_gives_equal_bytes():
    first, second = (sample_figures(["a", "b", "c", "d"])["ekld"]() for _ in range(2))
    assert first == second


def test_pyplot_and_its_global_state_are_never_imported():
    sources = [path.read_text() for path in Path(figures.__file__).parent.glob("*.py")]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    imports = [ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    assert any("matplotlib.figure" in line for line in imports)
    assert not [line for line in imports if "pyplot" in line or "rcParams" in line]


@pytest.mark.parametrize("channels", [0, 1, 3])
@pytest.mark.parametrize("kind", ["uint8", "float", "tensor"])
def test_the_grid_shows_each_image_where_it_belongs(channels, kind, drawn):
    shape = (3, channels, 8, 8) if channels else (3, 8, 8)
    images = np.random.default_rng(0).integers(0, 256, (2, *shape), dtype=np.uint8)
    given = {"uint8": images, "float": (images / 255).astype(np.float32), "tensor": torch.from_numpy(images)}[kind]
    figures.image_grid([given[0], given[1][:2]], row_labels=["a", "b"])
    (shown,) = [image.get_array() for axes in drawn[0].axes for image in axes.images]
    assert shown.shape == (17, 26, 3)
    for row, column in [(0, 0), (0, 2), (1, 1)]:
        tile = shown[row * 9 : row * 9 + 8, column * 9 : column * 9 + 8]
        expected = images[row, column].reshape(max(channels, 1), 8, 8).transpose(1, 2, 0) / 255
        np.testing.assert_allclose(tile, np.broadcast_to(expected, (8, 8, 3)), atol=1e-6)
    assert (shown[9:, 18:] == 1).all()


def test_a_grid_that_cannot_be_is_refused():
    tile = np.zeros((2, 1, 8, 8))
    with pytest.raises(DataError, match="at least one image"):
        figures.image_grid([], row_labels=[])
    with pytest.raises(ShapeError, match="as many row labels"):
        figures.image_grid([tile, tile], row_labels=["a"])
    with pytest.raises(ShapeError, match="one size"):
        figures.image_grid([tile, np.zeros((1, 1, 9, 9))], row_labels=["a", "b"])
    with pytest.raises(ShapeError, match="channel axis second"):
        figures.image_grid([np.zeros((2, 8, 8, 3))], row_labels=["a"])


def test_bars_stand_in_order_of_size(drawn):
    counts = torch.tensor([5, 500, 50])
    masks = {"many": counts > 100, "medium": counts == 50, "few": counts < 20}
    class_figures.class_size_bars(counts, masks, class_names=["a", "b", "c"])
    axes = drawn[0].axes[0]
    assert [bar.get_height() for bar in axes.patches] == [500, 50, 5]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["b", "c", "a"]
    with pytest.raises(ShapeError, match="exactly one group"):
        class_figures.class_size_bars(counts, {"many": counts > 100})
    with pytest.raises(ShapeError, match="2 class names for 3 classes"):
        class_figures.class_size_bars(counts, masks, class_names=["a", "b"])


def test_classes_are_lined_up_by_size_within_each_seed(drawn):
    class_figures.accuracy_by_class(records(classes=6, seeds=4))
    axes = drawn[0].axes[0]
    expected = 100 / np.log(np.geomspace(100, 5, 6).astype(int) + 1)
    for line in [container.lines[0] for container in axes.containers]:
        np.testing.assert_allclose(line.get_ydata(), expected)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["100", "54", "30", "16", "9", "5"]


def test_names_are_shown_where_all_seeds_agree_on_them(drawn):
    class_figures.accuracy_by_class(records(classes=3, seeds=1))
    ticks = [tick.get_text() for tick in drawn[0].axes[0].get_xticklabels()]
    assert sorted(tick.split(" ")[0] for tick in ticks) == ["k0", "k1", "k2"]
    assert [tick.split(" ")[1] for tick in ticks] == ["(100)", "(22)", "(5)"]


def test_the_legend_tells_each_methods_slope(drawn):
    frame = records(classes=8, seeds=2)
    x = np.log10(frame["class_count"].astype(float))
    frame["value"] = np.where(frame["method"] == "DRS", 2 - 0.75 * x, 1 + 0.25 * x)
    class_figures.ekld_against_class_size(frame, resamples=50)
    texts = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert texts == ["DRS: -0.75 [-0.75, -0.75]", "oracle: +0.25 [+0.25, +0.25]"]


def test_a_method_looks_the_same_whatever_else_is_drawn(drawn):
    frame = records(methods=("DRS", "MUNIT", "oracle"))
    styles = drawing.method_styles(frame["method"])
    class_figures.accuracy_by_class(frame[frame["method"] == "oracle"], styles=styles)
    class_figures.ekld_against_class_size(frame, styles=styles, resamples=20)
    alone = drawn[0].axes[0].containers[0].lines[0].get_color()
    together = {line.get_color() for line in drawn[1].axes[0].lines}
    assert alone == styles["oracle"].colour
    assert together == {style.colour for style in styles.values()}
    assert len({(style.colour, style.marker) for style in drawing.method_styles(map(str, range(40))).values()}) == 40


def test_missing_classes_and_a_single_class_do_not_stop_a_figure():
    frame = records(classes=4)
    frame.loc[frame["class_index"] == 1, "value"] = np.nan
    one = records(classes=1, seeds=1)
    for some in (frame, one):
        assert class_figures.accuracy_by_class(some)
        assert class_figures.ekld_against_class_size(some, resamples=20)


def test_records_that_do_not_belong_in_one_figure_are_refused():
    frame = records()
    with pytest.raises(DataError, match="no record of 'agreement'"):
        class_figures.accuracy_by_class(frame, metric="agreement")
    both = frame.copy()
    both.loc[both["method"] == "DRS", "benchmark"] = "other"
    mixed = frame.copy()
    mixed.loc[mixed["seed"] == 0, "config_digest"] = "other"
    for wrong in (both, mixed):
        with pytest.raises(DataError, match="one benchmark in one configuration"):
            class_figures.ekld_against_class_size(wrong)


def test_the_histograms_share_bins_and_are_densities(drawn):
    figures.distribution_histogram(
        np.linspace(-1, 1, 1000), np.linspace(-2, 2, 500), name="angle", unit="degrees", bins=8
    )
    axes = drawn[0].axes[0]
    np.testing.assert_allclose([bar.get_height() for bar in axes.containers[0]], 0.25, rtol=0.05)
    outline = axes.patches[-1].get_xy()
    assert outline[:, 1].max() == pytest.approx(0.5, rel=0.05)
    assert set(outline[:, 0]) <= {bar.get_x() for bar in axes.containers[0]} | {2.0}
    assert figures.distribution_histogram([1.0, 1.0, np.nan], None, name="x")
    with pytest.raises(DataError, match="no finite draw of angle"):
        figures.distribution_histogram([np.nan], [1.0], name="angle")


def test_widths_show_mean_truth_and_control(drawn):
    figures.widths_with_interval([figures.Widths("Rotation", [1.0, 3.0], "degrees", true=2.5, control=[0.5])])
    axes = drawn[0].axes[0]
    points = [line.get_xdata()[0] for line in axes.lines if line.get_markersize() == 9]
    assert points == [2.0, 0.5]
    assert any(list(line.get_xdata()) == [2.5, 2.5] for line in axes.lines)
    assert axes.get_xlim()[0] <= 0
    with pytest.raises(DataError, match="at least one parameter"):
        figures.widths_with_interval([])


def test_labels_keep_to_their_limit_and_spell_unknown_letters():
    assert drawing.format_label("a$b") == r"a\$b"
    assert drawing.format_label("あ") == "U+3042"
    assert drawing.format_label("one\n two") == "one two"
    assert drawing.format_label("x" * 50, limit=10) == "x" * 9 + "…"


def test_a_picture_is_saved_whole(tmp_path):
    drawing.save_png(tmp_path / "deep" / "a.png", b"\x89PNG")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.png"]
