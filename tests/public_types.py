"""What a type checker must say of the public names; mypy reads this file, nothing runs it."""

from pathlib import Path
from typing import Any, assert_type

import gen_invariance as gi


def check(images: Any, labels: Any, data: gi.ImageData) -> None:
    """The types that callers see."""
    assert_type(gi.Rotation(30.0), gi.Rotation)
    assert_type(gi.Rotation(30.0).degrees, float)
    assert_type(gi.load_source("digits").train, gi.ImageData)
    assert_type(gi.TrainSettings(epochs=2).epochs, int)
    assert_type(gi.measure_accuracy(abs, images, labels).balanced, float)
    assert_type(gi.inspect_translator(gi.Rotation(10.0), data).quality.verdict.word, str)
    assert_type(gi.export_dataset(gi.open_format("npz", "few.npz"), gi.Rotation(20.0), "out").after, tuple[int, ...])
    assert_type(gi.write_report("records", "page"), Path)
