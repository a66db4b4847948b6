"""What one window does to the bets, against the formulas of the docstrings, number by number."""

import math

import numpy as np
import pytest

from trl_parity.judging.evidence import Evidence, Past

SHARES = [0.95 / 2**i for i in range(8)]

SHIFTS = (0.25, 0.5, 1.0, 2.0, 3.0)

STATS = ("kl_k1", "logp_abs_diff/mean", "kl_k3", "entropy/drift")

MEAN = (-0.002, -4.0, -8.0, 0.01)

WIDE = ((1e-6, 0.04, 0.2, 1e-4), (0.0, 0.02, 0.19, -1e-5))  # variances and covariances

TIGHT = tuple(tuple(1e-4 * x for x in moments) for moments in WIDE)

WINDOW = {
    "ratio/clipped": 1.001, "ratio/clipped_square": 3e-4, "kl_k1": 0.004, "trimmed/logp_abs_diff/mean": 0.025,
    "trimmed/kl_k3": 6e-4, "entropy/drift": 0.07, "entropy/trainer": 2.0, "floor/logp_abs_diff/mean": 0.016,
    "floor/kl_k3": 2e-4, "floor_upper/logp_abs_diff/mean": 0.018, "floor_upper/kl_k3": 2.5e-4,
}  # fmt: skip

ERRORS = {"kl_k1": 5e-4, "logp_abs_diff/mean": 0.012, "kl_k3": 1e-4, "entropy/drift": 0.03}

WINDOWS = {
    "the past's spread": WINDOW,
    "larger standard errors": WINDOW | {f"se/{stat}": x for stat, x in ERRORS.items()},
    "a peaked law": WINDOW | {"entropy/trainer": 0.05, "entropy/drift": -0.08},
    "a sample": WINDOW | {"se/entropy/drift": 0.001, "cost/coverage": 0.25},
    "wide floors": WINDOW | {"floor/logp_abs_diff/mean": 0.05, "floor_upper/logp_abs_diff/mean": 0.002},
    "the other way": WINDOW | {"kl_k1": -0.004, "trimmed/logp_abs_diff/mean": 1e-4, "ratio/clipped": 0.99},
}


def score(t, dof):
    """Log-factors on a t, of each shift."""
    z = math.copysign(math.sqrt(dof * math.log1p(t * t / dof)), t) * (8 * dof + 1) / (8 * dof + 3)
    return [b * z - b * b / 2 for b in SHIFTS]


def by_hand(window, tokens, sequences, copies, known, moments):
    """Log-factors by test."""
    var, cov = moments
    delta, size, k3, entropy_drift = -window["kl_k1"], *(window[name] for name in
        ("trimmed/logp_abs_diff/mean", "trimmed/kl_k3", "entropy/drift"))  # fmt: skip
    upper, upper_size = window["floor_upper/kl_k3"], window["floor_upper/logp_abs_diff/mean"]
    y = [delta, math.log(max(size, 0.001)), math.log(max(k3, 1e-4)), entropy_drift]
    limits = [
        upper + 0.002,
        math.log(max(upper_size + 0.001, 1.25 * upper_size)),
        math.log(max(upper + 1e-4, 1.25 * upper)),
        size + 0.02,
    ]
    scales, dofs = [], []
    for i, stat in enumerate(STATS):
        r = min(max(cov[i] / var[i], 0.0), 0.9)
        spread = math.sqrt(var[i] * known[i] / (known[i] - 1) * (1 + r) / (1 - r)) if known[i] >= 5 else 0.0
        error = window.get(f"se/{stat}", 0.0) / (1, size, k3, 1)[i]
        scales.append(max(spread, error, (1e-4, 0.15, 0.3, 0)[i]))
        dofs.append((sequences if error > spread else known[i]) - 1)
    entropy, scored = window["entropy/trainer"], tokens * window.get("cost/coverage", 1.0)
    rare = max(-math.log(entropy), 0.0)
    scales[3] = max(scales[3], math.sqrt(entropy * (1 + rare) / scored) + (3 + rare) / scored)

    def side(i, sign=1):
        return score((sign * y[i] - limits[i]) / scales[i], dofs[i])

    change = []
    for i, floor in ((1, window["floor/logp_abs_diff/mean"]), (2, window["floor/kl_k3"])):
        level = math.exp(MEAN[i])
        limit = math.log(max(1.25 * level, level + (0.001, 1e-4)[i - 1], floor))
        t = (y[i] - limit) / (scales[i] * math.sqrt(1 + 1 / known[i]))
        change += score(t, dofs[i]) if known[i] >= 20 else [0.0] * len(SHIFTS)
    mean, square, honesty = window["ratio/clipped"] - 1, window["ratio/clipped_square"], []
    for x, effect in ((mean, 0.002), (-mean, 0.002 + 1.26 * upper)):
        total = tokens * (x - effect) / (1 + effect)
        squares = tokens * (square - 2 * effect * x + effect**2) / (1 + effect) ** 2
        honesty += [(b * total - (-math.log(1 - b) - b) * squares) / copies for b in SHARES]
    return {
        "honesty": honesty,
        "drift": side(0) + side(1) + side(2) + side(0, -1),
        "change": change,
        "entropy": [x / copies for x in side(3) + side(3, -1)],
    }


@pytest.mark.parametrize(
    ("known", "moments"), [((30, 40, 50, 60), WIDE), ((5, 20, 19, 5), WIDE), ((30, 20, 19, 5), TIGHT)]
)
@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_is_bet_on_as_the_formulas_say(name, known, moments):
    evidence = Evidence()
    evidence.past.load_state({"moments": [known, MEAN, *moments, [0.0] * 4], "queue": []})
    evidence.update(7, 600, 12, WINDOWS[name], copies=2)
    waited = 1 - math.log(2) / math.log(3)  # the wealth that a first window brings
    for test, factors in by_hand(WINDOWS[name], 600, 12, 2, known, moments).items():
        if any(factors):
            found = evidence.bets[test].wealth / waited
            assert found == pytest.approx(np.exp(factors).clip(max=100.0), rel=1e-9), test


def test_a_runs_past_cuts_off_what_is_far_and_knows_its_own_uncertainty():
    past = Past((1,))

    def add(*values):
        for x in values:
            past.add(np.array([x]), np.array([True]))

    add(5.0, 6.0, 7.0)
    assert past.cov[0] == pytest.approx(1 / 3)  # (1 - 1/3) 1/3 x 1.5 x 1: of the first, all is residual
    swinging = Past((1,))
    y = [1.0 + 0.1 * (-1) ** i for i in range(26)]
    for x in y:
        swinging.add(np.array([x]), np.array([True]))
    plain = y[: int(swinging.n[0])]
    assert swinging.mean[0] == pytest.approx(np.mean(plain))
    assert swinging.spread[0] == pytest.approx(np.std(plain, ddof=1))
    mean, spread, n = swinging.mean[0], math.sqrt(swinging.var[0]), len(plain)
    swinging.queue = [np.array([1e6]), *swinging.queue]
    swinging.add(np.array([1.0]), np.array([True]))
    assert swinging.mean[0] - mean == pytest.approx(3 * spread / (n + 1))


def test_half_of_the_limit_suspects_the_floor_and_is_the_most_that_a_window_against_it_shows():
    evidence = Evidence(alpha=1e-4)
    for test, bets in evidence.bets.items():
        bets.windows, bets.losses, bets.log10_evidence = (
            9,
            1,
            {"drift": 2.0, "change": 3.9, "honesty": 4.0}.get(test, 1),
        )
    shown = {test: evidence.scalars()[f"evidence/{test}"] for test in evidence.bets}
    assert shown == {"drift": 2.0, "change": 2.0, "honesty": 0.0, "entropy": 1}
    assert evidence.suspects_floor
    evidence.bets["drift"].log10_evidence = 1.9
    assert not evidence.suspects_floor
