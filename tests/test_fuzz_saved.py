"""What `tests/stress/fuzz.py` found in translators, exports and tables: most once ended in a traceback."""

import json

import numpy as np
import pytest
from PIL import Image

from gen_invariance.cli.main import run
from gen_invariance.errors import CheckpointError, DataError, OutputError
from gen_invariance.export.formats.base import open_format
from gen_invariance.export.runner import export_dataset
from gen_invariance.export.settings import ExportSettings
from gen_invariance.nuisance.geometry import Rotation
from gen_invariance.translator.flow.model import FlowTranslator
from gen_invariance.translator.io import load_translator, save_translator
from gen_invariance.translator.munit import model as munit
from gen_invariance.translator.munit.model import MunitTranslator, ResidualBlock
from gen_invariance.translator.redraw.model import RedrawTranslator
from gen_invariance.translator.redraw.pose import PoseTranslator
from gen_invariance.translator.spatial import SpatialTranslator

SETTINGS = ExportSettings(target=4, off_distribution=None)
KINDS = {
    "flow": lambda: FlowTranslator(width=8, bank_size=4),
    "munit": lambda: MunitTranslator(width=4, residual_blocks=1, mlp_width=8, bank_size=16),
    "pose": lambda: PoseTranslator(width=4, bank_size=4),
    "redraw": lambda: RedrawTranslator(width=4, bank_size=4),
    "spatial": lambda: SpatialTranslator(),
}


@pytest.fixture
def photos(tmp_path):
    noise = np.random.default_rng(0)
    for name, count in (("cat", 4), ("dog", 2)):
        (tmp_path / "in" / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(noise.integers(0, 256, (16, 16), np.uint8)).save(tmp_path / "in" / name / f"{number}.png")
    return tmp_path / "in"


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


# ---- translators


@pytest.mark.parametrize("kind", KINDS)
def test_a_translator_of_each_kind_is_read_as_it_was_written(kind, tmp_path):
    written = KINDS[kind]()
    save_translator(written, tmp_path / "t")
    read = load_translator(tmp_path / "t").state_dict()
    assert all(value.equal(read[name]) for name, value in written.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", ["1e999", "../../escape", "{0}", [1], True, 1.5])
def test_channels_that_are_no_number(kind, channels, tmp_path):
    save_translator(KINDS[kind](), tmp_path / "t")
    change_config(tmp_path / "t", channels=channels)
    with pytest.raises(CheckpointError, match=r"config\.json: channels must be a whole number"):
        load_translator(tmp_path / "t")


@pytest.mark.parametrize(
    "change",
    [
        {"residual_blocks": 1_000_000}, {"residual_blocks": 4}, {"width": 10**9}, {"width": 64}, {"bank_size": 10**9},
        {"bank_size": 8}, {"style_downsamples": 10**9}, {"downsamples": 60}, {"mlp_width": 10**12}, {"style_dim": -1},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_of_other_sizes_than_the_weights_is_refused_before_it_is_built(change, tmp_path, capfd, monkeypatch):
    save_translator(KINDS["munit"](), tmp_path / "t")
    change_config(tmp_path / "t", **change)
    built = []
    monkeypatch.setattr(munit, "ResidualBlock", lambda width: built.append(width) or ResidualBlock(width))
    assert run(["augment", f"data.path={tmp_path}", f"translator={tmp_path / 't'}", f"out={tmp_path / 'out'}"]) == 2
    assert len(built) < 20, "once a million, 12 s and 1.4 GB"
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "config" in lines[0]


def test_a_bank_that_the_config_does_not_name(tmp_path, capfd):
    """diffusers warned of it beside the line."""
    save_translator(KINDS["munit"](), tmp_path / "t")
    change_config(tmp_path / "t", bank_size=0)
    assert run(["augment", f"data.path={tmp_path}", f"translator={tmp_path / 't'}", f"out={tmp_path / 'out'}"]) == 2
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_a_name_that_is_a_list(tmp_path, capsys):
    assert run(["fit", "translator.name=[spatial]", "fit.steps=1", f"out={tmp_path / 'out'}"]) == 2
    expected = "gen-invariance: unknown translator '[spatial]'; choose one of redraw, "  # texts are taken as typed
    assert capsys.readouterr().err.startswith(expected)


@pytest.mark.parametrize(
    "words",
    ["fit data=[]", "fit translator=[]", "train classifier=[]", "train training=[]", "train stage=[]", "order data=[]"],
)
def test_a_group_of_settings_that_is_an_empty_list(words, tmp_path, capsys):
    assert run([*words.split(), f"out={tmp_path / 'out'}"]) == 2
    name = words.split()[1].removesuffix("=[]")
    message = f"{name}=[] leaves {name} without settings; write {name}=NAME, or leave it out"
    assert capsys.readouterr().err == f"gen-invariance: {message}\n"


def test_a_report_on_no_folder(tmp_path, capsys):
    assert run(["report", "records=[]", f"out={tmp_path / 'out'}"]) == 2
    message = "records=[] names no folder; give one or more that measure wrote"
    assert capsys.readouterr().err == f"gen-invariance: {message}\n"
    assert not (tmp_path / "out").exists()


# ---- exports


def truncated(lines):
    return [*lines[:-1], lines[-1][:40]]


def without_status(lines):
    return [json.dumps({key: value for key, value in json.loads(lines[0]).items() if key != "status"}), *lines[1:]]


def another(name, value):
    return lambda lines: [json.dumps(json.loads(lines[0]) | {name: value}), *lines[1:]]


@pytest.mark.parametrize(
    "change",
    [truncated, without_status, another("label", 99), another("label", -1), another("label", "x"),
     another("status", 3), lambda lines: ["[1]"], lambda lines: ["[" * 100_000], lambda lines: ["\udcff"]],
)  # fmt: skip
def test_the_manifest_of_a_finished_export_was_changed(change, photos, tmp_path):
    out = tmp_path / "out"
    export_dataset(open_format("folder", photos), Rotation(30), out, SETTINGS)
    before = (out / "manifest.jsonl").read_text()
    content = "\n".join(change(before.splitlines())) + "\n"
    (out / "manifest.jsonl").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(OutputError, match=r"manifest\.jsonl is damaged"):
        export_dataset(open_format("folder", photos), Rotation(30), out, SETTINGS, resume=True)
    (out / "manifest.jsonl").write_text(before)
    assert export_dataset(open_format("folder", photos), Rotation(30), out, SETTINGS, resume=True).after == (4, 4)


# ---- tables


def test_names_that_are_not_utf8_beside_nested_ones_in_a_table(photos):
    rows = [{"path": "cat/0.png", "label": label} for label in ("cat", "\udcff\udcfe", [1], 3)]
    (photos / "table.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    with pytest.raises(DataError, match="column 'label' holds nested values, not text"):
        open_format("table", photos / "table.jsonl")
