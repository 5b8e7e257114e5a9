"""The hot paths that `benchmarks.speed` measures: for each the plain recipe and what the package has for it."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.speed_ekld import ekld_forward, ekld_precision
from benchmarks.speed_munit import generating, munit_per_image, munit_same
from benchmarks.speed_training import loading, nuisances, training_step
from benchmarks.speed_variants import Variant


def starting(device: torch.device) -> list[Variant]:
    """Processor seconds of child processes."""

    def seconds(*command: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def imported(line: str) -> Callable[[], float]:
        """Beyond what torch takes."""
        clock = "import time, torch; t = time.process_time()"
        program = f"{clock}; {line}; print(time.process_time() - t)"

        def run() -> float:
            done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
            return float(done.stdout)

        return run

    command = str(Path(sys.executable).with_name("gen-invariance"))
    common = {"unit": "start"}
    return [
        Variant("python -c pass", "plain", seconds=lambda: seconds(sys.executable, "-c", "pass"), **common),
        Variant("gen-invariance --help", "same", seconds=lambda: seconds(command, "--help"), goal="< 1 s", **common),
        Variant(
            "import gen_invariance, torch not counted", "same", seconds=imported("import gen_invariance"),
            goal="< 1.5 s", **common,
        ),
        Variant(
            "gen_invariance.TailAugment, torch not counted", "same",
            seconds=imported("import gen_invariance; gen_invariance.TailAugment"), **common,
        ),
    ]  # fmt: skip


PATHS: dict[str, Callable[[torch.device], list[Variant]]] = {
    "munit_step_1": lambda device: munit_same(device, 1, ">= 1.5"),
    "munit_step_16": lambda device: munit_same(device, 16, ">= 1.2"),
    "munit_image": munit_per_image,
    "generating": generating,
    "training_step": training_step,
    "loading": loading,
    "nuisances": nuisances,
    "ekld_forward": ekld_forward,
    "ekld_precision": ekld_precision,
    "starting": starting,
}
