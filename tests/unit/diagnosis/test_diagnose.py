"""What a diagnosis must not know, and its settings."""

import re

import pytest
from support import ROOT

from trl_parity import ParityConfig

# ---- what it must not know ----------------------------------------------------------------------------------------


@pytest.mark.slow_unit
def test_the_package_does_not_know_the_drills(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes" / "drill"))
    import drills
    import patches

    names = {d.name for d in drills.DRILLS if "-" in d.name} - {"top-p", "min-p"}  # which are settings
    names |= {n for n, f in vars(patches).items() if "_" in n.strip("_") and getattr(f, "__module__", "") == "patches"}
    names -= {"engine_model"}  # what patches share
    assert len(names) > 20
    for path in (ROOT / "trl_parity").rglob("*.py"):
        if path.parent.name == "cli":  # their help names some as examples
            continue
        text = path.read_text()
        assert not [n for n in names if re.search(rf"(?<![\w-]){re.escape(n)}(?![\w-])", text)], path
        assert "recipes" not in text, path


def test_the_config_says_when_and_how_long():
    with pytest.raises(Exception, match="diagnose is 'always'"):
        ParityConfig(diagnose="always")
    with pytest.raises(Exception, match="diagnose_budget is -1"):
        ParityConfig(diagnose_budget=-1)
