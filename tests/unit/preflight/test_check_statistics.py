"""Statistics of equivalence against naive loops."""

import math
import random
from types import SimpleNamespace

import pytest
import torch

from trl_parity.errors import InterceptionError
from trl_parity.preflight.check.drift import Counterfactuals, Drift, Floors, Gaps, bucket, bucket_name
from trl_parity.preflight.check.engines import variant_rows
from trl_parity.preflight.check.equivalence import limit_rows, mechanism_rows
from trl_parity.preflight.check.journal import Journal
from trl_parity.preflight.check.rows import CheckOutcome, Limits, Row, RowVerdict, outcome, within_floor
from trl_parity.preflight.check.statistics import (
    SCALES,
    Sums,
    at_temperature,
    coarse_kl,
    exact_kl,
    fitted_scale,
    kolmogorov_smirnov,
    pit,
    scale_curve,
    surprisal,
    total_variation,
    wilson,
)


def laws(n=6, vocab=11, seed=0, spread=2.0):
    return (spread * torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)


def naive_kl(p, q):
    p, q = p.double().exp().tolist(), q.double().exp().tolist()
    out = []
    for a, b in zip(p, q, strict=True):
        a, b = [x / sum(a) for x in a], [x / sum(b) for x in b]
        out.append(sum(x * (math.log(x) - math.log(y)) for x, y in zip(a, b, strict=True) if x > 0))
    return out


def test_exact_kl_is_the_sum_over_the_vocabulary():
    p, q = laws(seed=1), laws(seed=2)
    assert exact_kl(p, q).tolist() == pytest.approx(naive_kl(p, q), rel=1e-9)
    assert exact_kl(p, p).tolist() == [0.0] * len(p)


def test_exact_kl_does_not_see_the_rounding_of_fp32_normalization():
    p = laws(seed=3, vocab=1000)
    assert float(exact_kl(p + 3e-7, p).max()) < 1e-13  # first-order errors would be 3e-7


def test_exact_kl_of_what_the_reference_excludes_is_infinite_and_the_other_way_round_finite():
    p, q = laws(1), laws(1)
    q[0, 0] = -math.inf
    assert exact_kl(p, q).tolist() == [math.inf]
    assert math.isfinite(float(exact_kl(q, p)))


def test_coarse_kl_is_a_lower_bound_that_is_tight_where_the_rest_is_alike():
    p, q = laws(50, seed=4), laws(50, seed=5)
    for k in (1, 3, 8):
        top = p.topk(k).indices
        assert bool((coarse_kl(p.gather(-1, top), q.gather(-1, top)) <= exact_kl(p, q) + 1e-9).all())
    assert coarse_kl(p[:, :10], q[:, :10]).tolist() == pytest.approx(exact_kl(p, q).tolist(), rel=1e-4)


def test_total_variation_and_temperature():
    p, q = laws(seed=6), laws(seed=7)
    naive = [0.5 * sum(abs(math.exp(a) - math.exp(b)) for a, b in zip(x, y, strict=True))
             for x, y in zip(p.tolist(), q.tolist(), strict=True)]  # fmt: skip
    assert total_variation(p, q).tolist() == pytest.approx(naive, abs=1e-6)
    torch.testing.assert_close(at_temperature(p, 0.5), (p.double() * 2).log_softmax(-1))


@pytest.mark.parametrize("factor", [0.6, 0.95, 1.003, 1.05, 1.7])
def test_a_scale_of_the_logits_is_found_and_explains_all(factor):
    q = laws(200, 30, seed=8)
    p = (q.double() * factor).log_softmax(-1)
    found, share = fitted_scale(scale_curve(p, q).tolist())
    assert found == pytest.approx(factor, rel=0.01)
    assert share > 0.97


def test_a_scale_explains_little_of_another_difference():
    p, q = laws(200, 30, seed=9), laws(200, 30, seed=10)
    assert fitted_scale(scale_curve(p, q).tolist())[1] < 0.8
    assert fitted_scale(scale_curve(q, q).tolist())[0] == pytest.approx(1.0, abs=1e-3)


def test_the_scale_curve_is_the_kl_to_the_scaled_law():
    p, q = laws(seed=11), laws(seed=12)
    naive = [sum(naive_kl(p, (q.double() * a).log_softmax(-1))) for a in SCALES]
    assert scale_curve(p, q).tolist() == pytest.approx(naive, rel=1e-6)


def test_surprisal_and_place_of_tokens_drawn_from_the_law():
    law = laws(2, 9, seed=13)
    generator = torch.Generator().manual_seed(0)
    which = torch.arange(4000) % 2
    tokens = torch.multinomial(law[which].exp(), 1, generator=generator)[:, 0]
    excess, variance = surprisal(law, tokens, which)
    assert abs(float(excess.sum() / variance.sum().sqrt())) < 4
    place = pit(law, tokens, which, torch.rand(4000, generator=generator))
    assert float((place.sort().values - torch.linspace(0, 1, 4000)).abs().max()) < 0.035
    # naive: probability of likelier tokens, plus a share of its own
    law[1, 5] = law[1, 7]  # of two alike the first comes first
    for row in (0, 1):
        p = law[row].double().softmax(-1).tolist()
        for token, u in ((0, 0.25), (5, 0.5), (7, 0.5)):
            naive = sum(x for i, x in enumerate(p) if (-x, i) < (-p[token], token)) + u * p[token]
            found = pit(law, torch.tensor([token]), torch.tensor([row]), torch.tensor([u]))
            assert float(found) == pytest.approx(naive, abs=1e-6)


def test_kolmogorov_smirnov_against_the_textbook():
    assert kolmogorov_smirnov(torch.tensor([0.1, 0.4, 0.7]))[0] == pytest.approx(0.3)
    middle = (torch.arange(2048) + 0.5) / 2048
    assert kolmogorov_smirnov(middle) == (pytest.approx(0.5 / 2048, abs=1e-7), pytest.approx(1.0))
    for critical, p in ((1.2238, 0.1), (1.3581, 0.05), (1.6276, 0.01)):  # of sqrt(n) D, many values
        distance, found = kolmogorov_smirnov(middle.double() * (1 - critical / math.sqrt(2048)))
        assert distance == pytest.approx(critical / math.sqrt(2048), abs=1e-3)
        assert found == pytest.approx(p, rel=0.1)


def test_wilson_against_the_textbook():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(50, 50)[0] == pytest.approx(50 / (50 + 1.959964**2), rel=1e-6)
    low, high = wilson(81, 263)
    assert (low, high) == (pytest.approx(0.2553, abs=2e-4), pytest.approx(0.3662, abs=2e-4))


def test_sums_add_up_and_keep_what_is_not_finite():
    values = torch.rand(500, generator=torch.Generator().manual_seed(0)).double()
    parts = Sums.of(values[:100]) + Sums.of(values[100:])
    assert parts.mean == pytest.approx(float(values.mean()))
    assert parts.maximum == float(values.max())
    assert parts.quantile(0.9) == pytest.approx(float(values.quantile(0.9)), rel=0.2)
    assert Sums.from_json(parts.to_json()) == parts
    bad = parts + Sums.of(torch.tensor([math.nan, math.inf]))
    assert (bad.bad, bad.mean, bad.maximum, bad.quantile(1.0)) == (2, math.inf, math.inf, math.inf)
    assert math.isnan(Sums().mean)


def test_buckets_of_context_lengths():
    for n in range(1, 3000):
        low, _, high = bucket_name(bucket(n)).replace(",", "").partition(" to ")
        assert int(low) <= n <= int(high or low)
    assert bucket(1) != bucket(2)


# ---- verdicts -----------------------------------------------------------------------------------------------------


def gaps(kl=1e-12, n=2000, first=None, later=None, trials=50):
    rng = random.Random(0)
    each = [torch.full((n // trials,), kl) * (1 + 0.01 * rng.random()) for _ in range(trials)]
    out = Gaps()
    for values in each:
        one = Gaps(kl=Sums.of(values), prefill_kl=Sums.of(values), trials=1, worst=float(values.mean()))
        one.over = int((values > Limits().max_kl).sum())
        one.over_squares, one.over_cross, one.sizes = one.over**2, one.over * len(values), len(values) ** 2
        at = {0: kl if first is None else first, 2: kl if later is None else later}
        one.positions = {k: Sums.of(torch.full((20,), math.sqrt(2 * v))) for k, v in at.items()}
        out += one
    return out


def rows_of(seen, engine, trainer=None, **what_if):
    floors = Floors(trainer or engine, engine, "float32", "bfloat16" if trainer else "float32")
    drift = Drift(seen, floors, Limits())
    settings = {"kv_cache_dtype": "auto", "engine_head_dtype": "float32"}
    read = what_if.pop("read", {"held": [], "held_error": ""})
    tried = Counterfactuals(what_if.pop("base", 0.0), 0.0, what_if)
    rows = limit_rows(drift)
    rows += mechanism_rows(drift, tried, settings=settings, config_differs={}, **read)
    return {row.id: row for row in rows}


def test_within_the_limits_and_the_noise_passes():
    rows = rows_of(gaps(2e-12), gaps(1e-12))
    assert {row.verdict for row in rows.values()} == {RowVerdict.PASS}
    assert outcome(list(rows.values())) is CheckOutcome.FIT


def test_a_limit_the_dtype_cannot_meet_is_out_of_reach_not_failed():
    rows = rows_of(gaps(4e-3), gaps(3.5e-3))
    assert rows["kl_mean"].verdict is rows["kl_max"].verdict is rows["pass_rate"].verdict is RowVerdict.OUT_OF_REACH
    assert "bfloat16" in rows["kl_mean"].fix or "float32" in rows["kl_mean"].fix
    assert outcome(list(rows.values())) is CheckOutcome.FIT


def test_over_the_limit_and_over_the_noise_fails():
    rows = rows_of(gaps(4e-3), gaps(1e-6))
    assert rows["kl_mean"].verdict is rows["kl_max"].verdict is rows["pass_rate"].verdict is RowVerdict.FAIL
    assert rows["model"].verdict is RowVerdict.FAIL  # and nothing else explains it
    assert outcome(list(rows.values())) is CheckOutcome.UNFIT


def test_under_the_limit_and_over_the_noise_fails_too():
    rows = rows_of(gaps(1e-5), gaps(1e-12))
    assert rows["kl_mean"].verdict is RowVerdict.PASS
    assert rows["logprobs"].verdict is rows["model"].verdict is RowVerdict.FAIL


def test_noise_of_a_coarser_engine_is_the_dtypes_fault_alone():
    rows = rows_of(gaps(1e-4), engine=gaps(1e-4), trainer=gaps(1e-12))
    assert [id for id, row in rows.items() if row.verdict is RowVerdict.FAIL] == ["dtype"]


def test_drift_that_spares_the_first_token_is_positional():
    rows = rows_of(gaps(1e-3, first=0.0, later=2e-2), gaps(1e-12))
    assert rows["positions"].verdict is RowVerdict.FAIL
    assert rows["model"].verdict is RowVerdict.PASS
    assert rows_of(gaps(1e-3, first=1e-3, later=2e-3), gaps(1e-12))["positions"].verdict is RowVerdict.PASS


def test_a_counterfactual_that_explains_half_is_to_blame():
    seen = gaps(1e-4)
    rows = rows_of(seen, gaps(1e-12), base=1e-4, **{"kv:float8_e5m2": 3e-5})
    assert rows["kv_cache"].verdict is RowVerdict.FAIL
    assert "70%" in rows["kv_cache"].evidence
    assert rows["model"].verdict is RowVerdict.PASS
    assert rows_of(seen, gaps(1e-12), base=1e-4, **{"kv:float8_e5m2": 6e-5})["kv_cache"].verdict is RowVerdict.PASS


def test_too_few_tokens_for_the_pass_rate_are_unclear():
    rows = rows_of(gaps(1e-12, n=200), gaps(1e-12))
    assert rows["pass_rate"].verdict is RowVerdict.UNCLEAR
    assert outcome(list(rows.values())) is CheckOutcome.UNKNOWN


def test_tokens_that_fail_together_widen_the_interval():
    def failing(counts):
        out = Gaps()
        for failed in counts:
            one = Gaps(kl=Sums.of(torch.full((100,), 1e-9)), over=failed, trials=1, worst=1e-9)
            one.over_squares, one.over_cross, one.sizes = failed**2, failed * 100, 100**2
            out += one
        return out

    alone, together = failing([1] * 10 + [0] * 40), failing([10] + [0] * 49)
    floor = gaps(1e-9)
    spread = [rows_of(g, floor)["pass_rate"].interval for g in (alone, together)]
    assert spread[1][1] - spread[1][0] > 2 * (spread[0][1] - spread[0][0])


def test_numbers_that_are_not_finite_never_pass():
    seen = gaps(1e-12)
    seen.kl = seen.kl + Sums.of(torch.tensor([math.nan]))
    seen.over += 1
    rows = rows_of(seen, gaps(1e-12))
    assert rows["kl_mean"].verdict is RowVerdict.FAIL
    assert rows["logprobs"].verdict is RowVerdict.FAIL
    assert not within_floor(math.nan, 1.0, Limits())


def row(verdict, **kw):
    return Row(id="x", group="limits", title="x", verdict=verdict, **kw)


def test_not_run_is_never_a_pass():
    assert outcome([]) is CheckOutcome.UNKNOWN
    assert outcome([row(RowVerdict.NOT_RUN, needed=False)]) is CheckOutcome.UNKNOWN
    assert outcome([row(RowVerdict.PASS), row(RowVerdict.NOT_RUN)]) is CheckOutcome.UNKNOWN
    assert outcome([row(RowVerdict.PASS), row(RowVerdict.NOT_RUN, needed=False)]) is CheckOutcome.FIT
    assert outcome([row(RowVerdict.PASS), row(RowVerdict.UNCLEAR)]) is CheckOutcome.UNKNOWN
    assert outcome([row(RowVerdict.NOT_RUN), row(RowVerdict.FAIL)]) is CheckOutcome.UNFIT


@pytest.mark.parametrize(
    ("eager", "open"), [(True, {"chunked_prefill"}), (False, {"compiled", "chunked_prefill", "block_size"})]
)
def test_another_engine_that_can_not_be_built_leaves_the_answer_open(eager, open):
    """Only that there is no other block size is known of an engine: the rest was asked for, and not answered."""

    def build(over):
        raise InterceptionError("the engine broke")

    settings = {"eager": eager, "block_size": 16, "chunk_size": 64}
    ask = SimpleNamespace(contexts=[[1] * 100])
    wanted = ["chunked_prefill", "block_size"] + ([] if eager else ["compiled"])
    rows = list(variant_rows(build, settings, ask, [], None, lambda: math.inf, wanted))
    assert {r.id for r in rows if r.needed} == open
    assert {r.verdict for r in rows} == {RowVerdict.NOT_RUN}
    assert outcome([row(RowVerdict.PASS), *rows]) is CheckOutcome.UNKNOWN


def test_weights_that_the_engines_loader_does_not_take_leave_the_answer_open():
    for needed in (True, False):
        rows = rows_of(gaps(2e-12), gaps(1e-12), read={"held": None, "held_error": "why", "held_needed": needed})
        assert (rows["weights"].verdict, rows["weights"].needed) == (RowVerdict.NOT_RUN, needed)
        assert outcome(list(rows.values())) is (CheckOutcome.UNKNOWN if needed else CheckOutcome.FIT)


def test_rows_survive_json():
    import json

    one = row(RowVerdict.FAIL, value=math.inf, interval=(0.1, math.nan), floor=None, details={"a": [1.0, math.nan]})
    again = Row.from_json(json.loads(json.dumps(one.to_json())))
    assert again.verdict is RowVerdict.FAIL
    assert again.value == math.inf
    assert math.isnan(again.interval[1])


# ---- the journal --------------------------------------------------------------------------------------------------


def test_a_journal_goes_on_after_a_kill_and_drops_a_cut_line(tmp_path):
    first = Journal(tmp_path, {"seed": 0})
    first.put("trial 0", value=1)
    first.put("trial 1", value=2)
    path = tmp_path / "trials.jsonl"
    path.write_text(path.read_text()[:-5])  # killed while it wrote
    again = Journal(tmp_path, {"seed": 0})
    assert again.get("trial 0")["value"] == 1
    assert again.get("trial 1") is None
    again.put("trial 1", value=3)
    assert Journal(tmp_path, {"seed": 0}).get("trial 1")["value"] == 3


def test_a_journal_of_other_settings_is_refused_by_name(tmp_path):
    Journal(tmp_path, {"seed": 0, "model": "a"}).put("trial 0", value=1)
    with pytest.raises(ValueError, match=r'model: "a" there, "b" now'):
        Journal(tmp_path, {"seed": 0, "model": "b"})


def test_a_finished_journal_starts_over(tmp_path):
    first = Journal(tmp_path, {"seed": 0})
    first.put("trial 0", value=1)
    first.put("end")
    assert Journal(tmp_path, {"seed": 0}).get("trial 0") is None


def test_a_journal_that_is_none_is_refused(tmp_path):
    (tmp_path / "trials.jsonl").write_text("not json\n")
    with pytest.raises(ValueError, match="line 1"):
        Journal(tmp_path, {"seed": 0})
