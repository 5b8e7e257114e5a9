"""What a report says beside its records. Needs no pandas."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gen_invariance.settings import PathText, Text, settings_class


@settings_class("report")
class ReportSettings:
    """What a report says beside its records.

    Example:
        >>> from gen_invariance import ReportSettings
        >>> ReportSettings(title="Signs", baseline="ce_drs").title
        'Signs'
    """

    title: Text = "Long-tailed recognition and invariance by class"
    """of the page"""
    baseline: Text | None = None
    """method that the others are compared with; of several runs: its label, its folder, or its index in the list"""
    references: tuple[Text, ...] = ()
    """methods that are shown but do not compete, such as an oracle"""
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """confidence of all intervals"""
    config_digest: str | None = None
    """keep only records of this configuration"""


@settings_class("report")
class ReportRun(ReportSettings):
    """Settings of the verb `report`."""

    records: PathText | tuple[PathText, ...] = Field(kw_only=True)
    """folder that holds measured runs, or a list of folders"""
    out: PathText = "runs/report"
    """folder of the page"""
