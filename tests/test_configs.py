"""Every choice of every group composes and holds settings that the library takes; documented commands compose."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from gen_invariance.cli.help import format_verb_help
from gen_invariance.cli.main import compose
from gen_invariance.cli.verbs import VERBS
from gen_invariance.configs import choice_names, config_folder, default_choices, group_names, read_choice
from gen_invariance.errors import SettingsError
from gen_invariance.settings import MISSING, check_options, get_defaults, get_descriptions, read_settings
from gen_invariance.translator.registry import find_kind

ROOT = Path(__file__).parent.parent
CONFIGS = config_folder()
VERB_OF = {group: verb for verb in reversed(VERBS) for group in default_choices(verb)}
"""A verb that takes the group; what a choice holds does not depend on the verb."""
CHOICES = [(VERB_OF[group], group, name) for group in VERB_OF for name in choice_names(group)]


def given(values):
    """`values` with something in place of what has no default."""
    return {name: "somewhere" if value == MISSING else value for name, value in values.items()}


def test_something_was_collected():
    assert {verb for verb, _, _ in CHOICES} >= {"fit", "train"}
    by_name = {"benchmark", "hydra"}  # read by name, several at once, and a launcher's own
    assert {group for _, group, _ in CHOICES} == set(group_names()) - by_name
    assert len(CHOICES) > 25


@pytest.mark.parametrize(("verb", "group", "choice"), CHOICES)
def test_choice_composes_to_what_the_library_takes(verb, group, choice):
    values = compose(verb, [f"{group}={choice}"], missing_is_error=False)
    made = read_settings(VERBS[verb].settings, given(values), "")
    assert hasattr(made, group) or group == "method"
    if group == "translator" and choice != "auto":
        kind = find_kind(values["translator"]["name"])
        if kind.builder is None:
            check_options(kind.load("model"), values["translator"]["network"], "network")
        kind.read_settings(values["translator"]["objective"])


@pytest.mark.parametrize("verb", VERBS)
def test_files_hold_what_differs_from_the_defaults(verb):
    """A value that a file repeats would have to be changed in two places."""
    own = yaml.safe_load((CONFIGS / f"{verb}.yaml").read_text(encoding="utf-8")) or {}
    defaults = get_defaults(VERBS[verb].settings)
    repeated = [key for key, value in leaves(own) if key != "defaults" and dict(leaves(defaults)).get(key) == value]
    assert repeated == []


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_file_says_what_it_is_for(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert isinstance(yaml.safe_load(text) or {}, dict)


@pytest.mark.parametrize("verb", VERBS)
def test_help_names_and_describes_every_setting(verb):
    kind = VERBS[verb].settings
    text = format_verb_help(verb, kind)
    for name, _ in leaves(compose(verb, [], missing_is_error=False)):
        assert re.search(rf"^  {re.escape(name)}[:.]|^settings of {name} |^  {name}=", text, flags=re.MULTILINE), name
    for group in default_choices(verb):
        for choice in choice_names(group):
            assert choice in text
    inner = {name.rpartition(".")[0] for name in get_descriptions(kind)}
    plain = {name for name, said in get_descriptions(kind).items() if not said and name not in inner}
    assert plain <= {"seed"}, "say what it is below the field"


@pytest.mark.parametrize(("verb", "group", "choice"), CHOICES)
def test_help_shows_the_values_of_the_choice(verb, group, choice):
    text = format_verb_help(verb, VERBS[verb].settings, [f"{group}={choice}"])
    part = re.search(rf"^settings of {group} \(here {choice}\):\n((?:  .*\n)+)", text, flags=re.MULTILINE)
    shown = dict(re.findall(r"^  ([\w.]+): (.*?)(?:  +#.*)?$", part[1], flags=re.MULTILINE)) if part else {}
    config = dict(leaves(compose(verb, [f"{group}={choice}"], missing_is_error=False)))
    assert {name for name in config if name.startswith(f"{group}.")} <= set(shown) or not part
    for name, value in shown.items():
        assert dict(leaves({name: yaml.safe_load(value)})).items() <= config.items()


def leaves(values, before=""):
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{before}{name}.")
        else:
            yield before + name, value


def test_a_choice_that_is_none_is_refused():
    with pytest.raises(SettingsError, match=r"no translator 'munits'; choose .*munit_small"):
        read_choice("translator", "munits")
    with pytest.raises(SettingsError, match=r"translator has no choice 'munits'; choose one of .*munit_small"):
        compose("fit", ["translator=munits"])


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
    assert compose(verb, [word for word in words if not word.startswith("--")])


@pytest.mark.parametrize("name", ["demo", "test"])
def test_script_is_executable(name):
    assert (ROOT / "scripts" / name).stat().st_mode & 0o111
