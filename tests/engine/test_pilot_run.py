"""A pilot of the recipe."""

import json
import sys

import pytest
from support import ROOT
from support.pilots import rewards_of
from support.processes import RENDEZVOUS, free_port

from trl_parity import RewardBaseline
from trl_parity.cli import main


@pytest.mark.engine
def test_a_short_real_run_of_the_recipe(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in RENDEZVOUS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    learned = RewardBaseline(rewards_of(1.6, n=500, spread=0.05), "more than this task can give")
    learned.save(tmp_path / "learned.json")
    launch = [sys.executable, "recipes/grpo/train.py", "--config", "configs/grpo_tiny_cpu.yaml"]
    launch += ["--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no"]
    pilot = ["pilot", "--output", str(tmp_path / "run"), "--json"]
    assert main([*pilot, "--steps", "3", "--baseline", str(tmp_path / "learned.json"), "--", *launch]) == 1
    result = json.loads(capfd.readouterr().out)
    seen = {check["name"]: (check["outcome"], check["text"]) for check in result["checks"]}
    assert seen["training"] == ("pass", "went through, 3 steps")
    assert seen["parity"] == ("pass", "3 of 3 windows judged: 3 OK")
    assert seen["drift"][0] == seen["entropy"][0] == "pass"
    assert seen["rewards"][0] == "fail"  # no completion can get more than 1.5
    assert seen["rewards"][1].endswith("lower than the baseline's")
    assert "of 192, baseline" in seen["rewards"][1]  # 3 batches of 64 completions
    own = str(tmp_path / "run" / "parity" / "rewards.json")
    assert main([*pilot, "--baseline", own]) == 0  # against its own it may
