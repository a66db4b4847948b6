"""A halt's text names the folder it stands in, whatever name that gets."""

import pytest
from support.incidents import make

from trl_parity.report.bundle import write_incident
from trl_parity.results.incident import read_incident


@pytest.mark.slow_unit
def test_a_text_names_the_folder_that_was_written(tmp_path):
    for name in ("step-7", "step-7-2"):
        folder = write_incident(tmp_path, make(windows=[]), [], lambda folder: f"Look {folder / 'report.md'}")
        assert folder.name == name
        assert read_incident(folder).text == f"Look {folder / 'report.md'}"


@pytest.mark.slow_unit
def test_a_name_taken_at_the_last_moment_is_in_no_text(tmp_path):
    asked = []

    def text(folder):
        if not asked:  # another process is faster
            (folder / "full").mkdir(parents=True)
        asked.append(folder.name)
        return f"Look {folder / 'report.md'}"

    folder = write_incident(tmp_path, make(windows=[]), [], text)
    assert asked == ["step-7", "step-7-2"]
    assert read_incident(folder).text == f"Look {folder / 'report.md'}"
    assert f"Look {folder / 'report.md'}" in (folder / "report.md").read_text().replace("\\", "")
    assert not list((tmp_path / "incidents").glob("*.tmp"))
