"""Settings of the verbs `benchmark` and `demo`. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field

from gen_invariance.settings import Count, PathText, Text, Workers, settings_class

Options = Mapping[str, Any]


@settings_class("benchmark")
class BenchmarkRun:
    """Settings of the verb `benchmark`.

    Example:
        >>> from gen_invariance import BenchmarkRun
        >>> BenchmarkRun(methods="ce_drs+redraw", orders="0-4").orders
        '0-4'
    """

    action: Literal["run", "list", "report"] = "run"
    """run, list or report: the first word"""
    benchmark: Text | tuple[Text, ...] = "digits_rot_lt"
    """one, or a list; list shows all of them, or those whose names start so"""
    methods: Text | tuple[Text, ...] = "stages"
    """one, or a list"""
    orders: int | Text | tuple[int | str, ...] = "0-2"
    """class orders: a number, 0-2, or a list; images and their draws follow from it"""
    seeds: int | Text | tuple[int | str, ...] = "0"
    """of training"""
    out: PathText = "runs/benchmark"
    """folder; one that holds a grid already goes on"""
    data_root: PathText | None = None
    """folder that holds published sets, each as SOURCE/ or SOURCE.npz; null: the cache"""
    learned: Text | None = None
    """also measure eKLD against this translator, fitted on each class order"""
    processes: Workers = 1
    """workers of one torch thread each; 1 works in this process"""
    shard: Text = "0/1"
    """i/n: do the i-th of n parts, from 0; n machines share out the orders"""
    device: str = "auto"
    """auto, cpu or cuda"""
    baseline: Text | None = None
    """method the others are compared with; null: the first"""
    data_options: Options = field(default_factory=dict)
    """settings that replace the benchmark's: data_options.largest=100"""
    augmentation: str | None = None
    """of every row; null: the benchmark's"""
    classifier_options: Options = field(default_factory=dict)
    """as data_options"""
    training_options: Options = field(default_factory=dict)
    """as data_options"""
    stage_options: Options = field(default_factory=dict)
    """as data_options"""
    measure_options: Options = field(default_factory=dict)
    """draws, invariance_images"""
    fit_options: Options = field(default_factory=dict)
    """by translator, too: fit_options.munit.steps=100"""
    translator_options: Mapping[str, Options] = field(default_factory=dict)
    """by translator: translator_options.munit.network.width=16"""
    nuisance_options: Mapping[str, Options] = field(default_factory=dict)
    """of what methods give by name: nuisance_options.rotation.degrees=30"""

    def read_changes(self) -> dict[str, Any]:
        """What the settings change about the benchmarks' files, for `read_benchmark`."""
        return {
            "data": self.data_options,
            "classifier": self.classifier_options,
            "training": self.training_options,
            "stage": self.stage_options,
            "measure": self.measure_options,
            "fit": self.fit_options,
            "augmentation": self.augmentation,
            "translators": self.translator_options,
            "nuisances": self.nuisance_options,
        }


@settings_class("demo")
class DemoSettings:
    """What the demonstration runs."""

    seeds: Count = 5
    """each draws its own class order, images, angles and initial weights"""
    epochs: Annotated[int, Field(ge=2, le=10**9)] = 67
    """of each classifier; 67 are about 800 steps, where longer training brings nothing more"""
    spatial_steps: Count = 300
    """of fitting the spatial translator"""
    munit_steps: Count = 400
    """of fitting MUNIT"""
    draws: Count = 5
    """transformations of each test image for eKLD"""
    processes: Workers = 2
    """worker processes of one torch thread each"""
    control: bool = True
    """also run without any rotation in the data"""


@settings_class("demo")
class DemoRun:
    """Settings of the verb `demo`."""

    out: PathText = "demo-report"
    """folder; a demonstration that was stopped there goes on"""
    demo: DemoSettings = field(default_factory=DemoSettings)
