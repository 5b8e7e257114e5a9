"""Does invariance pass from the classes whose training images meet the nuisance to those whose do not?

    python -m studies.transformed benchmark=digits_rot_lt orders=0-2 out=runs/transformed

Two experiments of one grid. "number": of K classes, k drawn at random (each set within the next) meet the nuisance in
training; eKLD of those k classes and of the others, against k. "single": only the class of one rank in size meets it;
its eKLD, and that of the same class where all classes meet it (Zhou et al. 2022): were invariance passed on, the latter
would be far lower for small classes. Test images always meet it. Stopped and started again, it goes on.
"""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from benchmarks.program import read_settings
from gen_invariance.benchmark.arms import read_arm
from gen_invariance.benchmark.grid import load_grid, make_cells, run_grid
from gen_invariance.benchmark.registry import Benchmark, read_benchmark
from gen_invariance.benchmark.run import parse_numbers
from gen_invariance.experiment.task import prepare
from gen_invariance.files import write_text
from gen_invariance.records import write_csv
from gen_invariance.report.drawing import legend_above, make_canvas, render_png, save_png
from gen_invariance.run import named_generator
from gen_invariance.stats import mean_interval


def sets_of(classes: int, counts: list[int], ranks: list[int]) -> dict[str, tuple[int, ...]]:
    """Transformed ranks by name of the experiment; sets of the first experiment lie within one another."""
    drawn = torch.randperm(classes, generator=named_generator(0, "transformed")).tolist()
    sets = {f"number{count:03d}": tuple(sorted(drawn[:count])) for count in sorted({*counts, classes})}
    return sets | {f"single{rank:03d}": (rank,) for rank in ranks}


def variants(benchmark: Benchmark, sets: dict[str, tuple[int, ...]]) -> list[Benchmark]:
    """The benchmark under each set."""
    return [
        replace(benchmark, name=f"{benchmark.name}_{name}", task=replace(benchmark.task, transformed_ranks=ranks))
        for name, ranks in sets.items()
    ]


def class_figures(frame: pd.DataFrame, benchmark: Benchmark, sets: dict[str, tuple[int, ...]]) -> pd.DataFrame:
    """One row a variant, order and class: its rank in size, whether it met the nuisance, eKLD and accuracy."""
    frame = frame[frame["class_index"].notna() & frame["metric"].isin(["ekld", "accuracy"])]
    table = frame.pivot_table("value", ["benchmark", "order", "class_index", "class_count"], "metric").reset_index()
    table["variant"] = table.pop("benchmark").str.rsplit("_", n=1).str[1]
    rank = {}
    for order in table["order"].unique():
        by_rank = prepare(benchmark.task, seed=int(order)).split.order.tolist()
        rank |= {(order, label): place for place, label in enumerate(by_rank)}
    table["rank"] = [rank[pair] for pair in zip(table["order"], table["class_index"], strict=True)]
    table["met"] = [place in sets[name] for name, place in zip(table["variant"], table["rank"], strict=True)]
    return table


def shown(values: pd.Series) -> str:
    """Mean and interval over orders."""
    interval = mean_interval(values.to_numpy(float))
    return f"{interval.mean:.2f} ± {interval.half_width:.2f}" if interval.count else "–"


def tables(figures: pd.DataFrame, classes: int) -> str:
    """Both experiments as Markdown."""
    lines = ["| Classes that meet the nuisance | eKLD of these (nats) | eKLD of the others (nats) |", "|---|---|---|"]
    many = figures[figures["variant"].str.startswith("number")]
    by = many.groupby(["variant", "met", "order"])["ekld"].mean()
    for name in many["variant"].unique():
        parts = [shown(by[name, met]) if (name, met) in by.index else "–" for met in (True, False)]
        lines.append(f"| {int(name[6:])} of {classes} | {' | '.join(parts)} |")
    lines += [
        "",
        "| Rank in size | Images (mean) | eKLD, this class alone met it | eKLD, all classes met it |",
        "|---|---|---|---|",
    ]
    everywhere = figures[figures["variant"] == f"number{classes:03d}"].set_index(["rank", "order"])["ekld"]
    for name in figures.loc[figures["variant"].str.startswith("single"), "variant"].unique():
        own = figures[(figures["variant"] == name) & figures["met"]]
        rank = int(name[6:])
        cells = [shown(own["ekld"]), shown(everywhere[rank])]
        lines.append(f"| {rank} | {own['class_count'].mean():.0f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def picture(figures: pd.DataFrame) -> bytes:
    """EKLD of both kinds of classes against their number."""
    many = figures[figures["variant"].str.startswith("number")]
    many = many.assign(k=many["variant"].str[6:].astype(int))
    figure, (axes,) = make_canvas(4.2)
    for met, colour, name in ((True, "#0072B2", "met the nuisance in training"), (False, "#D55E00", "did not")):
        table = many[many["met"] == met].pivot_table("ekld", "k", "order")
        interval = mean_interval(table.to_numpy())
        look = {"marker": "o", "color": colour, "label": f"Classes that {name}"}
        axes.errorbar(table.index, interval.mean, yerr=interval.half_width, **look)
    axes.set_xlabel("Classes whose training images meet the nuisance")
    axes.set_ylabel("eKLD (nats)")
    axes.set_ylim(bottom=0)
    legend_above(figure, axes)
    return render_png(figure)


def main() -> None:
    given = read_settings(
        __doc__, benchmark="digits_rot_lt", method="ce_drs", orders="0-2", numbers="1,2,4,6,8", ranks="0,2,4,6,9",
        data_root=None, out=Path("runs/transformed"),
    )  # fmt: skip
    torch.set_num_threads(1)
    benchmark = read_benchmark(given.benchmark, data_root=given.data_root)
    sets = sets_of(benchmark.classes, parse_numbers(given.numbers, "numbers"), parse_numbers(given.ranks, "ranks"))
    cells = make_cells(
        variants(benchmark, sets), lambda variant: [read_arm(given.method, variant)],
        orders=parse_numbers(given.orders, "orders"), seeds=[0],
    )  # fmt: skip
    run_grid(cells, given.out, say=lambda line: print(line, flush=True))
    figures = class_figures(load_grid(cells, given.out), benchmark, sets)
    text = tables(figures, benchmark.classes)
    print(text)
    write_text(given.out / "table.md", text)
    write_csv(figures, given.out / "classes.csv")
    save_png(given.out / "number.png", picture(figures))


if __name__ == "__main__":
    main()
