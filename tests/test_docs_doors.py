"""Every code block of README.md and docs/ runs, page by page and from top to bottom, in a folder of its own.

Commands of the program run in this process at toy size: `TOY` is added to what the page says. A command that another
page had on the same files is not carried out again (`Done`). Other commands (scripts, pip) are checked against the
files they name.
"""

import hashlib
import re
import shlex
import tomllib
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import gen_invariance.torchvision_guard  # noqa: F401
from gen_invariance import SpatialTranslator, load_source, make_long_tailed
from gen_invariance.cli.main import run

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").rglob("*.md") if "results" not in path.parts)]

TOY = {
    "fit": ["fit.steps=2", "fit.batch_size=8"],
    "train": ["training.epochs=2", "training.warmup=0", "data.test_images=10"],
    "measure": ["draws=2"],
    "choose": ["steps=20", "splits=1", "data.largest=60", "candidates=[none,rotation@tail]"],
    "inspect": ["inspect.budget=null", "inspect.judge_epochs=1", "inspect.draws=2", "inspect.max_images=40"],
    "augment": ["data.image_size=16", "learn.steps=100", "learn.batch_size=16", "learn.classes=all"],
    "compare": ["image_size=16", "steps=4", "batch_size=8", "seeds=[0,1]"],
    "order": [
        "order.count=2",
        "order.seeds=[0]",
        "order.source.epochs=1",
        "order.source.images_per_class=20",
        "data.test_images=20",
        "order.analysis.resamples=100",
        "order.draws=1",
    ],
    "demo": [
        *("demo.seeds=1", "demo.epochs=2", "demo.spatial_steps=2", "demo.munit_steps=2", "demo.draws=1"),
        "demo.control=false",
    ],
    "benchmark": [
        "orders=0",
        "training_options={epochs: 2, warmup: 0}",
        "fit_options={spatial: {steps: 2, batch_size: 8}, head_from: 10}",
        "measure_options={draws: 2}",
    ],
}
LARGE = {"digits_rot_lt": "data_options={largest: 24, imbalance: 6, test_images: 5, many_above: 12, few_below: 8}"}


def blocks(page):
    """(language, code) of each block that is code: python, bash, or commands without a language."""
    text = page.read_text(encoding="utf-8")
    for language, code in re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        if language or re.match(r"gen-invariance|python |scripts/", code):
            yield language or "bash", code


def execute(page, names):
    for language, code in blocks(page):
        assert language in ("python", "bash", "console")
        if language == "python":
            code = re.sub(r"\bsteps=\d{3,}", "steps=2", code)
            exec(compile(code, f"{page.name}: {code.splitlines()[0]}", "exec"), names)
            continue
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words:
                command(words)


def command(words):
    if words[0] == "gen-invariance":
        verb, rest = words[1], words[2:]
        toy = [] if verb.startswith("-") or rest[:1] == ["list"] else TOY.get(verb, [])
        toy = [*toy, *(LARGE[name] for word in rest if (name := word.removeprefix("benchmark=")) in LARGE)]
        DONE.carry_out([verb, *rest, *toy])
    else:
        check_others(words)


class Done:
    """What commands wrote, by their words and the content of the files that these name."""

    def __init__(self):
        self.written = {}

    def carry_out(self, words):
        key = (*sorted(words), *sorted(digest(path) for path in named_paths(words)))
        if key in self.written:
            for path, content in self.written[key].items():
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                Path(path).write_bytes(content)
            return
        before = files_here()
        assert run(words) == 0, f"{shlex.join(words)} failed"
        after = files_here()
        assert before.keys() <= after.keys()
        self.written[key] = {path: Path(path).read_bytes() for path in after if after[path] != before.get(path)}


DONE = Done()


def files_here():
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in Path().rglob("*") if path.is_file()}


def named_paths(words):
    """Files and folders below the working folder that a command names."""
    values = {value for word in words for value in re.split(r"[\[\],]", word.partition("=")[2]) if value}
    return sorted(path for value in values if (path := Path(value)).exists() and not path.is_absolute())


def digest(path):
    found = hashlib.sha256(str(path).encode())
    for file in sorted(file for file in (path, *path.rglob("*")) if file.is_file()):
        found.update(str(file).encode() + file.read_bytes())
    return found.hexdigest()


def check_others(words):
    """A command of another program: do the scripts, options and extras that it names exist?"""
    words = words[1:] if words[0] == "python" else words
    if words[0] == "-m":
        words = [words[1], *words[2:]] if words[1] == "pip" else [f"{words[1].replace('.', '/')}.py", *words[2:]]
    if words[0] == "pip":
        assert words[1] == "install"
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"[\w-]+", "".join(re.findall(r"\[(.*)\]", words[-1])))) <= set(extras)
        return
    script = ROOT / words[0]
    assert words[0].startswith(("scripts/", "benchmarks/", "studies/", "tests/stress/"))
    text = script.read_text(encoding="utf-8")
    for option in re.findall(r"^--[\w-]+", "\n".join(words), flags=re.MULTILINE):
        assert option in text


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command line sets its own


def photos(folder, sizes):
    """An image folder of real digits, `sizes` images of each class."""
    from PIL import Image

    data = load_source("digits").train
    for label, count in enumerate(sizes):
        (folder / str(label)).mkdir(parents=True)
        for row in (data.labels == label).nonzero().flatten()[:count].tolist():
            Image.fromarray(data.images[row, 0].numpy()).save(folder / str(label) / f"{row}_a.png")


def translator(*, channels=1):
    SpatialTranslator(channels, start=0.3).save_pretrained("runs/fit/translator")


def plain_photos(names):
    photos(Path("photos"), (16, 14, 8))
    photos(Path("photos-test"), (4, 4, 4))


def split_photos(names):
    photos(Path("photos/train"), (14, 12, 10, 6))
    photos(Path("photos/test"), (3, 3, 3, 3))
    data = load_source("digits").train
    arrays = {"train_track": torch.arange(40) // 2, "test_track": torch.arange(90, 110)}
    for part, rows in (("train", slice(40)), ("test", slice(40, 60))):
        arrays |= {f"{part}_images": data.images[rows], f"{part}_labels": data.labels[rows]}
    np.savez("signs.npz", **{name: value.numpy() for name, value in arrays.items()})


def readme(names):
    plain_photos(names)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 10))
    loader = [(torch.rand(10, 1, 16, 16), torch.arange(10))]
    names |= {"counts": torch.arange(20, 120, 10), "loader": loader, "model": model}
    names |= {"criterion": torch.nn.functional.cross_entropy}


def colour_batch(names):
    pytest.importorskip("torchmetrics")
    translator(channels=3)
    generator = torch.Generator().manual_seed(0)
    names |= {"images": torch.rand(8, 3, 32, 32, generator=generator), "labels": torch.arange(8) % 3}


def small_cifar(names):
    """Ten classes of noise about different means, under the name that the page uses."""
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 6), ("test", 4)):
        labels = torch.arange(10).repeat(count)
        noise = torch.randint(60, (len(labels), 3, 8, 8), generator=generator)
        names[f"{part}_images"] = (noise + 15 * labels.view(-1, 1, 1, 1)).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        names[f"{part}_labels"] = labels.numpy()
    np.savez("cifar10.npz", **names)


def batch(names):
    names["images"] = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def training_set(names):
    """`train`, small, long-tailed digits."""
    names["train"] = make_long_tailed(load_source("digits"), largest=40, imbalance=8, rest_is_test=True).train


GIVEN = {
    "README.md": readme,
    "augment-a-folder.md": plain_photos,
    "inspect-a-translator.md": lambda names: (batch(names), training_set(names)),
    "how-it-works.md": lambda names: translator(),
    "measure-my-model.md": lambda names: translator(),
    "photographs.md": plain_photos,
    "plug-into-your-loop.md": colour_batch,
    "run-a-benchmark.md": split_photos,
    "subset_order.md": small_cifar,
    "translators.md": training_set,
}
"""What the reader of a page has: files in the working folder, names in the Python session."""


def grown(names):
    assert len(list(Path("photos-balanced").glob("*/*.png"))) >= 40
    assert names["summary"].before == (16, 14, 8)
    assert sum(names["summary"].after) > 38


def replayed(names):
    assert torch.equal(names["moved"], names["same"])
    assert names["images"].shape == (8, 3, 32, 32)


def tail_only(names):
    moved = (names["moved"] != names["images"]).flatten(1).any(1)
    assert moved.any()
    assert names["probability"][0] == 0
    assert not moved[names["labels"] == 0].any()


CHECKS = {
    "augment-a-folder.md": grown,
    "plug-into-your-loop.md": replayed,
    "how-it-works.md": tail_only,
    "run-a-benchmark.md": lambda names: Path("runs/digits/report/report.html").read_text(),
}


@pytest.mark.parametrize("page", [page for page in PAGES if list(blocks(page))], ids=lambda page: page.stem)
def test_code_blocks_run(page, monkeypatch):
    sent = []
    monkeypatch.setattr(
        "gen_invariance.contrib.pipeline.TranslationPipeline.push_to_hub", lambda _, name: sent.append(name)
    )
    names = {}
    GIVEN.get(page.name, lambda names: None)(names)
    execute(page, names)
    CHECKS.get(page.name, lambda names: None)(names)
    assert sent == re.findall(r"push_to_hub\(\"(.*)\"\)", page.read_text(encoding="utf-8"))


def test_every_page_of_the_tables_above_exists():
    assert set(GIVEN) | set(CHECKS) <= {page.name for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_are_named_exist(page):
    folders = "scripts|benchmarks|studies|examples|tests|configs"
    named = re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./-]*\w)", page.read_text(encoding="utf-8"))
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
