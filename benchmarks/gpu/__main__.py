"""What one GPU can tell in nine minutes: a process for each stage, with its own time, results written as they come.

    python -m benchmarks.gpu out=docs/results/gpu/h100 data=DATA      # all stages, until 500 seconds are over
    python -m benchmarks.gpu stages=info,steps total=200              # some of them
    python -m benchmarks.gpu device=cpu tiny=true out=tried           # a dry run on a CPU, minutes

| stage | what | seconds at most |
|---|---|---|
| info | versions; latency of a launch, of reading a number, of copies; rates | 40 |
| steps | ms, host ms, waits and memory of a step of `fit_classifier`, bare and with each nuisance | 110 |
| variants | the step by hand: TF32, fp32, bf16, a CUDA graph, vmap over 8 models, `torch.compile` | 80 |
| fits | ms of a step of fitting each translator | 50 |
| profile | kernels, and how long the GPU is busy in a step | 50 |
| tests | the tests marked `gpu` | 150 |
| k49 | the pipeline on a stand-in of the size of Kuzushiji-49 | 110 |
| cifar | CIFAR-10-LT, 20 epochs, and what 200 would take; needs `data` with cifar10.npz | 60 |
| cifar_full | 200 epochs, if the estimate says that they fit into what is left | 150 |

`out` gets summary.json, table.txt, log.txt, profile.txt and pytest.txt. A stage that is stopped or fails leaves what it
had, and the others go on. No network is needed. From a checkout; it was never run on a GPU so far.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from benchmarks.gpu.host import ESTIMATE
from benchmarks.program import read_settings

LIMITS = {
    "info": (40, 10), "steps": (110, 20), "variants": (80, 20), "cifar": (60, 20), "k49": (110, 40), "fits": (50, 20),
    "profile": (50, 15), "tests": (150, 30), "cifar_full": (150, 60),
}  # fmt: skip
"""Seconds of each stage at most, and the seconds below which it is not begun; in the order in which they run."""

_HIDDEN = ("places", "peak_mib")  # of the table; summary.json has them


def run_stage(name: str, given: SimpleNamespace, seconds: float, log: Path) -> dict[str, object]:
    """A stage in a process of its own; what it found, also where it was stopped or failed."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        words = [f"device={given.device}", f"tiny={given.tiny}", f"data={given.data}", f"out={given.out}"]
        line = [sys.executable, "-m", "benchmarks.gpu", *words, f"stage={name}", f"result={result}"]
        began = time.monotonic()
        with log.open("a") as file:
            file.write(f"\n===== {name}\n")
            file.flush()
            process = subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                code = process.wait(seconds)
                ended = "done" if code == 0 else f"failed ({code})"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # its pytest workers, too
                process.wait()
                ended = "stopped, its time was over"
        found = json.loads(result.read_text()) if result.exists() else {}
    return {"ended": ended, "seconds": time.monotonic() - began, "result": found}


def table(stages: dict[str, dict]) -> str:
    """What is printed: a line for each figure."""
    lines = []
    for stage, about in stages.items():
        lines.append(f"## {stage}: {about['ended']}, {about['seconds']:.0f} s")
        for name, value in about.get("result", {}).items():
            if isinstance(value, dict):
                value = {key: _short(each) for key, each in value.items() if key not in _HIDDEN}
            lines.append(f"  {name}: {_short(value)}"[: 900 if name in ("failed", "tail") else 260])
    return "\n".join(lines) + "\n"


def _short(value: object) -> object:
    return round(value, 3) if isinstance(value, float) else value


def why_not(name: str, given: SimpleNamespace, stages: dict[str, dict], left: float) -> str | None:
    """Why a stage is left out, if it is."""
    if given.stages and name not in given.stages:
        return ""
    if left < LIMITS[name][1]:
        return "no time left"
    if name.startswith("cifar") and not (Path(given.data) / "cifar10.npz").exists():
        return f"left out, no cifar10.npz in {given.data}"
    if name == "cifar_full":
        expected = stages.get("cifar", {}).get("result", {}).get(ESTIMATE, float("inf"))
        if expected + 10 > left:
            return f"left out, {expected:.0f} s are expected and {left:.0f} s left"
    return None


def main(given: SimpleNamespace) -> None:
    """All stages, one after another."""
    unknown = set(given.stages) - set(LIMITS)
    if unknown:
        sys.exit(f"unknown stage {min(unknown)}; choose of {', '.join(LIMITS)}")
    out, started = Path(given.out), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    stages: dict[str, dict] = {}
    for name, (most, _) in LIMITS.items():
        left = given.total - (time.monotonic() - started)
        reason = why_not(name, given, stages, left)
        if reason == "":
            continue
        if reason is None:
            # A dry run shows that the code works, not that a busy CPU is quick.
            stages[name] = run_stage(name, given, left if given.tiny else min(most, left), out / "log.txt")
        else:
            stages[name] = {"ended": reason, "seconds": 0.0}
        print(f"{name}: {stages[name]['ended']}, {stages[name]['seconds']:.0f} s", flush=True)
        about = {"device": given.device, "tiny": given.tiny, "stages": stages}
        (out / "summary.json").write_text(json.dumps(about, indent=1, default=str))
        (out / "table.txt").write_text(table(stages))
    print(table(stages))


if __name__ == "__main__":
    settings = read_settings(
        __doc__, device="cuda", out="gpu_check", data="data", total=500.0, tiny=False, stages=(), stage=None,
        result=None,
    )  # fmt: skip
    if settings.stage is None:
        main(settings)
    else:
        from benchmarks.gpu.stages import carry_out

        carry_out(settings)
