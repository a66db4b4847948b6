"""The picture of rewards beside their baseline."""

import os
import struct
import sys

import numpy as np
import pytest

from trl_parity.errors import ConfigError
from trl_parity.metrics.rewards import RewardBaseline
from trl_parity.report.reward_figure import plot_rewards


def baseline(values, **kwargs):
    return RewardBaseline(np.asarray(values, dtype=np.float64), **kwargs)


@pytest.mark.parametrize(
    "run",
    [np.random.default_rng(6).normal(1, size=200), [1.0] * 50, [0.5] * 3, []],
    ids=["shifted", "constant", "too few", "none"],
)
def test_the_plot_is_a_png_of_800_pixels(tmp_path, run):
    path = tmp_path / "rewards.png"
    plot_rewards(baseline(np.random.default_rng(0).normal(size=100), name="$a_b$ {x " * 9), run, path)
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (800, 480)
    assert os.listdir(tmp_path) == ["rewards.png"]


@pytest.mark.slow_unit
@pytest.mark.filterwarnings("error")
def test_the_plot_takes_constant_and_huge_rewards(tmp_path):
    plot_rewards(baseline([1.0] * 20), [1.0] * 20, tmp_path / "constant.png")
    plot_rewards(baseline([1.0] * 20), [-1e300] + [1.0] * 20, tmp_path / "huge.png")
    assert sorted(os.listdir(tmp_path)) == ["constant.png", "huge.png"]


def test_missing_libraries_are_named_with_the_command(monkeypatch, tmp_path):
    old = baseline(np.arange(20))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"matplotlib.*pip install 'trl-parity\[report\]'"):
        plot_rewards(old, np.arange(20), tmp_path / "rewards.png")
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ConfigError, match=r"scipy.*pip install scipy"):
        old.compare(np.arange(20))
