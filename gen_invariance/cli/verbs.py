"""The verbs of the command line: each has a settings class and prints what one library call with it gives.

Rooms are imported inside the verbs, so that help is quick.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from gen_invariance.settings import read_settings


def printable(text: str) -> str:
    """`text` without control characters, which a file or class name could use to write over the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _say(line: str) -> None:
    """Print a line at once; of several processes the first does."""
    from gen_invariance.run import is_first_process

    if is_first_process():
        print(printable(line), flush=True)


def _say_all(lines: Iterable[str]) -> None:
    for line in lines:
        _say(line)


@dataclass(frozen=True)
class Verb:
    """A verb of the command line.

    Attributes:
        run: carries the verb out with its settings, and prints.
        home: module of the settings class and its name, such as "experiment.settings:FitRun".
        actions: words that may follow the verb and stand for action=WORD.
        after_stop: what can be done after Ctrl-C or SIGTERM.
    """

    run: Callable[[Any], None]
    home: str
    actions: tuple[str, ...] = ()
    after_stop: str = "run the same command again"

    @property
    def settings(self) -> type:
        """The settings class."""
        module, _, name = self.home.partition(":")
        return getattr(import_module(f"gen_invariance.{module}"), name)

    def __call__(self, config: Mapping[str, Any]) -> None:
        """Carry the verb out with settings as plain values."""
        self.run(read_settings(self.settings, config, ""))


def _fit(settings: Any) -> None:
    from gen_invariance.experiment.auto import AUTO, run_auto_fit
    from gen_invariance.experiment.fit import run_fit

    if settings.translator.name == AUTO:
        chosen, found = run_auto_fit(settings, say=_say)
        if found is None:
            _say_all(["no translator is written", f"ranking: {chosen.file}"])
            return
        fitted = found
    else:
        fitted = run_fit(settings, say=_say)
    _say(f"translator: {fitted.folder / 'translator'}")
    if fitted.sample_grid is not None:
        _say(f"sample grid: {fitted.sample_grid}")
    if hasattr(fitted.translator, "describe"):
        _say_all(fitted.translator.describe().splitlines())


def _train(settings: Any) -> None:
    from gen_invariance.experiment.train import run_train

    folder = run_train(settings, say=_say)
    _say(f"classifier: {folder}")
    _say(f"next: gen-invariance measure run={folder}")


def _measure(settings: Any) -> None:
    from gen_invariance.experiment.evaluate import format_table, measure_run

    measured = measure_run(settings)
    lines = [*measured.prepared.duplicates.lines(), *format_table(measured)]
    _say_all([*lines, f"mistakes: {measured.path / 'mistakes.html'}", f"written: {measured.path}"])


def _predict(settings: Any) -> None:
    from gen_invariance.experiment.predict import check_all_read, format_predicted, run_predict

    predicted = run_predict(settings)
    _say_all(format_predicted(predicted))
    check_all_read(predicted)


def _export(settings: Any) -> None:
    from gen_invariance.experiment.export_model import format_exported, run_export

    _say_all(format_exported(run_export(settings)))


def _report(settings: Any) -> None:
    from gen_invariance.report.report_page import write_report

    page = write_report(settings.records, settings.out, settings, command="gen-invariance report")
    _say(f"report: {page}")


def _demo(settings: Any) -> None:
    from gen_invariance.benchmark.demo import run_demo

    page = run_demo(settings.out, settings.demo, say=_say)
    _say_all((page.parent / "table.md").read_text(encoding="utf-8").splitlines())
    _say(f"report: {page}")


def _inspect(settings: Any) -> None:
    from gen_invariance.experiment.inspect import run_inspect

    inspection, page = run_inspect(settings, say=_say)
    _say_all([*inspection.quality.verdict.lines(), f"page: {page}"])


def _choose(settings: Any) -> None:
    from gen_invariance.experiment.choose import run_choose

    chosen = run_choose(settings, say=_say)
    _say_all([*chosen.choice.lines(), f"written: {chosen.file}"])


def _augment(settings: Any) -> None:
    from gen_invariance.experiment.augment import check_complete, format_summary, run_augment

    summary = run_augment(settings, say=_say)
    _say_all(format_summary(summary))
    check_complete(summary)


def _compare(settings: Any) -> None:
    from gen_invariance.experiment.compare import run_compare

    comparison = run_compare(settings, say=_say)
    _say_all([*comparison.lines(), f"written: {comparison.folder / 'compare.json'}"])


def _order(settings: Any) -> None:
    from gen_invariance.experiment.order import run_order
    from gen_invariance.report.diagram import diagram_text
    from gen_invariance.report.order_page import findings

    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    study = run_order(settings, command=command, say=_say)
    _say_all([*diagram_text(study.order).splitlines(), "", *findings(study)])
    if settings.out is not None:
        _say_all(["", f"records: {Path(settings.out) / 'records'}", f"page: {Path(settings.out) / 'order.html'}"])


def _benchmark(settings: Any) -> None:
    from gen_invariance.benchmark.run import carry_out

    carry_out(settings, say=_say)


_FROM_CHECKPOINT = "the same command with resume=true goes on from the last checkpoint"
_REST_ON_RESUME = "the same command with resume=true goes on with what is left"
_REST = "the same command goes on with what is left"

VERBS: dict[str, Verb] = {
    "fit": Verb(_fit, "experiment.settings:FitRun", after_stop=_FROM_CHECKPOINT),
    "choose": Verb(_choose, "experiment.settings:ChooseRun", after_stop=_REST_ON_RESUME),
    "augment": Verb(_augment, "experiment.settings:AugmentSettings", after_stop=_REST_ON_RESUME),
    "compare": Verb(_compare, "experiment.settings:CompareRun", after_stop=_REST_ON_RESUME),
    "train": Verb(_train, "experiment.settings:TrainRun", after_stop=_FROM_CHECKPOINT),
    "measure": Verb(_measure, "experiment.settings:MeasureRun"),
    "predict": Verb(_predict, "experiment.use_settings:PredictRun"),
    "export": Verb(_export, "experiment.use_settings:ExportRun"),
    "report": Verb(_report, "report.settings:ReportRun"),
    "inspect": Verb(_inspect, "experiment.settings:InspectRun"),
    "order": Verb(_order, "experiment.settings:OrderRun", after_stop=_REST_ON_RESUME),
    "benchmark": Verb(
        _benchmark, "benchmark.settings:BenchmarkRun", actions=("run", "list", "report"), after_stop=_REST
    ),
    "demo": Verb(_demo, "benchmark.settings:DemoRun", after_stop=_REST),
}
