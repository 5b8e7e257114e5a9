"""The folder of pictures that exports are made of, where a file has none of its own."""

import pytest
from export_inputs import as_folder


@pytest.fixture
def photos(tmp_path):
    return as_folder(tmp_path / "photos")
