"""trl-parity check on the real CPU engine: clean passes, and each fault fails in the row that is its own."""

import json
import math

import pytest
import torch
from support.models import save_tiny_gemma, save_tiny_model

from trl_parity.cli import main
from trl_parity.preflight.check import subject
from trl_parity.preflight.check.check import run_check
from trl_parity.preflight.check.report import headline
from trl_parity.preflight.check.rows import CheckOutcome, RowVerdict
from trl_parity.preflight.check.settings import CheckSettings

pytestmark = pytest.mark.engine

FP32 = {"dtype": "float32", "logprobs_mode": "processed_logprobs", "seed": 0, "enforce_eager": True,
        "max_model_len": 256, "generation_config": "vllm", "num_gpu_blocks_override": 4096}  # fmt: skip
OTHER_ENGINES = ("chunked_prefill", "block_size", "compiled")
SYMPTOMS = {"kl_mean", "kl_max", "pass_rate", "logprobs"}  # of whatever is wrong


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def broken(monkeypatch):
    """Engines built from now on are broken by a function."""
    real = subject.build_engine

    def install(fault):
        def build(model, args):
            engine = real(model, args)
            fault(engine)
            return engine

        monkeypatch.setattr(subject, "build_engine", build)

    return install


def run(model, skip=(*OTHER_ENGINES, "sampling"), trials=8, directory=None, progress=None, **more):
    args = FP32 | more.pop("engine_args", {})
    settings = CheckSettings(model=model, engine_args=args, trials=trials, skip=tuple(skip), max_batch=6, **more)
    result = run_check(settings, directory, progress)
    failed = {row.id for row in result.rows if row.verdict is RowVerdict.FAIL}
    return result, failed, {row.id: row for row in result.rows}


# ---- nothing wrong ------------------------------------------------------------------------------------------------


def test_fp32_against_fp32_is_fit_and_every_row_ran(tiny, tmp_path, capfd):
    sets = [f"--set={name}={value}" for name, value in FP32.items()]
    arguments = ["check", "--model", tiny, "--config", "rl", "--set=enable_prefix_caching=true", *sets]
    code = main([*arguments, "--set=hf_overrides=null", "--trials", "24", "--output", str(tmp_path), "--json"])
    out, err = capfd.readouterr()
    assert out.startswith("{"), err
    told = json.loads(out)
    assert code == 0, told["headline"]
    assert told == json.loads((tmp_path / "check.json").read_text())
    assert (told["schema_version"], told["outcome"], told["exit_code"]) == (1, "fit", 0)
    verdicts = {row["id"]: row["verdict"] for row in told["rows"]}
    assert verdicts.pop("compiled") == "not run"  # the engine is set to run eagerly
    assert set(verdicts.values()) == {"pass"}, verdicts
    assert {"kl_mean", "positions", "weights", "length_200", "batch", "chunked_prefill", "block_size",
            "prefix_cache", "update", "update_prefix_cache", "seed", "sampling"} <= verdicts.keys()  # fmt: skip
    rows = {row["id"]: row for row in told["rows"]}
    assert rows["kl_mean"]["value"] < 1e-9  # and not only below .001
    assert 0 < rows["kl_mean"]["floor"] < 1e-9
    assert rows["pass_rate"]["interval"][0] > 0.99
    assert told["facts"]["speed"]["share"] > 0.5
    assert 12 <= len(told["trials"]) < 24  # the others would have changed no row
    report = (tmp_path / "report.md").read_text()
    assert "trials.png" in report
    for name in ("trials.png", "positions.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_soft_caps_windows_and_tied_heads_are_fit(tmp_path):
    result, _, rows = run(str(save_tiny_gemma(tmp_path)), engine_args={"max_model_len": 200}, trials=24)
    assert result.outcome is CheckOutcome.FIT, headline(result)
    assert rows["length_sliding_window"].verdict is RowVerdict.PASS
    assert "64" in rows["length_sliding_window"].title


def test_bf16_on_both_sides_is_within_its_own_noise(tiny):
    result, _, rows = run(
        tiny, engine_args={"dtype": "bfloat16"}, trainer_dtype="bfloat16", skip=(*OTHER_ENGINES, "lengths"), trials=24
    )
    assert result.outcome is CheckOutcome.FIT, headline(result)
    assert rows["kl_mean"].value > 1e-8
    assert rows["kl_mean"].floor > 1e-8


# ---- each fault in its row ----------------------------------------------------------------------------------------


def test_a_bf16_engine_beside_an_fp32_trainer_fails_by_its_dtype_alone(tiny):
    result, failed, rows = run(tiny, engine_args={"dtype": "bfloat16"})
    assert result.outcome is CheckOutcome.UNFIT
    assert failed == {"dtype"}
    assert "--trainer-dtype bfloat16" in rows["dtype"].fix


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="vLLM's fp8 cache on a CPU needs AVX-512 or AMX"
)
def test_an_fp8_cache_fails_in_the_row_of_the_cache(tiny):
    _, failed, rows = run(tiny, engine_args={"kv_cache_dtype": "fp8_e5m2"}, skip=(*OTHER_ENGINES, "lengths"))
    assert failed - SYMPTOMS == {"kv_cache"}
    assert "float8_e5m2" in rows["kv_cache"].evidence


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_raw_log_probs_fail_in_the_row_of_their_meaning(tiny, temperature):
    skip = (*OTHER_ENGINES, "lengths", "update", "update_back")
    _, failed, rows = run(
        tiny, engine_args={"logprobs_mode": "raw_logprobs"}, temperature=temperature, skip=skip, trials=12
    )
    assert failed - SYMPTOMS == {"logprob_meaning"}  # tokens are drawn from the law asked for: that row passes
    assert rows["sampling"].verdict is RowVerdict.PASS
    assert "raw_logprobs" in rows["logprob_meaning"].evidence
    assert bool(failed & SYMPTOMS) == (temperature != 1.0)


def test_another_rope_base_fails_by_position(tiny):
    over = {"hf_overrides": {"rope_parameters": {"rope_theta": 50000.0, "rope_type": "default"}}}
    _, failed, rows = run(tiny, engine_args=over)
    assert failed - SYMPTOMS == {"positions", "config", "length_125", "length_150", "length_200"}
    assert "rope_theta" in rows["config"].evidence
    table = rows["positions"].details["by_context_length"]
    assert table["1"][0] < 1e-9 < table["4 to 15"][0]


def test_a_scaled_head_fails_as_a_scale_and_as_other_weights(tiny, broken):
    def scaled(engine):
        engine.model.lm_head.weight.data.mul_(1.05)

    broken(scaled)
    _, failed, rows = run(tiny, skip=(*OTHER_ENGINES, "lengths"))
    assert failed - SYMPTOMS == {"scale", "weights"}
    assert rows["scale"].value == pytest.approx(1.05, abs=0.002)
    assert "lm_head.weight" in rows["weights"].evidence
    assert rows["kl_mean"].reproduce.startswith("--case ")


def test_a_prefix_cache_that_is_not_reset_fails_after_a_weight_update(tiny, broken):
    def keeps(engine):
        engine.llm.reset_prefix_cache = lambda *args, **kwargs: True  # says so, and does nothing

    broken(keeps)
    _, failed, rows = run(tiny, skip=(*OTHER_ENGINES, "lengths"))
    assert failed == {"update_prefix_cache"}
    assert "still read from the cache" in rows["update_prefix_cache"].evidence


def test_a_sampler_that_draws_from_another_law_than_it_reports_fails_in_sampling(tiny, broken):
    def sharper(engine):
        sampler = engine.llm.llm_engine.model_executor.driver_worker.model_runner.sampler.topk_topp_sampler
        draw = sampler.forward

        def forward(logits, generators, k, p):
            _, reported = draw(logits.clone(), generators, k, p)
            tokens, _ = draw(logits * 1.25, generators, k, p)
            return tokens, reported

        sampler.forward = forward

    broken(sharper)
    _, failed, rows = run(tiny, skip=(*OTHER_ENGINES, "lengths", "update", "update_back"), trials=12)
    assert failed == {"sampling"}
    assert "lower temperature" in rows["sampling"].evidence


def test_prompts_whose_later_chunks_are_misplaced_fail_in_the_row_of_chunks(tiny, broken):
    from vllm.forward_context import get_forward_context

    def misplaced(engine):
        forward = engine.model.forward

        def shifted(input_ids, positions, *args, **kwargs):
            seen = next(iter(get_forward_context().attn_metadata.values()))
            lengths = seen.query_start_loc.diff()
            later = (seen.seq_lens > lengths) & (lengths > 1)  # a chunk, and not the first of its prompt
            away = 2 * later.repeat_interleave(lengths)
            positions = positions.clone()
            positions[: len(away)] += away
            return forward(input_ids, positions, *args, **kwargs)

        engine.model.forward = shifted

    broken(misplaced)
    skip = ("compiled", "block_size", "lengths", "sampling", "update", "update_back", "batch", "order", "seed")
    _, failed, rows = run(tiny, skip=skip, trials=2, engine_args={"enable_prefix_caching": False})
    assert failed == {"chunked_prefill"}
    assert "and 66 tokens a step" in rows["chunked_prefill"].evidence


def test_other_norms_are_a_drift_that_no_mechanism_explains(tiny, broken):
    def coarse(engine):
        for layer in engine.model.model.layers:
            layer.post_attention_layernorm.variance_epsilon = 1e-2

    broken(coarse)
    _, failed, _ = run(tiny, skip=(*OTHER_ENGINES, "lengths"))
    assert failed - SYMPTOMS == {"model"}


def test_weights_that_a_sync_does_not_deliver_fail_after_an_update(tiny, broken):
    def deaf(engine):
        load = engine.model.load_weights
        engine.model.load_weights = lambda named: load([(n, t) for n, t in named if "layers.1" not in n])

    broken(deaf)
    _, failed, _ = run(tiny, skip=(*OTHER_ENGINES, "lengths"))
    assert failed == {"update"}


# ---- a killed one, a case, and what is refused --------------------------------------------------------------------


class Killed(BaseException):
    pass


def test_a_killed_check_goes_on_where_it_was_and_ends_with_the_same_numbers(tiny, tmp_path):
    def kill(what, done, of):
        if what == "trials" and done == 5:
            raise Killed

    few = {"skip": (*OTHER_ENGINES, "lengths", "sampling", "update", "update_back", "update_prefix_cache")}
    with pytest.raises(Killed):
        run(tiny, directory=tmp_path, progress=kill, **few)
    first = (tmp_path / "trials.jsonl").read_text().splitlines()
    resumed, _, _ = run(tiny, directory=tmp_path, **few)
    lines = (tmp_path / "trials.jsonl").read_text().splitlines()
    assert lines[: len(first)] == first
    assert resumed.resumed == len(first) - 1
    assert len(resumed.trials) == 8
    whole, _, _ = run(tiny, **few)
    assert [t.gaps.kl.count for t in resumed.trials] == [t.gaps.kl.count for t in whole.trials]
    assert [t.mean_kl for t in resumed.trials] == pytest.approx([t.mean_kl for t in whole.trials], abs=1e-11)


def test_a_case_is_run_alone(tiny, capfd):
    sets = [f"--set={name}={value}" for name, value in FP32.items()]
    arguments = ["check", "--model", tiny, "--config", "rl", *sets, "--set=hf_overrides=null"]
    code = main([*arguments, "--case", "repeat:5x3/random:7,8,9", "--json"])
    out, err = capfd.readouterr()
    assert out.startswith("{"), err
    told = json.loads(out)
    assert [t["sequences"] for t in told["trials"]] == [2]
    assert {"lengths", "invariances"}.isdisjoint(row["group"] for row in told["rows"])
    assert (code, told["outcome"]) == (2, "could not tell")  # 32 tokens are too few for a pass rate


def test_a_users_own_prompts_are_what_is_asked(tiny, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}+{i}="}) + "\n" for i in range(10)))
    result, failed, _ = run(tiny, prompts=str(path), skip=(*OTHER_ENGINES, "lengths", "sampling", "invariances"))
    assert [t.sequences for t in result.trials] == [6, 4]
    assert not failed


def test_a_stored_baseline_is_a_reference_and_a_corrupt_or_foreign_one_is_refused(tiny, tmp_path, broken, capfd):
    stored, out = tmp_path / "baseline", tmp_path / "check"
    making = ["--num-prompts", "12", "--max-new-tokens", "6", "--max-prompt-tokens", "40"]
    assert main(["baseline", "--model", tiny, "--output", str(stored), *making]) == 0
    few = {"baseline": str(stored), "trials": 2, "skip": ("lengths", "sampling", "invariances")}
    _, failed, rows = run(tiny, **few)
    assert not failed
    assert rows["baseline"].verdict is RowVerdict.PASS
    assert 12 <= rows["baseline"].trials <= 24

    def scaled(engine):
        engine.model.lm_head.weight.data.mul_(1.05)

    broken(scaled)
    assert "baseline" in run(tiny, **few)[1]
    other = save_tiny_gemma(tmp_path / "other")
    shard = next(stored.glob("*.parquet"))
    for model, damage, words in (
        (str(other), lambda: None, "is of another model"),
        (tiny, lambda: shard.write_bytes(shard.read_bytes()[:-9]), "is corrupt"),
    ):
        damage()
        assert main(["check", "--model", model, "--baseline", str(stored), "--output", str(out)]) == 2
        assert words in capfd.readouterr().err
        assert not out.exists()  # refused before anything is written


def test_settings_that_can_not_be_used_say_so(tiny, tmp_path, capsys):
    for arguments, words in (
        (["--set", "swap_space=4"], "swap_space"),
        (["--temperature", "0"], "greedy answers have no law"),
        (["--baseline", str(tmp_path)], "holds no manifest.json"),
        (["--case", "nonsense"], "is no case"),
        (["--config", "nowhere.yaml"], "cannot read nowhere.yaml"),
    ):
        assert main(["check", "--model", tiny, *arguments]) == 2
        assert words in capsys.readouterr().err


def test_numbers_of_a_broken_engine_that_are_not_finite_fail(tiny, broken):
    def nan(engine):
        engine.model.lm_head.weight.data[3, 0] = math.nan

    broken(nan)
    result, failed, _ = run(tiny, skip=(*OTHER_ENGINES, "lengths", "mechanisms", "update", "update_back"))
    assert result.outcome is CheckOutcome.UNFIT
    assert failed & SYMPTOMS
    assert torch.isfinite(torch.tensor([row.value or 0.0 for row in result.rows if row.id == "seed"])).all()
