"""Reward baselines against naive oracles, as files, and as a picture."""

import json
import logging
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from trl_parity.errors import ConfigError, DataError
from trl_parity.metrics.rewards import RewardBaseline, RewardComparison, RewardWindow, design_effect

# few distinct values, so that ties abound, next to continuous ones that float32 holds exactly
REWARDS = st.lists(
    st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(-1e6, 1e6, width=32)), min_size=20, max_size=60
)


def baseline(values, **kwargs):
    return RewardBaseline(np.asarray(values, dtype=np.float64), **kwargs)


def naive_delta(x, y):
    return sum((a > b) - (a < b) for a in x for b in y) / (len(x) * len(y))


def naive_ks(x, y):
    return max(abs(sum(a <= t for a in x) / len(x) - sum(b <= t for b in y) / len(y)) for t in [*x, *y])


def comparison(**values):
    return RewardComparison(
        **{"count": 100, "mean": 0.0, "baseline_mean": 0.0, "effect_size": 0.0, "ks": 0.0, "p_value": 1.0} | values
    )


@given(REWARDS, REWARDS)
@settings(max_examples=40, deadline=None)
def test_statistics_equal_naive_counts_and_flip_with_the_samples(x, y):
    forth, back = baseline(y).compare(x), baseline(x).compare(y)
    assert forth.effect_size == pytest.approx(naive_delta(x, y), abs=1e-12)
    assert forth.ks == pytest.approx(naive_ks(x, y), abs=1e-12)
    assert forth.effect_size == -back.effect_size
    assert (forth.ks, forth.p_value) == pytest.approx((back.ks, back.p_value), abs=1e-9)
    assert -1 <= forth.effect_size <= 1
    assert 0 <= forth.ks <= 1
    assert 0 <= forth.p_value <= 1
    assert (forth.count, forth.mean, forth.baseline_mean) == (len(x), np.mean(x), np.mean(y))


def test_known_numbers():
    low, high = [0.0] * 30 + [1.0] * 10, [0.0] * 10 + [1.0] * 30
    result = baseline(low).compare(high)
    # 0/1 rewards: both statistics are the difference of the means
    assert (result.effect_size, result.ks) == pytest.approx((0.5, 0.5))
    assert baseline([0.0] * 20).compare([1.0] * 20).effect_size == 1.0
    assert baseline([1.0] * 20).compare([0.0] * 20).effect_size == -1.0
    same = baseline([1.0] * 20).compare([1.0] * 20)
    assert (same.effect_size, same.ks, same.p_value) == (0.0, 0.0, 1.0)


def test_delta_is_what_mann_whitney_gives():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, 300) / 4, rng.integers(0, 6, 200) / 4
    u = mannwhitneyu(x, y).statistic
    assert baseline(y).compare(x).effect_size == pytest.approx(2 * u / (300 * 200) - 1, abs=1e-12)


def test_a_small_sample_has_the_exact_p_value():
    # 20 against 20, apart: of the C(40, 20) orders two are this extreme
    result = baseline(np.arange(20)).compare(np.arange(20) + 100)
    assert result.p_value == pytest.approx(2 / math.comb(40, 20), rel=1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n", [20, 500, 937, 5000, 20000])
def test_large_and_uneven_samples_pass_without_scipy_warnings(n):
    rng = np.random.default_rng(n)
    result = baseline(rng.normal(size=1000)).compare(rng.normal(3, size=n))
    assert result.p_value < 1e-9
    assert result.effect_size > 0.9


@pytest.mark.slow_unit
@pytest.mark.parametrize(
    ("draw", "most"),
    [
        (lambda rng, n: rng.normal(size=n), 0.05),
        (lambda rng, n: rng.integers(0, 2, n).astype(float), 0.01),  # ties: conservative
    ],
    ids=["continuous", "0/1"],
)
@pytest.mark.parametrize("n", [50, 1000])
def test_false_alarms_stay_at_alpha(draw, most, n):
    rng = np.random.default_rng(7)
    draws = 300
    alarms = sum(baseline(draw(rng, 1000)).compare(draw(rng, n)).parted(0.0, 0.05) for _ in range(draws))
    # three standard deviations above the expected count
    assert alarms <= most * draws + 3 * math.sqrt(most * draws)


def grouped(rng, prompts, size, correlation, cut=None):
    """(rewards, prompts): each prompt's ``size`` rewards share a part of it; ``cut``: 0/1, those over it."""
    shared = rng.normal(size=(prompts, 1)) * correlation**0.5
    values = (shared + rng.normal(size=(prompts, size)) * (1 - correlation) ** 0.5).ravel()
    return values if cut is None else (values > cut).astype(float), np.repeat(np.arange(prompts), size)


@pytest.mark.slow_unit
@pytest.mark.parametrize(("prompts", "size", "correlation", "cut"), [
    (125, 8, 0.5, None), (40, 8, 0.5, None), (20, 16, 0.9, None), (125, 8, 0.5, 0.0), (6, 4, 0.5, None),
])  # fmt: skip
def test_completions_of_one_prompt_are_no_independent_rewards(prompts, size, correlation, cut):
    """False alarms at most alpha, where they were many times that; ``RewardWindow`` hands on what it was told."""
    rng, alarms, naive, draws = np.random.default_rng(11), 0, 0, 200
    for _ in range(draws):
        old = baseline(grouped(rng, 125, size, correlation, cut)[0])
        window = RewardWindow()
        window.extend(*grouped(rng, prompts, size, correlation, cut))
        alarms += old.compare(window.rewards, window.prompts).parted(0.0, 0.05)
        naive += old.compare(window.rewards).parted(0.0, 0.05)
    assert alarms <= 0.05 * draws + 3 * math.sqrt(0.05 * draws)
    assert naive >= 0.1 * draws or cut is not None


def test_a_real_shift_of_grouped_rewards_is_seen():
    rng = np.random.default_rng(12)
    old = baseline(grouped(rng, 125, 8, 0.5)[0])
    rewards, prompts = grouped(rng, 125, 8, 0.5)
    assert not old.compare(rewards, prompts).parted(0.3, 0.001)
    assert old.compare(rewards + 1.0, prompts).parted(0.3, 0.001)


def test_the_design_effect_of_known_groups():
    rng = np.random.default_rng(13)
    apart = rng.normal(size=800)
    assert design_effect(apart, np.arange(800)) == 1.0  # a prompt each
    assert design_effect(apart, np.zeros(800)) == 800.0  # one prompt: one piece of evidence
    assert design_effect(np.repeat(apart[:100], 8), np.repeat(np.arange(100), 8)) == 8.0  # of a prompt all alike
    assert 1.0 <= design_effect(apart, np.repeat(np.arange(100), 8)) < 1.5
    rewards, prompts = grouped(rng, 2000, 8, 0.5)
    assert design_effect(rewards, prompts) == pytest.approx(1 + 7 * 0.5, rel=0.08)  # ranks, and the upper end
    shuffled = rng.permutation(len(rewards))
    assert design_effect(rewards[shuffled], prompts[shuffled]) == pytest.approx(design_effect(rewards, prompts))


def test_the_p_value_is_no_constant_one():
    rng = np.random.default_rng(8)
    p = [baseline(rng.normal(size=1000)).compare(rng.normal(size=1000)).p_value for _ in range(200)]
    assert 0.35 < np.mean(p) < 0.65
    assert min(p) < 0.05 < 0.95 < max(p)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_real_shift_is_seen_with_its_sign(sign):
    rng = np.random.default_rng(1)
    old = baseline(rng.normal(size=1000))
    result = old.compare(rng.normal(0.5 * sign, size=300))
    assert result.parted(min_effect=0.2, alpha=0.001)
    assert sign * result.effect_size > 0.2  # 0.28 expected


def test_a_collapse_to_the_middle_is_seen_by_ks_alone():
    rng = np.random.default_rng(2)
    result = baseline(rng.normal(size=1000)).compare(rng.normal(0, 0.1, size=1000))
    assert abs(result.effect_size) < 0.1
    assert result.ks > 0.4
    assert result.parted(min_effect=0.2, alpha=0.001)


def test_parted_needs_significance_and_size():
    assert comparison(p_value=0.001, effect_size=0.3).parted(0.2, 0.01)
    assert comparison(p_value=0.001, effect_size=-0.3).parted(0.2, 0.01)
    assert comparison(p_value=0.001, ks=0.2).parted(0.2, 0.01)
    assert not comparison(p_value=0.001, effect_size=0.19, ks=0.19).parted(0.2, 0.01)
    assert not comparison(p_value=0.01, effect_size=0.9, ks=0.9).parted(0.2, 0.01)


def test_on_a_big_sample_a_tiny_difference_is_significant_and_no_news():
    rng = np.random.default_rng(3)
    result = baseline(rng.normal(size=100_000)).compare(rng.normal(0.05, size=100_000))
    assert result.p_value < 1e-6
    assert not result.parted(min_effect=0.1, alpha=0.001)


def test_float32_rewards_tie_with_the_same_rewards_from_a_file():
    values = [0.1, 0.2, 0.7] * 10
    result = baseline(values).compare(np.asarray(values, dtype=np.float32))
    assert (result.ks, result.effect_size) == (0.0, 0.0)


def test_nonfinite_rewards_do_not_count():
    old = baseline(np.arange(20))
    assert old.compare([1.0] * 19 + [math.nan, math.inf, None]) is None
    result = old.compare([1.0] * 20 + [math.nan, -math.inf, None])
    assert (result.count, result.mean) == (20, 1.0)
    assert old.compare([]) is None


def test_from_rewards_keeps_the_last_finite_ones_and_says_what_it_dropped(caplog):
    with caplog.at_level(logging.WARNING):
        kept = RewardBaseline.from_rewards([*range(30), math.nan, None, 30.0], limit=25, name="old")
    assert kept.rewards.tolist() == [*range(6, 31)]
    assert kept.name == "old"
    assert "2 of 33 rewards are not finite" in caplog.text
    caplog.clear()
    assert RewardBaseline.from_rewards(iter(range(1500))).rewards.size == 1000
    assert not caplog.records


def test_a_baseline_does_not_change_under_its_owner():
    values = np.arange(20.0)
    old = RewardBaseline(values)
    values[0] = 99
    assert old.rewards[0] == 0
    with pytest.raises(ValueError, match="read-only"):
        old.rewards[0] = 1


def test_tensors_are_taken():
    assert RewardBaseline.from_rewards(torch.arange(20)).rewards.tolist() == [*range(20)]


def test_wrong_values_are_refused():
    with pytest.raises(ConfigError, match=r"has 19 finite rewards. Expected at least 20; collect more"):
        RewardBaseline.from_rewards([1.0] * 19 + [math.nan])
    with pytest.raises(ConfigError, match=r"has 1 non-finite values among 21.*from_rewards"):
        baseline([1.0] * 20 + [math.nan])
    with pytest.raises(ConfigError, match=r"limit is 5. Expected a whole number >= 20"):
        RewardBaseline.from_rewards([1.0] * 30, limit=5)
    with pytest.raises(DataError, match=r"shape \(5, 5\).*Expected one flat sequence"):
        RewardBaseline.from_rewards(np.ones((5, 5)))
    for values in (["a"] * 20, ["1"] * 20, "1" * 20, 3.0, [[1.0], [1.0, 2.0]], torch.ones(20, requires_grad=True)):
        with pytest.raises(DataError, match="Expected one flat sequence of numbers"):
            baseline(np.arange(20)).compare(values)


def test_save_and_load_give_the_same_bits_and_leave_nothing_else(tmp_path):
    path = tmp_path / "deep" / "baseline.json"
    old = baseline(np.random.default_rng(4).normal(size=50) / 3, name="run 7 – ü")
    old.save(path)
    old.save(path)  # over an existing file
    again = RewardBaseline.load(path)
    assert again.rewards.tobytes() == old.rewards.tobytes()
    assert again.name == old.name
    assert os.listdir(path.parent) == ["baseline.json"]
    assert json.loads(path.read_text()) == {
        "schema_version": 1,
        "name": "run 7 – ü",
        "count": 50,
        "rewards": old.rewards.tolist(),
    }


def test_a_failed_save_keeps_what_was_there_and_leaves_no_temporary_file(tmp_path):
    target = tmp_path / "taken"
    target.mkdir()
    with pytest.raises(ConfigError, match=r"cannot write .*taken: .*Expected a file name in a writable directory"):
        baseline(np.arange(20)).save(target)
    assert os.listdir(tmp_path) == ["taken"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="cannot write"):
        baseline(np.arange(20)).save(tmp_path / "file" / "baseline.json")
    assert (tmp_path / "file").read_text() == "mine"


GOOD = {"schema_version": 1, "name": "", "count": 20, "rewards": [1.0] * 20}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON .*Expected a reward baseline; write it again"),
        ("[]", "holds a list. Expected a mapping"),
        (json.dumps(GOOD | {"schema_version": 2}), "has schema_version 2. Expected 1: read it with"),
        ("{}", "has schema_version None. Expected 1"),
        (json.dumps(GOOD | {"rewards": [1.0] * 19 + [math.nan]}), "has 1 non-finite values among 20. Expected finite"),
        (json.dumps(GOOD).replace("[1.0,", "[1e999,"), "has 1 non-finite values among 20. Expected finite"),
        (json.dumps(GOOD | {"rewards": [10**400] * 20}), r"rewards\[0\] is a number of about 400 digits"),
        (json.dumps(GOOD | {"rewards": [1.0] * 19, "count": 19}), "has 19 finite rewards. Expected at least 20"),
        (json.dumps(GOOD | {"count": 21}), "has count 21 and 20 rewards. Expected the same number"),
        (json.dumps(GOOD | {"rewards": ["1"] * 20}), "rewards is not a list of numbers"),
        (json.dumps(GOOD | {"rewards": [True] * 20}), "rewards is not a list of numbers"),
        (json.dumps(GOOD | {"rewards": None}), "rewards is not a list of numbers"),
        (json.dumps(GOOD | {"name": 3}), "name is 3. Expected a string"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps(GOOD))
    assert RewardBaseline.load(path).rewards.tolist() == [1.0] * 20
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        RewardBaseline.load(path)
    assert str(path) in str(caught.value)


def test_a_missing_or_binary_file_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*none\.json: No such file.*RewardBaseline\.save"):
        RewardBaseline.load(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.json is not valid JSON"):
        RewardBaseline.load(tmp_path / "binary.json")


def test_a_window_keeps_the_last_rewards():
    window = RewardWindow(size=20)
    window.extend(range(15))
    window.extend([math.nan, None, math.inf])
    assert len(window) == 15
    window.extend(range(15, 25))
    assert window.rewards.tolist() == [*range(5, 25)]
    window.rewards[0] = 99  # a copy
    assert window.rewards[0] == 5


def test_a_window_keeps_which_rewards_share_a_prompt():
    window, again = RewardWindow(size=20), RewardWindow(size=20)
    window.extend([0.0, 1.0])  # nobody says: each has its own
    window.extend([0.0, math.nan, 1.0, None, 2.0], [7, 7, 7, 9, 9])
    assert window.rewards.tolist() == [0.0, 1.0, 0.0, 1.0, 2.0]
    assert window.prompts.tolist() == [10, 11, 7, 7, 9]
    again.load_state(json.loads(json.dumps(window.state())))
    assert again.prompts.tolist() == window.prompts.tolist()
    again.load_state({"rewards": [1.0, 2.0]})  # as 0.6.0 kept it
    assert again.prompts.tolist() == [1, 2]
    assert again.state() == {"rewards": [1.0, 2.0]}
    with pytest.raises(ValueError, match="shorter"):
        window.extend([1.0, 2.0], [1])


def test_window_state_survives_a_restart_through_json():
    first, second, small = RewardWindow(size=30), RewardWindow(size=30), RewardWindow(size=20)
    first.extend(np.random.default_rng(5).normal(size=40))
    second.extend([7.0] * 5)  # replaced, not added to
    state = json.loads(json.dumps(first.state(), allow_nan=False))
    second.load_state(state)
    small.load_state(state)
    assert second.rewards.tolist() == first.rewards.tolist()
    assert small.rewards.tolist() == first.rewards[-20:].tolist()
    for window in (first, second):
        window.extend([1.0])
    assert second.rewards.tolist() == first.rewards.tolist()


@pytest.mark.parametrize("size", [0, 19, 20.0, True])
def test_a_window_too_small_to_compare_is_refused(size):
    with pytest.raises(ConfigError, match=r"size is .* Expected a whole number >= 20"):
        RewardWindow(size=size)


def test_importing_it_loads_no_heavy_library():
    code = "import sys, trl_parity.metrics.rewards; print(sorted({'torch', 'scipy', 'matplotlib'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
