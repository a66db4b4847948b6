"""`trl-parity compare`: the test's own error rates, its answers, and what it prints."""

import json

import numpy as np
import pytest
from support.runs import run, safe

from trl_parity.cli import main
from trl_parity.results.compare import COLUMNS, autocorrelation_time, compare, halts_apart, holm
from trl_parity.results.reader import Columns


def columns(values, floor=None, first=1, stat="kl_k3", status="OK"):
    rows = [
        {"step": first + i, "status": status, "streak": 0, "reason": "", stat: v, f"floor/{stat}": floor}
        for i, v in enumerate(values)
    ]
    return Columns.of(rows, COLUMNS)


def ar1(rng, n, phi, size):
    """Stationary: x_t = φ x_t-1 + e_t, variance 1."""
    x = rng.standard_normal((size, n))
    x[:, 1:] *= (1 - phi * phi) ** 0.5
    for t in range(1, n):
        x[:, t] += phi * x[:, t - 1]
    return x


def answers(a, b, **kwargs):
    return {c.stat: c.verdict(0.05) for c in compare([columns(a, **kwargs), columns(b, **kwargs)])}


@pytest.mark.slow_unit
@pytest.mark.parametrize(("n", "phi"), [(30, 0.0), (30, 0.3), (100, 0.6), (300, 0.8)])
def test_runs_that_do_not_differ_are_rarely_said_to(n, phi):
    """At the null hypothesis' edge (no floor, so no margin): at most 5 % and what chance adds to it."""
    x = ar1(np.random.default_rng(0), n, phi, 200)
    y = ar1(np.random.default_rng(1), n, phi, 200)
    wrong = sum(answers(a, b).get("kl_k3") == "differs" for a, b in zip(x, y, strict=True))
    assert wrong / 200 < 0.05 + 3 * (0.05 * 0.95 / 200) ** 0.5


@pytest.mark.slow_unit
@pytest.mark.parametrize("phi", [0.5, 0.8])
@pytest.mark.parametrize("n", [10, 15, 20, 30, 50])
def test_a_few_autocorrelated_windows_rarely_differ_by_chance(n, phi):
    x = ar1(np.random.default_rng(n), n, phi, 300)
    y = ar1(np.random.default_rng(n + 1), n, phi, 300)
    wrong = sum(answers(a, b).get("kl_k3") == "differs" for a, b in zip(x, y, strict=True))
    assert wrong / 300 <= 0.05 + 2 * (0.05 * 0.95 / 300) ** 0.5


@pytest.mark.parametrize(("n", "phi", "shift"), [(20, 0.0, 2.5), (50, 0.5, 2.5), (100, 0.8, 4.0)])
def test_a_real_difference_is_still_found(n, phi, shift):
    x, y = (ar1(np.random.default_rng(seed), n, phi, 40) for seed in (0, 1))
    found = sum(answers(a, b + shift).get("kl_k3") == "differs" for a, b in zip(x, y, strict=True))
    assert found >= 32


def test_taking_neighbours_for_independent_would_be_wrong_far_more_often():
    """The same, without looking at the autocorrelation: what the estimate of τ is for."""
    from scipy import stats

    x = ar1(np.random.default_rng(0), 300, 0.8, 200) - ar1(np.random.default_rng(1), 300, 0.8, 200)
    assert (stats.ttest_1samp(x, 0, axis=1).pvalue < 0.05).mean() > 0.3


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.8])
def test_the_autocorrelation_time_is_found(phi):
    x = ar1(np.random.default_rng(2), 2000, phi, 20)
    assert np.mean([autocorrelation_time(row) for row in x]) == pytest.approx((1 + phi) / (1 - phi), rel=0.15)


def test_a_difference_within_the_floor_is_none_and_one_beyond_it_is():
    rng = np.random.default_rng(3)
    a = 1e-5 + 1e-6 * rng.standard_normal(40)
    assert answers(a, a + 5e-6, floor=1e-5) == {"kl_k3": "same"}
    assert answers(a, a + 3e-5, floor=1e-5) == {"kl_k3": "differs"}
    assert answers(a, a - 3e-5, floor=1e-5) == {"kl_k3": "differs"}
    # the larger floor of the two counts, whichever run it is
    pair = [columns(a, floor=1e-5), columns(a + 3e-5, floor=5e-5)]
    assert [c.verdict(0.05) for c in compare(pair)] == ["same"]
    assert [c.verdict(0.05) for c in compare(pair[::-1])] == ["same"]


def test_what_both_runs_share_falls_out_of_the_pairs():
    """A trend in both, a hundred times the difference."""
    rng = np.random.default_rng(4)
    trend = np.linspace(1, 0, 60)
    a, b = (trend + 1e-3 * rng.standard_normal(60) + d for d in (0, 0.01))
    [paired] = compare([columns(a), columns(b)])
    assert (paired.paired, paired.verdict(0.05)) == (True, "differs")
    assert paired.low < 0.01 < paired.high
    [apart] = compare([columns(a), columns(b, first=1000)])  # no step in common
    assert not apart.paired
    assert apart.verdict(0.05) != "differs"  # the trend leaves hardly an independent window


def test_ess_is_compared_by_what_it_lacks():
    rng = np.random.default_rng(5)
    a = 0.999 + 1e-5 * rng.standard_normal(30)
    [c] = compare(
        [
            columns(a, floor=0.999, stat="ess"),
            columns(a - 0.01 + 1e-5 * rng.standard_normal(30), floor=0.999, stat="ess"),
        ]
    )
    assert c.verdict(0.05) == "differs"
    assert c.mean_b - c.mean_a == pytest.approx(-0.01, abs=1e-5)
    assert c.low <= c.mean_b - c.mean_a <= c.high < 0


def test_many_statistics_and_runs_are_holms():
    assert holm([0.01, 0.04, 0.03, float("nan")])[:3] == pytest.approx([0.03, 0.06, 0.06])
    rng = np.random.default_rng(6)
    x = rng.standard_normal((6, 30))
    found = compare([columns(row) for row in x])
    assert {c.run for c in found} == {1, 2, 3, 4, 5}
    assert all(c.p_holm >= c.p or np.isnan(c.p) for c in found)  # NaN: one pair resembles its neighbours by chance
    assert sum(np.isnan(c.p) for c in found) == 1


def test_too_few_windows_are_no_answer():
    assert answers([1.0, 2.0], [1.0, 2.0]) == {"kl_k3": "too few windows"}


def test_a_halt_that_the_other_run_went_past_sets_them_apart():
    sick, well, short = columns([1.0] * 9), columns([1.0] * 9), columns([1.0] * 4)
    sick.first_halt = 7
    assert halts_apart(sick, well)
    assert halts_apart(well, sick)
    assert not halts_apart(sick, short)  # it had not come so far
    well.first_halt = 9
    assert not halts_apart(sick, well)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(7)
    for name, level in (("before", 1e-5), ("after", 1.1e-5), ("worse", 8e-5)):
        run(folder / name, level * (1 + 0.1 * rng.standard_normal(20)), tokens=False)
    return folder


@pytest.mark.slow_unit
def test_exit_codes_and_words(runs, tmp_path, capsys):
    before, after, worse = (str(runs / name) for name in ("before", "after", "worse"))
    assert main(["compare", before, after]) == 0
    out = capsys.readouterr().out
    assert "not shown to differ" in out or "the same as before within" in out
    assert "\x1b" not in out
    assert main(["compare", before, after, worse, "--html", str(tmp_path / "c.html"), "--picture",
                 str(tmp_path / "c.png"), "--markdown", str(tmp_path / "c.md")]) == 1  # fmt: skip
    out = capsys.readouterr().out
    assert "worse differs from before beyond the noise floor in kl_k3" in " ".join(out.split())
    shown = safe((tmp_path / "c.html").read_text())
    assert "H0: |E[x_B - x_A]| <= margin" in shown
    assert (tmp_path / "c.html").read_text().count("<img") == 1
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    assert "](c-pictures/compare.png)" in (tmp_path / "c.md").read_text()
    assert main(["compare", before]) == 2
    assert "Expected two or more" in capsys.readouterr().err
    assert main(["compare", before, after, "--alpha", "5"]) == 2


def test_json_has_every_number(runs, capsys):
    assert main(["compare", str(runs / "before"), str(runs / "worse"), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    [kl] = [t for t in result["tests"] if t["stat"] == "kl_k3"]
    assert (kl["answer"], kl["paired"], kl["windows"], kl["margin"]) == ("differs", True, 20, pytest.approx(1e-5))
    assert result["exit_code"] == 1


def test_names_tell_runs_apart():
    from trl_parity.cli.compare import names_of

    assert names_of(["runs/a/parity/metrics.jsonl", "runs/b"]) == ["a", "b"]
    assert names_of(["x/run", "y/run"]) == ["x/run", "y/run"]
    assert names_of(["a", "a"]) == ["a (1)", "a (2)"]
