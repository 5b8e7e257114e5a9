"""The command line: `gen-invariance VERB [settings]`. The only file that knows Hydra.

Each verb composes its settings, builds what it needs, makes one library call and says where the result is. Torch is
imported by the verbs, not here, so that help is quick. Bad input ends in one line and exit code 2, a failed run in
one line and exit code 1.
"""

from __future__ import annotations

import difflib
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gen_invariance.errors import GenInvarianceError, SettingsError

_USAGE = """gen-invariance: learn a nuisance where data is plenty, give it to tail classes, measure invariance.

usage: gen-invariance VERB [SETTING=VALUE ...] [--help] [--cfg job]

{verbs}

  gen-invariance VERB --help     what a verb does, and all its settings
  gen-invariance VERB --cfg job  the settings it would run with, and nothing else
  gen-invariance --version

A setting is changed by naming it: seed=1 data=fashion_mnist data.path=FOLDER fit.steps=500 (no dashes, no spaces).
"""


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the installed command."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Carry out one command line; returns the exit code."""
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    try:
        if verb in ("-h", "--help", "help"):
            print(_usage(), end="")
        elif verb == "--version":
            from importlib.metadata import version

            print(f"gen_invariance {version('gen_invariance')}")
        else:
            _run_verb(verb, rest)
    except GenInvarianceError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("stopped; the same command with resume=true goes on from the last checkpoint", 130)
    except BrokenPipeError:
        return 0
    except OSError as error:
        return _fail(f"{error.strerror or error}: {error.filename or 'a file'}; check the path, rights and space", 2)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"gen-invariance: {_printable(' '.join(message.split()))}", file=sys.stderr)
    return code


def _printable(text: str) -> str:
    """`text` without control characters, which a file or class name could use to write over the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _run_verb(verb: str, rest: list[str]) -> None:
    if verb not in _VERBS:
        near = difflib.get_close_matches(verb, _VERBS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise SettingsError(f"unknown verb {verb!r}, choose one of {', '.join(_VERBS)}{hint}")
    wanted = {"help": {"-h", "--help"} & set(rest), "cfg": "--cfg" in rest}
    overrides = [word for word in rest if word not in ("-h", "--help", "--cfg", "job")]
    dashed = [word for word in overrides if word.startswith("-")]
    if dashed:
        raise SettingsError(f"{verb} knows no option {dashed[0]}; settings have no dashes: seed=1 out=FOLDER")
    if wanted["help"]:
        print(_verb_help(verb), end="")
        return
    config = _compose(verb, overrides, missing_is_error=not wanted["cfg"])
    if wanted["cfg"]:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(OmegaConf.create(config)), end="")
        return
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {_printable(str(message))}", file=sys.stderr)
    _VERBS[verb](config)


def _config_folder() -> Path:
    """configs/ inside the installed package, or beside it in a source checkout."""
    package = Path(__file__).resolve().parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def _usage() -> str:
    verbs = "\n".join(f"  {verb:9} {_header(verb).splitlines()[0]}" for verb in _VERBS)
    return _USAGE.format(verbs=verbs)


def _header(verb: str) -> str:
    """The leading comment of the verb's config, without the signs."""
    lines = (_config_folder() / f"{verb}.yaml").read_text(encoding="utf-8").splitlines()
    return "\n".join(line.removeprefix("# ").removeprefix("#") for line in lines if line.startswith("#"))


def _verb_help(verb: str) -> str:
    folder = _config_folder()
    text = (folder / f"{verb}.yaml").read_text(encoding="utf-8")
    groups = re.findall(r"^  - (\w+): (\w+)$", text, flags=re.MULTILINE)
    chunks = [f"gen-invariance {verb}: {_header(verb)}\n"]
    if groups:
        chunks.append("choices (the first is the default):")
        for group, default in groups:
            names = sorted(path.stem for path in (folder / group).glob("*.yaml"))
            chunks.append(f"  {group}={' | '.join([default, *(name for name in names if name != default)])}")
        chunks.append("")
    body = [line for line in text.splitlines() if not line.startswith(("#", "defaults:", "  - "))]
    chunks += ["settings:", *(f"  {line}" for line in body), ""]
    for group, default in groups:
        chunks += [f"settings of {group} (here {default}):", *_group_lines(folder / group / f"{default}.yaml"), ""]
    return "\n".join(chunks)


def _group_lines(path: Path) -> list[str]:
    """The settings of one group file, those it inherits first."""
    text = path.read_text(encoding="utf-8")
    inherited = re.search(r"^defaults: \[(\w+), _self_\]$", text, flags=re.MULTILINE)
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", "defaults:"))]
    own = [f"  {path.parent.name}.{line}" if not line.startswith(" ") else f"  {line}" for line in lines]
    if inherited is None:
        return own
    names = {line.split(":")[0] for line in own}
    base = [line for line in _group_lines(path.with_name(f"{inherited[1]}.yaml")) if line.split(":")[0] not in names]
    return base + own


def _compose(verb: str, overrides: list[str], *, missing_is_error: bool = True) -> dict[str, Any]:
    """The verb's settings as plain values.

    Raises:
        SettingsError: a misspelt key or choice, a value that cannot be read, or a missing one.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(_config_folder()), version_base="1.3"):
            config = compose(config_name=verb, overrides=overrides)
            return OmegaConf.to_container(config, resolve=True, throw_on_missing=missing_is_error)
    except (HydraException, OmegaConfBaseException) as error:
        raise SettingsError(_one_line(verb, error)) from error


def _one_line(verb: str, error: Exception) -> str:
    """What Hydra says on several lines, on one."""
    text = str(error)
    missing = re.search(r"Missing mandatory value: (\S+)", text)
    if missing:
        return f"{verb} needs {missing[1]}=...; see gen-invariance {verb} --help"
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown:
        return f"{verb} has no setting {unknown[1]!r}{_nearest(verb, unknown[1])}; see gen-invariance {verb} --help"
    choice = re.search(r"Could not find '([^']+)'", text)
    if choice:
        group, _, name = choice[1].partition("/")
        names = sorted(path.stem for path in (_config_folder() / group).glob("*.yaml"))
        return f"{group} has no choice {name!r}; choose one of {', '.join(names)}" if names else text.splitlines()[0]
    return f"cannot read the settings: {text.splitlines()[0]}; write KEY=VALUE, lists as [a,b]"


def _nearest(verb: str, key: str) -> str:
    """A hint at the setting that was probably meant."""
    config = _compose(verb, [], missing_is_error=False)
    known = [
        *config,
        *(f"{group}.{name}" for group, value in config.items() if isinstance(value, dict) for name in value),
    ]
    near = difflib.get_close_matches(key, known, n=1)
    return f", did you mean {near[0]}" if near else ""


def _settings(kind: Callable[..., Any], values: Mapping[str, Any], where: str) -> Any:
    """The frozen settings class `kind` made of `values`, wrong types named."""
    try:
        return kind(**values)
    except TypeError as error:
        raise SettingsError(f"{where}: {error}") from error


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingsError(f"device must be auto, cpu or cuda, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SettingsError("device=cuda, but torch finds no CUDA device; use device=cpu or device=auto")
    return device


def _prepared(config: Mapping[str, Any], *, seed: int, need_test: bool) -> Any:
    """The images of `data` for `seed`, on the device that `device` names."""
    from gen_invariance.benchmark.task import Task, prepare

    task = _settings(Task, config["data"], "data")
    progress = config.get("progress")
    prepared = prepare(
        task, seed=seed, need_test=need_test, progress=sys.stderr.isatty() if progress is None else progress
    )
    return task, prepared.to(_device(config["device"]))


def _fit(config: dict[str, Any]) -> None:
    from gen_invariance.data.split import save_split
    from gen_invariance.run import Run
    from gen_invariance.translator.build import build_objective
    from gen_invariance.translator.fit import FitSettings, fit_translator

    task, prepared = _prepared(config, seed=config["seed"], need_test=False)
    loop = config["fit"]
    loop["flip"] = prepared.flip_safe if loop["flip"] is None else loop["flip"]
    settings = _settings(FitSettings, loop, "fit")
    chosen = config["translator"]
    objective = build_objective(
        chosen["name"],
        channels=prepared.train.images.shape[1],
        seed=config["seed"],
        network=chosen["network"],
        **chosen["objective"],
    )
    identity = {"data": task.identity(), "translator": chosen, "fit": settings.identity()}
    run = Run(config["out"], kind="fit", seed=config["seed"], config=identity, resume=config["resume"])
    save_split(run.path / "split.npz", prepared.split)
    translator = fit_translator(objective, prepared.train, settings, run=run, progress=config["progress"])
    print(f"translator: {run.path / 'translator'}")
    print(f"sample grid: {run.path / 'samples' / f'step-{settings.steps:08d}.png'}")
    if hasattr(translator, "describe"):
        print(translator.describe())


def _train(config: dict[str, Any]) -> None:
    from gen_invariance.benchmark.suite import (
        ClassifierSettings,
        StageSettings,
        build_augmentation,
        build_stage,
        train_classifier,
    )
    from gen_invariance.classifier.train import TrainSettings
    from gen_invariance.data.split import save_split
    from gen_invariance.run import Run
    from gen_invariance.translator.load import load_translator

    classifier = _settings(ClassifierSettings, config["classifier"], "classifier")
    training = _settings(TrainSettings, config["training"], "training")
    given = dict(config["stage"])
    folder = given.pop("translator")
    stage_settings = _settings(StageSettings, given, "stage")
    translator = load_translator(folder) if folder else None
    task, prepared = _prepared(config, seed=config["seed"], need_test=True)
    stage = build_stage(stage_settings, prepared, translator=translator)
    identity = {
        "data": task.identity(),
        "classifier": config["classifier"],
        "training": training.identity(),
        "stage": {**config["stage"], "translator": str(folder) if folder else None},
        "augmentation": config["augmentation"],
    }
    run = Run(config["out"], kind="train", seed=config["seed"], config=identity, resume=config["resume"])
    save_split(run.path / "split.npz", prepared.split)
    base = build_augmentation(config["augmentation"], flip=prepared.flip_safe)
    train_classifier(prepared, classifier, training, stage=stage, run=run, base=base, progress=config["progress"])
    print(f"classifier: {run.path}")
    print(f"next: gen-invariance measure run={run.path}")


def _measure(config: dict[str, Any]) -> None:
    from gen_invariance.benchmark.measuring import measure_run, table_of

    measured = measure_run(
        config["run"],
        nuisance=config["nuisance"],
        nuisance_options=config["nuisance_options"],
        translator=config["translator"],
        split=config["split"],
        draws=config["draws"],
        batch_size=config["batch_size"],
        seed=config["seed"],
        device=_device(config["device"]),
        method=config["method"],
    )
    print("\n".join(_printable(line) for line in table_of(measured)))
    print(f"written: {measured.path}")


def _report(config: dict[str, Any]) -> None:
    from gen_invariance.benchmark.measuring import report_of

    folders = config["records"] if isinstance(config["records"], list) else [config["records"]]
    page = report_of(
        folders,
        config["out"],
        title=config["title"],
        baseline=config["baseline"],
        references=config["references"],
    )
    print(f"report: {page}")


def _demo(config: dict[str, Any]) -> None:
    from gen_invariance.benchmark.demo import DemoSettings, run_demo

    settings = _settings(DemoSettings, config["demo"], "demo")
    page = run_demo(config["out"], settings, say=lambda line: print(line, flush=True))
    print((page.parent / "table.md").read_text(encoding="utf-8"))
    print(f"report: {page}")


_VERBS: dict[str, Callable[[dict[str, Any]], None]] = {
    "fit": _fit,
    "train": _train,
    "measure": _measure,
    "report": _report,
    "demo": _demo,
}

if __name__ == "__main__":
    main()
