"""What `gen-invariance augment` says to bad settings, inputs, output folders and files, as a table.

    python -m tests.stress.bad_input [out=DIR]

The cases are those of tests/export/test_export_bad_input.py, which checks that the command ends with that exit code in
one line, leaves the data alone, and writes what can be written. Each runs here through the command's entry point, in a
folder of its own; the table has the words that differ from case to case, and the line that the command prints.
"""

import contextlib
import importlib.util
import io
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from benchmarks.program import read_settings
from gen_invariance.cli.main import run
from gen_invariance.files import write_text

CASES = Path(__file__).resolve().parent.parent / "export" / "test_export_bad_input.py"


def load_cases() -> object:
    """The test module, for its tables."""
    spec = importlib.util.spec_from_file_location("bad_input_cases", CASES)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepared(cases: object, group: str, name: str, here: Path) -> list[str]:
    """The words of the command, after what is wrong was made in `here`; later words win."""
    photos, translator = cases.make_photos(here / "photos"), cases.make_translator(here / "translator")
    words = [f"data.path={photos}", f"out={here / 'out'}"]
    if group == "settings":
        return words + cases.filled_in(cases.SETTINGS[name][0], translator, photos)
    words += [f"translator={translator}", "off_distribution=null"]
    if group == "input":
        kind, make, _ = cases.INPUTS[name]
        form, path = cases.place_of(kind, here)
        make(path)
        return [f"data={form}", f"data.path={path}", *words[1:]]
    if group == "output folder":
        return [words[0], f"out={cases.OUTPUTS[name][0](photos)}", *words[2:], "resume=true"]
    cases.FILES[name](photos / "dog" / "bad.png")
    return words


def said(words: list[str]) -> tuple[int, str]:
    """Exit code and what came on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(["augment", "progress=false", *words])
    return code, err.getvalue().strip()


def rows(cases: object) -> Iterator[str]:
    """A line of the table for each case."""
    groups = {"settings": cases.SETTINGS, "input": cases.INPUTS, "output folder": cases.OUTPUTS, "file": cases.FILES}
    for group, table in groups.items():
        for name in table:
            with tempfile.TemporaryDirectory() as folder:
                here = Path(folder).resolve()
                os.chdir(here)
                code, line = said(prepared(cases, group, name, here))
                os.chdir(CASES.parent)
            line = line.replace(f"{here}/", "").replace(str(here), ".").replace("|", "\\|").replace("\n", " // ")
            yield f"| {group} | {name} | {code} | {line.removeprefix('gen-invariance: ')} |"


def main() -> None:
    given = read_settings(__doc__, out=None)
    out = None if given.out is None else Path(given.out).resolve()
    show, warnings.showwarning = warnings.showwarning, warnings.showwarning  # the command line sets its own
    found = list(rows(load_cases()))
    warnings.showwarning = show
    head = ["    python -m tests.stress.bad_input out=docs/results/augment", ""]
    head += [f"{len(found)} kinds of bad input to `gen-invariance augment`.", ""]
    text = "\n".join([*head, "| what | kind | exit code | line |", "|---|---|---|---|", *found, ""])
    print(text)
    if out:
        write_text(out / "bad-input.md", text)


if __name__ == "__main__":
    main()
