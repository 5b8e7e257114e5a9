"""Every code block of the two pages for users runs, from top to bottom."""

import re
import shlex
import warnings
from pathlib import Path

import pytest
import torch

import gen_invariance.torchvision_guard  # noqa: F401
from gen_invariance import SpatialTranslator, load_source
from gen_invariance.cli import run

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page):
    found = re.findall(r"^```(\w+)\n(.*?)^```", (DOCS / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    assert found
    return found


def execute(page, names):
    for language, code in blocks(page):
        if language == "bash":
            for line in code.strip().splitlines():
                program, *words = shlex.split(line)
                assert program == "gen-invariance"
                assert run(words) == 0
        else:
            assert language == "python"
            exec(compile(code, f"{page}: {code.splitlines()[0]}", "exec"), names)


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command line sets its own


def test_augment_a_folder(tmp_path):
    from PIL import Image

    data = load_source("digits").train
    for label, count in enumerate((12, 6, 3)):
        (tmp_path / "photos" / str(label)).mkdir(parents=True)
        for row in (data.labels == label).nonzero().flatten()[:count].tolist():
            Image.fromarray(data.images[row, 0].numpy()).save(tmp_path / "photos" / str(label) / f"{row}.png")
    names = {}
    execute("augment-a-folder.md", names)
    assert len(list((tmp_path / "photos-balanced").glob("*/*.png"))) >= 30
    assert names["summary"].before == (12, 6, 3)
    assert sum(names["summary"].after) > 30


def test_plug_into_your_loop(tmp_path):
    pytest.importorskip("torchmetrics")
    SpatialTranslator(3, start=0.3).save_pretrained(tmp_path / "runs" / "fit" / "translator")
    generator = torch.Generator().manual_seed(0)
    names = {"images": torch.rand(8, 3, 32, 32, generator=generator), "labels": torch.arange(8) % 3}
    execute("plug-into-your-loop.md", names)
    assert torch.equal(names["moved"], names["same"])
    assert names["images"].shape == (8, 3, 32, 32)
