"""The public face: names, a light import, scalars as documented."""

import subprocess
import sys

import pytest
from support import ROOT


def modules_after(statement):
    code = f"import sys; {statement}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


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


def test_the_docs_name_every_scalar_with_its_formula():

    from trl_parity.metrics.scalars import SCALARS

    page = (ROOT / "docs" / "scalars.md").read_text()
    for name, formula in SCALARS.items():
        assert f"| `{name}` | {formula.replace('|', chr(92) + '|')} |" in page, name
