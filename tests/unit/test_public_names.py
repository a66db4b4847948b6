"""The public face: names, a light import, scalars as documented."""

import subprocess
import sys

import pytest
from support import ROOT


def modules_after(statement):
    code = f"import sys; {statement}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.slow_unit
def test_importing_the_package_is_light():
    assert not modules_after("import trl_parity") & {"torch", "vllm", "wandb", "matplotlib", "trl", "transformers"}
    assert not modules_after("from trl_parity import ParityConfig; ParityConfig()") & {"torch", "vllm", "wandb", "trl"}
    assert not modules_after("from trl_parity import ParityCallback") & {"vllm", "wandb", "matplotlib", "trl"}


def test_public_names_are_exactly_all():
    import trl_parity

    for name in trl_parity.__all__:
        assert getattr(trl_parity, name) is not None
    assert set(dir(trl_parity)) == set(trl_parity.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nope'"):
        trl_parity.Nope  # noqa: B018


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import tables

    return tables


def test_the_docs_name_every_scalar_with_its_formula(tables):
    from trl_parity.metrics.scalars import SCALARS

    page = tables.filled((ROOT / "docs" / "scalars.md").read_text())
    for name, formula in SCALARS.items():
        assert page.count(f"| `{name}` | {formula.replace('|', chr(92) + '|')} |") == 1, name


def test_the_docs_name_every_setting_rule_cause_and_command(tables):
    from trl_parity.causes import CAUSES
    from trl_parity.cli import COMMANDS
    from trl_parity.config.parity import ParityConfig
    from trl_parity.config.rules import DEFAULT_RULES

    pages = {
        name: tables.filled((ROOT / "docs" / f"{name}.md").read_text()) for name in ("settings", "causes", "commands")
    }
    for name in ParityConfig.__dataclass_fields__:
        assert f"`{name}` |" in pages["settings"]
    for rule in DEFAULT_RULES:
        assert f"| `{rule.stat}` | {rule.limit!r} |" in pages["settings"]
    for name, cause in CAUSES.items():
        assert f"## `{name}`" in pages["causes"]
        assert cause.what in pages["causes"]
    for name in COMMANDS:
        assert f"usage: trl-parity {name} " in pages["commands"]
