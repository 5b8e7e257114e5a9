"""Output folders that cannot be written, hold files of others or fill up end in one line, exit code 2."""

import resource
import warnings

import pytest
from forked import ForkedCommand
from test_cli_bad_settings import FIT, TRAIN, one_line, refused


@pytest.fixture(autouse=True)
def _warnings_as_before(monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command line sets its own


def test_out_below_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert "cannot write" in refused([*FIT, f"out={tmp_path / 'file' / 'out'}"], capsys)
    assert "file" in refused([*FIT, f"out={tmp_path / 'file'}"], capsys)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("verb", [FIT, TRAIN, ["demo"]], ids=["fit", "train", "demo"])
def test_out_where_nobody_may_write(verb, capsys):
    assert "/proc/nobody" in refused([*verb, "out=/proc/nobody/out"], capsys)


def test_out_with_foreign_files(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("mine")
    for verb in (FIT, TRAIN, ["demo"]):
        assert "thesis.tex" in refused([*verb, f"out={tmp_path}"], capsys)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("verb", "size"),
    [
        pytest.param(FIT, 1_000, marks=pytest.mark.slow),
        (FIT, 20_000),
        pytest.param(TRAIN, 20_000, marks=pytest.mark.slow),
        pytest.param(TRAIN, 1_000, marks=pytest.mark.slow),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else str(value),
)
def test_full_disk(verb, size, tmp_path):
    """A disk that takes no file above `size` bytes; the write that fails differs with it."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    process = ForkedCommand([*verb, f"out={tmp_path / 'out'}"], before=limit)
    _, error = process.communicate()
    assert process.returncode == 2
    assert "cannot write" in one_line(error)
    left = [file for file in tmp_path.rglob("*") if file.is_file() and file.name.endswith(".tmp")]
    assert left == []
    assert not (tmp_path / "out" / "translator").exists()
