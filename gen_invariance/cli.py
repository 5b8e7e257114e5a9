"""The command line: `gen-invariance VERB [settings]`. The only file that knows Hydra.

Each verb composes its settings, builds what it needs, makes one library call and says where the result is. Torch is
imported by the verbs, not here, so that help is quick. Bad input ends in one line and exit code 2, a failed run in
one line and exit code 1.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from gen_invariance.cli_help import config_folder, groups_of, usage, verb_help
from gen_invariance.errors import GenInvarianceError, SettingsError
from gen_invariance.settings import settings_of, typed


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the installed command."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Carry out one command line; returns the exit code."""
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    try:
        if verb in ("-h", "--help", "help"):
            print(usage(_VERBS), end="")
        elif verb == "--version":
            from importlib.metadata import version

            print(f"gen_invariance {version('gen_invariance')}")
        else:
            _run_verb(verb, rest)
        sys.stdout.flush()
    except GenInvarianceError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail(f"stopped{_GOES_ON.get(verb, '')}", 130)
    except BrokenPipeError:  # the reader, such as `head`, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:
        return _fail(f"{error.strerror or error}: {error.filename or 'a file'}; check the path, rights and space", 2)
    except (MemoryError, RuntimeError) as error:
        if not re.search("out of memory|not enough memory", str(error)) and not isinstance(error, MemoryError):
            raise
        return _fail(f"out of memory ({str(error)[:200]}); use a smaller batch size, image size or network", 1)
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
        print(verb_help(verb), end="")
        return
    config = _compose(verb, overrides, missing_is_error=not wanted["cfg"])
    if wanted["cfg"]:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(OmegaConf.create(config)), end="")
        return
    _check_plain(verb, config)
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {_printable(str(message))}", file=sys.stderr)
    _VERBS[verb](config)


def _compose(verb: str, overrides: list[str], *, missing_is_error: bool = True) -> dict[str, Any]:
    """The verb's settings as plain values.

    Raises:
        SettingsError: a misspelt key or choice, a value that cannot be read, or a missing one.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    # `translator=FOLDER` is a value where the verb has no such group; Hydra would look for a choice of that name.
    own = dict(groups_of(verb))
    values = [word for word in overrides if (name := word.split("=")[0]) not in own and _is_group(name)]
    try:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            config = compose(config_name=verb, overrides=[_opened(word) for word in overrides if word not in values])
            for override in OverridesParser.create().parse_overrides(values):
                config[override.key_or_group] = override.value()
            return OmegaConf.to_container(config, resolve=True, throw_on_missing=missing_is_error)
    except (HydraException, OmegaConfBaseException) as error:
        raise SettingsError(_one_line(verb, error)) from error


def _is_group(name: str) -> bool:
    return name.isidentifier() and (config_folder() / name).is_dir()


def _opened(word: str) -> str:
    """`word` with a sign that lets it add keys, where it sets options whose names depend on another setting."""
    return f"++{word}" if re.match(r"(\w+\.)*\w+_options(\.\w+)*=", word) else word


def _one_line(verb: str, error: Exception) -> str:
    """What Hydra says on several lines, on one."""
    text = str(error)
    unreadable = getattr(error, "override", None)
    if unreadable is not None:
        return f"cannot read {unreadable}; write KEY=VALUE, a list as [a,b], a mapping as '{{a: 1}}' with its quotes"
    missing = re.search(r"Missing mandatory value: (\S+)", text)
    if missing:
        return f"{verb} needs {missing[1]}=...; see gen-invariance {verb} --help"
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown:
        full = re.search(r"full_key: (\S+)", str(error.__cause__))
        key = full[1] if full else unknown[1]
        return f"{verb} has no setting {key!r}{_nearest(verb, key)}; see gen-invariance {verb} --help"
    choice = re.search(r"Could not find '([^']+)'", text)
    if choice:
        group, _, name = choice[1].partition("/")
        names = sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))
        return f"{group} has no choice {name!r}; choose one of {', '.join(names)}" if names else text.splitlines()[0]
    return f"cannot read the settings: {text.splitlines()[0]}; write KEY=VALUE, lists as [a,b]"


def _keys(config: Mapping[str, Any], before: str = "") -> Iterator[str]:
    for name, value in config.items():
        yield before + name
        if isinstance(value, dict):
            yield from _keys(value, f"{before}{name}.")


def _nearest(verb: str, key: str) -> str:
    """A hint at the setting that was probably meant."""
    config = _compose(verb, [], missing_is_error=False)
    near = difflib.get_close_matches(key, list(_keys(config)), n=1)
    return f", did you mean {near[0]}" if near else ""


def _check_plain(verb: str, config: dict[str, Any]) -> None:
    """Give the settings that belong to no group their kind, in place."""
    groups = dict(groups_of(verb))
    for name, value in config.items():
        hint = _PLAIN.get(f"{verb} {name}", _PLAIN.get(name))
        if hint is not None and name not in groups:
            config[name] = typed(value, hint, name)


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise SettingsError(f"device must be auto, cpu or cuda, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(f"torch finds no CUDA device for device={name}; use device=cpu or device=auto")
    return device


def _prepared(config: Mapping[str, Any], *, seed: int, need_test: bool) -> Any:
    """The images of `data` for `seed`, on the device that `device` names."""
    from gen_invariance.benchmark.task import Task, prepare

    task = settings_of(Task, config["data"], "data")
    progress = config.get("progress")
    prepared = prepare(
        task, seed=seed, need_test=need_test, progress=sys.stderr.isatty() if progress is None else progress
    )
    return task, prepared.to(_device(config["device"]))


@contextmanager
def _new_run(config: Mapping[str, Any], kind: str, identity: Mapping[str, Any], split: Any) -> Iterator[Any]:
    """The run folder of `out`; a new one is taken away again when bad input is found before anything was computed."""
    from gen_invariance.data.split import save_split
    from gen_invariance.run import Run

    folder = Path(config["out"])
    was_there, was_run = folder.is_dir(), (folder / "run.json").exists()
    with _first_process_first(config):
        run = Run(folder, kind=kind, seed=config["seed"], config=identity, resume=config["resume"] or not _is_first())
        if _is_first():
            save_split(run.path / "split.npz", split)
    try:
        yield run
    except GenInvarianceError as error:
        if (
            error.exit_code == 2
            and not was_run
            and _is_first()
            and {e.name for e in folder.iterdir()} <= {"run.json", "split.npz"}
        ):
            for name in ("run.json", "split.npz"):
                (folder / name).unlink(missing_ok=True)
            None if was_there else folder.rmdir()
        raise


def _is_first() -> bool:
    """Whether this is the first, or only, process of a launcher such as `accelerate launch` or `torchrun`."""
    return os.environ.get("RANK", "0") == "0"


def _first_process_first(config: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Let the first process of several make the run folder before the others look at it."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return nullcontext()
    from accelerate import PartialState

    return PartialState(cpu=_device(config["device"]).type == "cpu").main_process_first()


def _fit(config: dict[str, Any]) -> None:
    from gen_invariance.translator.by_name import fit_by_name
    from gen_invariance.translator.fit import FitSettings

    task, prepared = _prepared(config, seed=config["seed"], need_test=False)
    loop = config["fit"]
    loop["flip"] = prepared.flip_safe if loop["flip"] is None else loop["flip"]
    settings = settings_of(FitSettings, loop, "fit")
    chosen = config["translator"]
    identity = {"data": task.identity(), "translator": chosen, "fit": settings.identity()}
    with _new_run(config, "fit", identity, prepared.split) as run:
        translator = fit_by_name(
            chosen["name"],
            prepared.train,
            settings,
            run=run,
            network=chosen["network"],
            objective=chosen["objective"],
            progress=config["progress"],
        )
    print(f"translator: {run.path / 'translator'}")
    print(f"sample grid: {run.path / 'samples' / f'step-{settings.steps:08d}.png'}")
    if hasattr(translator, "describe"):
        print(translator.describe())


def _train(config: dict[str, Any]) -> None:
    from gen_invariance.benchmark.inspect import obey_verdict
    from gen_invariance.benchmark.measuring import require_channels
    from gen_invariance.benchmark.suite import (
        ClassifierSettings,
        StageSettings,
        build_augmentation,
        build_stage,
        train_classifier,
    )
    from gen_invariance.classifier.train import TrainSettings
    from gen_invariance.classifier.transfer import TransferPlan
    from gen_invariance.translator.load import load_translator
    from gen_invariance.translator.verdict import read_verdict

    classifier = settings_of(ClassifierSettings, config["classifier"], "classifier")
    training = settings_of(TrainSettings, config["training"], "training")
    plan = None if config["transfer"]["mode"] == "none" else settings_of(TransferPlan, config["transfer"], "transfer")
    given = dict(config["stage"])
    folder = given.pop("translator")
    stage_settings = settings_of(StageSettings, given, "stage")
    translator = load_translator(folder) if folder else None
    if folder:
        given, stage_settings = stage_settings, obey_verdict(stage_settings, folder)
        if stage_settings != given:
            print(f"note: inspect says '{read_verdict(folder).word}', so the policy auto is weaker")
            config["stage"]["policy_options"] = dict(stage_settings.policy_options)
    task, prepared = _prepared(config, seed=config["seed"], need_test=True)
    if translator is not None:
        require_channels(translator, prepared, folder)
    stage = build_stage(stage_settings, prepared, translator=translator)
    identity = {
        "data": task.identity(),
        "classifier": config["classifier"],
        "training": training.identity(),
        "stage": {**config["stage"], "translator": str(folder) if folder else None},
        "transfer": config["transfer"],
        "augmentation": config["augmentation"],
    }
    base = build_augmentation(config["augmentation"], flip=prepared.flip_safe)
    with _new_run(config, "train", identity, prepared.split) as run:
        train_classifier(
            prepared,
            classifier,
            training,
            stage=stage,
            run=run,
            base=base,
            plan=plan,
            progress=config["progress"],
            say=lambda text: print(text) if _is_first() else None,
        )
    if _is_first():
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

    settings = settings_of(DemoSettings, config["demo"], "demo")
    page = run_demo(config["out"], settings, say=lambda line: print(line, flush=True))
    print((page.parent / "table.md").read_text(encoding="utf-8"))
    print(f"report: {page}")


def _inspect(config: dict[str, Any]) -> None:
    from gen_invariance.benchmark import inspect as inspecting
    from gen_invariance.translator.load import load_translator

    settings = settings_of(inspecting.InspectSettings, config["inspect"], "inspect")
    folder, seed = config["translator"], config["seed"]
    translator = load_translator(folder)
    task, prepared = _prepared(config, seed=seed, need_test=False)
    fitted = inspecting.differences_from_fit(folder, task, seed=seed)
    if fitted:
        print(_printable(f"note: this translator was fitted with {', '.join(fitted)}"))
    found = inspecting.inspect_translator(
        translator.to(prepared.train.device),
        prepared,
        settings,
        seed=seed,
        oracle=task.nuisance != "identity",
        say=lambda line: print(line, flush=True),
    )
    out = config["out"] or inspecting.output_folder(folder)
    page = inspecting.write_inspection(found, out, translator=folder, task=task, settings=settings, seed=seed)
    print("\n".join([found.quality.verdict.word, *(f"  {reason}" for reason in found.quality.verdict.reasons)]))
    print(f"page: {page}")


def _augment(config: dict[str, Any]) -> None:
    from gen_invariance.benchmark.augmenting import augment_set, check_complete, lines_of

    progress = sys.stderr.isatty() if config["progress"] is None else config["progress"]
    summary = augment_set(config, device=_device(config["device"]), progress=progress)
    print("\n".join(_printable(line) for line in lines_of(summary)))
    check_complete(summary)


def _order(config: dict[str, Any]) -> None:
    from gen_invariance.benchmark.ordering import order_subsets

    progress = sys.stderr.isatty() if config["progress"] is None else config["progress"]
    lines = order_subsets(config, device=_device(config["device"]), progress=progress)
    print("\n".join(_printable(line) for line in lines), end="\n" * bool(lines))


_PLAIN: dict[str, Any] = {
    **dict.fromkeys(("seed", "draws", "batch_size"), int),
    **dict.fromkeys(("out", "device", "augmentation", "run", "nuisance", "split", "title"), str),
    **dict.fromkeys(("method", "baseline", "translator", "inspect out", "order nuisance"), str | None),
    "resume": bool,
    "progress": bool | None,
    "nuisance_options": dict,
    "records": str | list[str],
    "references": list[str],
}
"""What the settings that belong to no group are, in every verb that has them, or in one ("VERB NAME")."""

_GOES_ON = {
    **dict.fromkeys(
        ("fit", "train", "augment"), "; the same command with resume=true goes on from the last checkpoint"
    ),
    **dict.fromkeys(("augment", "order"), "; the same command with resume=true goes on with what is left"),
    "demo": "; the same command goes on with what is left",
}
"""What can be done after Ctrl-C."""

_VERBS: dict[str, Callable[[dict[str, Any]], None]] = {
    "fit": _fit,
    "augment": _augment,
    "train": _train,
    "measure": _measure,
    "report": _report,
    "inspect": _inspect,
    "order": _order,
    "demo": _demo,
}

if __name__ == "__main__":
    main()
