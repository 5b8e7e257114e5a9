"""Do simulated tails predict what helps the real one? Predicted gains of candidates beside their real ones.

    python -m studies.simulated_tails part=predict benchmark=gtsrb200_lt orders=0-4 data_root=DATA out=runs/tails
    python -m studies.simulated_tails part=real benchmark=gtsrb200_lt orders=0-4 data_root=DATA out=runs/tails
    python -m studies.simulated_tails part=table out=runs/tails

`predict` lets the referee (`choose_augmentation`) rank the candidates on the training images of each draw of the
benchmark. `real` trains each candidate on all of them, for `steps` batches of 32, and scores it on test images; the arm
`more_real` is trivialaugment@every_row on the tail filled up with real images. With `weights=DEFAULT` and
`backbone=efficientnet_lite0` both train heads on that backbone's features of `views` augmented views of each image. A
folder of photographs is `benchmark=folder path=FOLDER name=clothing image_size=64 largest=80 imbalance=20`. `table`
prints, and writes to OUT/table.md: balanced accuracy of every candidate, paired differences to the best generic one and
to what the referee chose, the rank correlation of predicted and real gains, and the regret of the choice. Lines that
are there are not measured again, so a stopped study goes on, and several processes may share the draws of one
benchmark.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from scipy.stats import spearmanr

from benchmarks.program import append_line, format_gap, format_mean, markdown, read_lines, read_settings
from gen_invariance.benchmark.registry import Benchmark, read_benchmark
from gen_invariance.benchmark.run import parse_numbers
from gen_invariance.data.images import ImageData
from gen_invariance.experiment.task import Prepared, prepare
from gen_invariance.files import write_text
from gen_invariance.referee.candidates import Candidate, default_candidates, read_candidate
from gen_invariance.referee.choose import choose_augmentation
from gen_invariance.referee.features import build_frozen, cache_held, compute_views, score_head
from gen_invariance.referee.settings import RefereeSettings
from gen_invariance.referee.train import (
    fit_candidate_translator,
    make_train_settings,
    train_candidate,
    translator_key,
)
from gen_invariance.translator.redraw.parts import pick_rows
from gen_invariance.translator.redraw.tone import guess_kind

DATA_SETTINGS = ("path", "image_size", "largest", "imbalance", "cut")
MORE_REAL, MORE_REAL_IS = "more_real", "trivialaugment@every_row"


def main() -> None:
    """Read the settings and do the part that is asked for."""
    given = read_settings(
        __doc__, part=str, benchmark="", orders="0-4", data_root=None, out=str, candidates=(), steps=4000,
        budget="10min", largest=0, cut="", precision="no", batch_size=32, rate=0.1, name="", path="", image_size=0,
        imbalance=0.0, backbone="small_conv", weights="", views=8,
    )  # fmt: skip
    torch.set_num_threads(1)
    out = Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    if given.part == "table":
        text = "\n".join(make_tables(out))
        print(text)
        write_text(out / "table.md", text)
        return
    data = {name: getattr(given, name) for name in DATA_SETTINGS if getattr(given, name)}
    if given.imbalance:
        data["profile"] = "exponential"
    benchmark = read_benchmark(given.benchmark, data_root=given.data_root, changes={"data": data})
    benchmark = replace(benchmark, name=given.name or benchmark.name)
    for order in parse_numbers(given.orders, "orders"):
        prepared = prepare(benchmark.task, seed=order)
        if given.part == "predict":
            predict(benchmark, prepared, order, given, out)
        else:
            measure(benchmark, prepared, order, given, out)


def predict(benchmark: Benchmark, prepared: Prepared, order: int, given: SimpleNamespace, out: Path) -> None:
    """Let the referee rank the candidates of one draw; a line of what it says."""
    path = out / f"predicted-{benchmark.name}.jsonl"
    if any(line["order"] == order for line in read_lines(path)):
        return
    started, folder = time.perf_counter(), out / "choices" / f"{benchmark.name}-{order}"
    choice = choose_augmentation(
        prepared.train, given.candidates or None, read_referee(given, budget=given.budget), out=folder, seed=order,
        resume=(folder / "run.json").exists(), flip_safe=prepared.flip_safe, progress=False,
    )  # fmt: skip
    line = {"benchmark": benchmark.name, "order": order, "seconds": time.perf_counter() - started, **choice.to_json()}
    append_line(path, line)
    print(f"{benchmark.name}, draw {order}: {choice.reason}", flush=True)


def measure(benchmark: Benchmark, prepared: Prepared, order: int, given: SimpleNamespace, out: Path) -> None:
    """Train every candidate of one draw on all training images and score it on test images; a line each."""
    path = out / f"real-{benchmark.name}.jsonl"
    names = list(given.candidates) or [each.name for each in default_candidates(guess_kind_of(prepared.train))]
    done = {line["candidate"] for line in read_lines(path) if line["order"] == order and line["steps"] == given.steps}
    for name in names:
        if name in done:
            continue
        words, train = name, prepared.train
        if name == MORE_REAL:
            words, train = MORE_REAL_IS, prepare(replace(benchmark.task, fill_tail=True), seed=order).train
        started = time.perf_counter()
        train_and_test = score_with_head if given.weights else score_from_scratch
        right = train_and_test(read_candidate(words), train, prepared, order, given)
        labels = prepared.test.labels
        accuracy = torch.stack([right[labels == label].double().mean() for label in range(train.num_classes)])
        present = torch.isfinite(accuracy)
        groups = {name: mask.cpu() & present for name, mask in prepared.groups.items()}
        line = {"benchmark": benchmark.name, "order": order, "candidate": name, "steps": given.steps,
                "rate": given.rate, "precision": given.precision, "balanced": 100 * float(accuracy[present].mean()),
                **{group: 100 * float(accuracy[mask].mean()) for group, mask in groups.items()},
                "seconds": time.perf_counter() - started}  # fmt: skip
        append_line(path, line)
        print(f"{benchmark.name}, draw {order}: {name} {line['balanced']:.1f}", flush=True)


def guess_kind_of(data: ImageData) -> str:
    """The kind that the referee takes images for, "figure" or "photo"."""
    return guess_kind(data.float_images(pick_rows(data)))


def read_referee(given: SimpleNamespace, **changes: object) -> RefereeSettings:
    """How the referee looks at it: from scratch, or through a pretrained backbone."""
    if given.weights:
        changes |= {"backbone": given.backbone, "weights": given.weights, "views": given.views}
    return RefereeSettings(**changes)


@torch.no_grad()
def score_from_scratch(
    candidate: Candidate, train: ImageData, prepared: Prepared, order: int, given: SimpleNamespace
) -> torch.Tensor:
    """Train the backbone with the candidate; which test images it names right, bool (N,)."""
    rates = RefereeSettings(steps=given.steps, batch_size=given.batch_size, learning_rate=given.rate)
    settings = replace(make_train_settings(rates), mixed_precision=given.precision)
    with torch.enable_grad():
        model = train_candidate(
            candidate, train, settings, seed=order, backbone=given.backbone, flip_safe=prepared.flip_safe
        )
    test = prepared.test
    return torch.cat([model(part.float() / 255).argmax(1) for part in test.images.split(512)]) == test.labels


def score_with_head(
    candidate: Candidate, train: ImageData, prepared: Prepared, order: int, given: SimpleNamespace
) -> torch.Tensor:
    """Train a head on features of augmented views; which test images it names right, bool (N,)."""
    settings = read_referee(given)
    model = build_frozen(settings, train)
    fitted = {
        translator_key(each): fit_candidate_translator(each, train, seed=order, flip_safe=prepared.flip_safe)
        for each in candidate.translators
    }
    views = compute_views(model, candidate, train, fitted, settings, seed=order, flip_safe=prepared.flip_safe)
    held = (cache_held(model, prepared.test), prepared.test.labels)
    rows = torch.arange(len(train))
    found = score_head(views, candidate, train.labels, rows, held, num_classes=train.num_classes, seed=order)
    return torch.from_numpy(found)


def make_tables(out: Path) -> list[str]:
    """Tables in Markdown, one for each benchmark, then what they say of the predictions."""
    texts, verdicts = [], []
    for path in sorted(out.glob("real-*.jsonl")):
        name = path.stem.removeprefix("real-")
        real: dict[str, dict[int, dict]] = {}
        for line in read_lines(path):
            real.setdefault(line["candidate"], {})[line["order"]] = line
        predicted = {line["order"]: line for line in read_lines(out / f"predicted-{name}.jsonl")}
        texts.append(f"## {name}\n\n{table_of(real, predicted)}")
        verdicts += verdict_rows(name, real, predicted)
    head = ["set", "draw", "chosen", "its real accuracy", "best generic", "best of all", "regret", "Spearman"]
    return [*texts, markdown(head, verdicts)]


def table_of(real: dict[str, dict[int, dict]], predicted: dict[int, dict]) -> str:
    """A row a candidate: real accuracies, the paired gain over the best generic arm, the gain that was predicted."""
    generic = [name for name in real if is_generic(name)]
    means = {name: np.mean([line["balanced"] for line in real[name].values()]) for name in generic}
    best = max(means, key=lambda name: means[name])
    rows = []
    for name, lines in real.items():
        both = sorted(set(lines) & set(real[best]))
        own, other = ([part[order]["balanced"] for order in both] for part in (lines, real[best]))
        guesses = [guess[name] for guess in map(gains_of, predicted.values()) if name in guess]
        cells = [format_mean([line[key] for line in lines.values()]) for key in ("balanced", "many", "few")]
        gain = "–" if name == best else format_gap(own, other)
        rows.append([f"`{name}`", len(lines), *cells, gain, f"{np.mean(guesses):+.1f}" if guesses else "–"])
    head = ["candidate", "draws", "balanced (%)", "many (%)", "few (%)", f"over `{best}`", "predicted, over none"]
    return markdown(head, rows)


def is_generic(name: str) -> bool:
    """Whether a candidate learns nothing from the data."""
    return name != MORE_REAL and all(word.endswith("@every_row") or word == "none" for word in name.split("+"))


def gains_of(line: dict) -> dict[str, float]:
    """Predicted gain over `none` in points, by candidate."""
    points = {row["name"]: row["gain_over_none"]["points"] for row in line["ranking"]}
    return {name: value for name, value in points.items() if value is not None}


def verdict_rows(name: str, real: dict[str, dict[int, dict]], predicted: dict[int, dict]) -> list[list[object]]:
    """A row a draw that has both parts."""
    rows = []
    for order, line in sorted(predicted.items()):
        gains = gains_of(line)
        accuracy = {each: lines[order]["balanced"] for each, lines in real.items() if order in lines}
        both = [each for each in gains if each in accuracy]
        if len(both) < 3 or line["chosen"] not in accuracy:
            continue
        rank = spearmanr([gains[each] for each in both], [accuracy[each] for each in both]).statistic
        top = max(accuracy[each] for each in both)
        generic = max(accuracy[each] for each in both if is_generic(each))
        mine = accuracy[line["chosen"]]
        figures = [f"{value:.1f}" for value in (mine, generic, top, top - mine)]
        rows.append([name, order, f"`{line['chosen']}`", *figures, f"{rank:.2f}"])
    return rows


if __name__ == "__main__":
    main()
