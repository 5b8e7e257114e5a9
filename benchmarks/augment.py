"""What `gen-invariance augment` costs at size: a folder of real images of mixed sizes and modes, end to end.

    python -m benchmarks.augment data=cifar10.npz images=20000 [processes=1] [kills=20] [ways=true] [out=DIR]

The images of `data` (an .npz with train_images and train_labels, or an image folder) are drawn long-tailed, scaled
to random sizes from 24 to 128 pixels, and written as JPEG and PNG in grey, colour, palette, transparent, 16-bit and
turned by EXIF. Then the real command runs on a quarter of them and on all. Printed, and written to `out`: images per
second (originals checked and copied, and new ones), processor time, peak memory of the command and its workers (the
sum of their resident sets), time to the first recorded images, and how memory grew from a quarter of the set to all.
With `ways`, all of it once more on two processes and on two Ray workers (extra `ray`), whose processor time is left
out: they are no children of the command, so the system does not count it. With `kills`, all of it once more, killed
by SIGKILL that often at random moments spread over the work, and resumed each time. Outputs are compared with the first
one byte for byte.
"""

import contextlib
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
from PIL import Image

from benchmarks.program import markdown, read_settings
from gen_invariance import MunitTranslator, SpatialTranslator
from gen_invariance.data.readers.folder import read_image_folder
from gen_invariance.files import write_json, write_text
from gen_invariance.run import package_versions

LARGEST_OVER_SMALLEST = 20
SIDES = (24, 128)
HEAD = ["", "originals", "new", "s", "images/s", "processor s", "images/processor s", "first read s", "first new s",
        "peak MiB"]  # fmt: skip
WAYS = {"2 processes": ["processes=2"], "2 Ray workers": ["engine=ray", "processes=2"]}


@dataclass
class Cost:
    """One run of the command; times in seconds, memory in MiB."""

    originals: int
    new: int
    wall: float
    cpu: float
    first_read: float
    first_new: float
    peak: float

    @property
    def rate(self) -> float:
        return (self.originals + self.new) / self.wall


def source_images(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (N, H, W) or (N, H, W, 3), and class numbers."""
    if path.is_dir():
        data, _ = read_image_folder(path, image_size=64, skip_corrupt=True)
        return data.images.permute(0, 2, 3, 1).squeeze(-1).numpy(), data.labels.numpy()
    with np.load(path, allow_pickle=False) as arrays:
        images, labels = arrays["train_images"], arrays["train_labels"]
    return (images.transpose(0, 2, 3, 1) if images.ndim == 4 and images.shape[1] in (1, 3) else images), labels


def write_picture(path: Path, pixels: np.ndarray, draw: random.Random) -> None:
    """One file in a random size, mode and format."""
    size = (draw.randint(*SIDES), draw.randint(*SIDES))
    image = Image.fromarray(pixels.squeeze()).resize(size, Image.Resampling.BICUBIC)
    kind = draw.choice(["jpeg", "jpeg", "jpeg", "png", "palette", "alpha", "grey", "deep", "turned"])
    if kind == "jpeg":
        image.save(path.with_suffix(".jpg"), quality=draw.randint(60, 95))
    elif kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = draw.randint(2, 8)
        image.save(path.with_suffix(".jpg"), exif=exif)
    elif kind == "deep":
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path.with_suffix(".png"))
    else:
        changed = {"png": image, "palette": image.quantize(64) if image.mode == "RGB" else image,
                   "alpha": image.convert("RGBA"), "grey": image.convert("L")}[kind]  # fmt: skip
        changed.save(path.with_suffix(".png"))


def make_folder(root: Path, images: np.ndarray, labels: np.ndarray, count: int) -> None:
    """`count` files, classes falling from the largest to one of a twentieth of its size."""
    draw, names = random.Random(0), np.unique(labels).tolist()
    weights = LARGEST_OVER_SMALLEST ** -np.linspace(0, 1, len(names))
    sizes = np.maximum(1, np.round(weights / weights.sum() * count)).astype(int)
    sizes[0] += count - sizes.sum()
    for name, size in zip(names, sizes.tolist(), strict=True):
        (root / f"class-{name}").mkdir(parents=True)
        rows = np.flatnonzero(labels == name).tolist()
        for number in range(size):
            write_picture(root / f"class-{name}" / f"{number:06d}", images[draw.choice(rows)], draw)


def command(photos: Path, out: Path, translator: Path, options: SimpleNamespace) -> list[str]:
    """The command line that is measured."""
    words = [f"data.path={photos}", f"out={out}", f"translator={translator}", f"data.image_size={options.size}"]
    words += [f"target={options.target}", f"processes={options.processes}", "progress=false", "resume=true"]
    words += [f"batch_size={options.batch}"]
    return [sys.executable, "-m", "gen_invariance.cli.main", "augment", *words]


def resident(process: psutil.Process) -> float:
    """MiB of the process and all below it."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            total += one.memory_info().rss
    return total / 2**20


def started(words: list[str]) -> subprocess.Popen:
    """The command in a process group of its own, so that its workers can be killed with it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)


def measure(words: list[str], out: Path) -> Cost:
    """Run the command once, watching it."""
    cpu, start = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]), time.perf_counter()
    process = started(words)
    watched, peak, first = psutil.Process(process.pid), 0.0, {}
    units = {name: out / ".gen_invariance" / "units" / f"{name}-0000000.jsonl" for name in ("a", "b0")}
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            peak = max(peak, resident(watched))
        for name, path in units.items():
            if name not in first and path.exists():
                first[name] = time.perf_counter() - start
        time.sleep(0.02)
    wall = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"the command failed with exit code {process.returncode}: {' '.join(words)}")
    cpu = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - cpu
    kinds = [json.loads(line)["kind"] for line in kept_rows(out)]
    return Cost(
        originals=kinds.count("original"),
        new=kinds.count("generated"),
        wall=wall,
        cpu=cpu,
        first_read=first.get("a", float("nan")),
        first_new=first.get("b0", float("nan")),
        peak=peak,
    )


def kept_rows(out: Path) -> Iterator[str]:
    """Lines of the manifest about images that are in the output."""
    with open(out / "manifest.jsonl", encoding="utf-8") as file:
        yield from (line for line in file if json.loads(line)["status"] == "kept")


def digest(root: Path) -> str:
    """SHA-256 over names and contents of all files."""
    found = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        found.update(path.relative_to(root).as_posix().encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def kill_and_resume(words: list[str], out: Path, kills: int, total: int) -> tuple[list[int], bool]:
    """Kill the command `kills` times while it works; units recorded at each kill, and whether it ended well at last.

    Killed is when it has recorded a random number of the `total` units since its start, and some random moment later.
    """
    draw, done = random.Random(1), []
    for _ in range(kills):
        before, more = recorded(out), draw.randint(1, max(1, round(1.2 * total / kills)))
        process = started(words)
        while process.poll() is None and recorded(out) < before + more:
            time.sleep(0.002)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0, 0.3))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            done.append(recorded(out))
        process.wait()
    return done, started(words).wait() == 0


def unit_count(options: SimpleNamespace, cost: Cost) -> int:
    """About how many units of work there are: each original is read, and each new image made."""
    return (cost.originals + cost.new) // options.batch


def recorded(out: Path) -> int:
    """Units of work that are done."""
    return len(list((out / ".gen_invariance" / "units").glob("[!.]*.jsonl")))


def table(costs: dict[str, Cost], notes: list[str], options: SimpleNamespace, headline: str) -> str:
    """The figures as Markdown."""
    cells = []
    for name, cost in costs.items():
        counted = "Ray" not in name
        cpu, each = (f"{cost.cpu:.1f}", f"{(cost.originals + cost.new) / cost.cpu:.0f}") if counted else ("–", "–")
        cells.append([
            name, cost.originals, cost.new, f"{cost.wall:.1f}", f"{cost.rate:.0f}", cpu, each,
            f"{cost.first_read:.1f}", f"{cost.first_new:.1f}", f"{cost.peak:.0f}",
        ])  # fmt: skip
    about = (
        f"{options.translator} translator, pictures brought to {options.size} x {options.size}, units of "
        f"{options.batch}, {options.processes} process(es), target={options.target}, {os.cpu_count()} cores."
    )
    lines = [f"    {headline}", "", about, "", markdown(HEAD, cells)]
    small, large = list(costs.values())[:2]
    growth = (large.peak - small.peak) * 1024 / (large.originals - small.originals)
    lines += [f"Memory grew by {large.peak - small.peak:.0f} MiB, {growth:.1f} KiB for each further original.", ""]
    return "\n".join([*lines, *(f"* {note}" for note in notes), ""])


def main() -> None:
    options = read_settings(
        __doc__, data=Path, images=20_000, size=32, translator="spatial", target="median", batch=64, processes=1,
        kills=0, ways=False, out=Path("docs/results/augment"),
    )  # fmt: skip
    images, labels = source_images(options.data)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        small = {"width": 16, "residual_blocks": 2}
        built = SpatialTranslator(3, start=0.3) if options.translator == "spatial" else MunitTranslator(3, **small)
        built.save_pretrained(work / "translator")
        costs, notes = {}, []
        for count in (options.images // 4, options.images):
            make_folder(work / f"photos-{count}", images, labels, count)
            words = command(work / f"photos-{count}", work / f"out-{count}", work / "translator", options)
            costs["a quarter" if count < options.images else "all"] = measure(words, work / f"out-{count}")
            print(f"{count}: {list(costs.values())[-1]}", flush=True)
        expected = digest(work / f"out-{options.images}")

        def compared(what: str, out: Path, ended: bool = True) -> None:
            same = ended and digest(out) == expected
            notes.append(f"{what}: {'the same' if same else 'OTHER'} bytes as all in one process.")
            print(notes[-1], flush=True)

        for name, changes in WAYS.items() if options.ways else ():
            out = work / name.replace(" ", "-")
            words = command(work / f"photos-{options.images}", out, work / "translator", options) + changes
            costs[name] = measure(words, out)
            compared(name, out)
        if options.kills:
            words = command(work / f"photos-{options.images}", work / "killed", work / "translator", options)
            done, ended = kill_and_resume(words, work / "killed", options.kills, unit_count(options, costs["all"]))
            at = ", ".join(map(str, done))
            compared(f"killed {len(done)} times (units recorded by then: {at}) and resumed", work / "killed", ended)
    headline = " ".join(["python -m benchmarks.augment", *sys.argv[1:]]).replace(str(options.data), options.data.name)
    name = f"{options.translator}-{options.images}-{options.processes}"
    text = table(costs, notes, options, headline)
    print(text)
    write_text(options.out / f"{name}.md", text)
    figures = {"command": headline, "versions": package_versions(), "notes": notes}
    write_json(options.out / f"{name}.json", figures | {"runs": {key: asdict(cost) for key, cost in costs.items()}})
    if any("OTHER" in note for note in notes):
        sys.exit(1)


if __name__ == "__main__":
    main()
