"""Every choice of every group composes and holds the library's settings; documented commands compose."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from gen_invariance.benchmark.demo import DemoSettings
from gen_invariance.classifier.train import TrainSettings
from gen_invariance.cli.help import config_folder, groups_of, verb_help
from gen_invariance.cli.main import _PLAIN, _compose, _keys
from gen_invariance.cli.verbs import VERBS
from gen_invariance.experiment.build import ClassifierSettings, StageSettings
from gen_invariance.experiment.task import Task
from gen_invariance.settings import options_of, settings_of
from gen_invariance.translator.fit_settings import FitSettings
from gen_invariance.translator.registry import find_kind

ROOT = Path(__file__).parent.parent
CONFIGS = config_folder()
KINDS = {"data": Task, "classifier": ClassifierSettings, "training": TrainSettings, "stage": StageSettings}
VERB_OF = {group: verb for verb in reversed(VERBS) for group, _ in groups_of(verb)}
"""A verb that takes the group; what a choice holds does not depend on the verb."""
CHOICES = [(VERB_OF[group], group, path.stem) for group in VERB_OF for path in sorted((CONFIGS / group).glob("*.yaml"))]


def bind(group, values):
    """Make the library's settings out of a composed group; returns the names that the library takes."""
    if group == "translator":
        kind = find_kind(values["name"])
        kind.read_settings(values["objective"])
        if kind.builder is None:
            options_of(kind.load("model"), values["network"], "network")
        return {"name", "network", "objective"}
    extra = {"translator"} if group == "stage" else set()  # a folder, opened before
    settings_of(KINDS[group], {name: value for name, value in values.items() if name not in extra}, group)
    return set(KINDS[group].__dataclass_fields__) | extra


def test_something_was_collected():
    assert {verb for verb, _, _ in CHOICES} >= {"fit", "train"}
    by_name = {"benchmark", "hydra"}  # read by name, several at once, and a launcher's own
    assert {group for _, group, _ in CHOICES} == {path.name for path in CONFIGS.iterdir() if path.is_dir()} - by_name
    assert len(CHOICES) > 25


@pytest.mark.parametrize(("verb", "group", "choice"), CHOICES)
def test_choice_composes_and_holds_what_the_library_takes(verb, group, choice):
    config = _compose(verb, [f"{group}={choice}"], missing_is_error=False)
    assert group in config or group not in {*KINDS, "translator"}
    if group in {*KINDS, "translator"}:
        # New settings of the library have to be in the file, too, or nobody finds them.
        assert set(config[group]) == bind(group, config[group])


def test_loops_of_the_verbs_bind():
    fit = _compose("fit", [])["fit"]
    assert set(fit) == set(FitSettings.__dataclass_fields__)
    assert settings_of(FitSettings, fit, "fit").steps == fit["steps"]
    demo = _compose("demo", [])["demo"]
    assert settings_of(DemoSettings, demo, "demo") == DemoSettings()
    assert set(demo) == set(DemoSettings.__dataclass_fields__)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_file_says_what_it_is_for(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert not re.search(r"\?\?\?\s*$", text, flags=re.MULTILINE) or path.parent == CONFIGS
    assert isinstance(yaml.safe_load(text) or {}, dict)


@pytest.mark.parametrize("verb", ["fit", "train", "measure", "report", "demo"])
def test_every_plain_setting_of_a_verb_has_a_kind(verb):
    config = _compose(verb, [], missing_is_error=False)
    groups = {group for group, _ in groups_of(verb)}
    plain = {name for name, value in config.items() if name not in groups and name != verb}
    assert plain
    assert {name for name in plain if name not in _PLAIN and f"{verb} {name}" not in _PLAIN} == set()


@pytest.mark.parametrize("verb", VERBS)
def test_help_names_every_setting(verb):
    text = verb_help(verb)
    config = _compose(verb, [], missing_is_error=False)
    groups = {group for group, _ in groups_of(verb)}
    for name in _keys(config):
        assert re.search(rf"^  {re.escape(name)}[:.]|^settings of {name} |^  {name}=", text, flags=re.MULTILINE), name
    for group in groups:
        for path in (CONFIGS / group).glob("*.yaml"):
            assert path.stem in text


@pytest.mark.parametrize(("verb", "group", "choice"), CHOICES)
def test_help_shows_the_values_of_the_choice(verb, group, choice):
    text = verb_help(verb, [f"{group}={choice}"])
    part = re.search(rf"^settings of {group} \(here {choice}\):\n((?:  .*\n)+)", text, flags=re.MULTILINE)
    shown = dict(re.findall(r"^  ([\w.]+): (.*?)(?:  +#.*)?$", part[1], flags=re.MULTILINE)) if part else {}
    config = dict(_leaves(_compose(verb, [f"{group}={choice}"], missing_is_error=False)))
    own = {name for name in config if name.startswith(f"{group}.")}
    assert own <= set(shown) or not part
    for name, value in shown.items():
        if "must be given" not in value:
            assert dict(_leaves({name: yaml.safe_load(value)})).items() <= config.items()


def _leaves(values, before=""):
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{before}{name}.")
        else:
            yield before + name, value


def documented_commands():
    """(where, words) of each `gen-invariance ...` line in code blocks of the documents and in comments of configs."""
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(CONFIGS.rglob("*.yaml"))]:
        text = path.read_text(encoding="utf-8")
        blocks = [text] if path.suffix == ".yaml" else re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        for block in blocks:
            for line in block.replace("\\\n", " ").splitlines():
                found = re.match(r"^[#$ ]*(?:\.venv/bin/)?gen-invariance (\w+)(.*)$", line)
                words = shlex.split(found[2], comments=True) if found else []
                if found and not any(re.search(r"\b[A-Z]{3,}\b|\.\.\.|\[", word) for word in words):
                    yield pytest.param(found[1], words, id=f"{path.name}: {found[1]} {' '.join(words)}"[:80])


COMMANDS = list(documented_commands())


def test_commands_were_found():
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize(("verb", "words"), COMMANDS)
def test_documented_command_composes(verb, words):
    assert verb in VERBS
    assert _compose(verb, [word for word in words if not word.startswith("--")])


@pytest.mark.parametrize("name", ["demo", "test"])
def test_script_is_executable(name):
    assert (ROOT / "scripts" / name).stat().st_mode & 0o111
