"""From a rollout batch to scores: whose log-probs are judged, and of which tokens. No trainer, a real policy."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model

from trl_parity.errors import InterceptionError
from trl_parity.records import RolloutBatch, SamplingSettings
from trl_parity.trainers.capture import Capture, MeasurementSettings

PROMPT, KEEP, ROWS, TEMPERATURE = 5, 8, 12, 0.7


class Trainer:
    """What a capture looks at."""

    def __init__(self, model):
        self.model, self.temperature, self.vllm_generation = model, TEMPERATURE, None
        self.accelerator = SimpleNamespace(
            unwrap_model=lambda model: model,
            distributed_type=DistributedType.NO,
            mixed_precision="no",
            process_index=0,
            autocast=nullcontext,
        )


class Batch(Capture):
    """Rows of random tokens; ``lengths``: those TRL's pass sees, of the ``real`` ones."""

    rewards = log = rollout = None
    step = 3

    def __init__(self, trainer, sampling=None, share=1.0, **measured):
        observer = SimpleNamespace(measurement=MeasurementSettings(**measured), head_share=share)
        super().__init__(trainer, observer, training=True)
        self.sampling = sampling or SamplingSettings(temperature=TEMPERATURE)
        self.rows_passed, self.scores_with = [], self.policy

    def run_policy(self, ids, attention, keep, batch_size=None):
        self.rows_passed.append(len(ids))
        with torch.no_grad():
            logits = self.scores_with(input_ids=ids, attention_mask=attention).logits[:, -keep - 1 : -1].float()
        return (logits / TEMPERATURE).log_softmax(-1).gather(-1, ids[:, -keep:, None]).squeeze(-1)

    def batch(self, cut=(), change=None):
        """One that the trainer has passed through its policy; completions in ``cut`` it has masked."""
        ids = torch.randint(2, 40, (ROWS, PROMPT + KEEP), generator=torch.Generator().manual_seed(0))
        real = torch.ones(ROWS, KEEP, dtype=torch.long)
        real[1, 5:] = 0
        seen = real.clone()
        seen[list(cut)] = 0
        prompt = torch.ones(ROWS, PROMPT, dtype=torch.long)
        self.scorer = self.new_scorer(KEEP, tokens=seen.sum())
        with self.scorer:
            own = self.run_policy(ids, torch.cat([prompt, seen], 1), KEEP) * seen
        self.rows_passed.clear()
        return RolloutBatch(
            prompt_ids=ids[:, :PROMPT], prompt_mask=prompt, completion_ids=ids[:, PROMPT:], completion_mask=real,
            engine_mask=real.bool(), rollout_logprobs=own.clone(), own_logprobs=own if change is None else change(own),
            sampling=self.sampling, trainer_temperature=TEMPERATURE, step=3, sync_step=3, training=True,
            last_in_step=True, loss_mask=seen if cut else None,
        )  # fmt: skip


def test_the_fp32_heads_numbers_are_judged_where_the_trainers_come_from_the_same_pass(tiny_model, caplog):
    for dtype in (torch.float32, torch.bfloat16):
        model = copy.deepcopy(tiny_model).to(dtype)
        model.lm_head.weight.data.mul_(4.0)  # a head whose own dtype moves log-probs
        capture = Batch(Trainer(model))
        batch = capture.batch()
        scored = capture.score(batch, 10**6)
        share = float((scored.trainer_logprobs - scored.own_logprobs)[scored.mask].abs().mean())
        assert (share > 0.01) == (dtype == torch.bfloat16)
        assert scored.own_logprobs is batch.own_logprobs or torch.equal(scored.own_logprobs, batch.own_logprobs)
        assert scored.entropy is not None
        assert not capture.rows_passed  # no pass of ours
    assert not caplog.records


CHANGES = {
    "another temperature": lambda own: own * 1.3,
    "a token late": lambda own: own.roll(1, -1),
    "one without a number": lambda own: own.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(torch.nan)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trainers_own_numbers_are_judged_where_something_else_made_them(tiny_model, caplog, change, dtype):
    trainer = Trainer(copy.deepcopy(tiny_model).to(dtype))
    for _ in range(2):
        capture = Batch(trainer)
        batch = capture.batch(change=CHANGES[change])
        scored = capture.score(batch, 10**6)
        for side in (scored.trainer_logprobs, scored.own_logprobs):
            assert torch.equal(side.nan_to_num(9.0), batch.own_logprobs.nan_to_num(9.0))
        assert scored.entropy is scored.law_entropy is scored.log_kept is None
    [told] = [r.message for r in caplog.records]  # once a run
    assert "nats a token from what its head makes of the hidden states" in told
    assert "_get_per_token_logps_and_entropies replaced" in told


def test_sampling_that_can_not_be_replayed_on_the_trainers_numbers_is_refused(tiny_model):
    capture = Batch(Trainer(tiny_model), SamplingSettings(temperature=TEMPERATURE, top_p=0.9), replay_sampling=True)
    assert capture.score(capture.batch(), 10**6).log_kept is not None
    with pytest.raises(InterceptionError, match="can't be replayed on such numbers"):
        capture.score(capture.batch(change=CHANGES["a token late"]), 10**6)


@pytest.mark.parametrize("settings", [{"top_p": 0.6}, {"repetition_penalty": 1.3, "top_k": 20}])
def test_both_laws_are_measured_and_the_setting_says_which_is_judged(tiny_model, settings):
    sampling = SamplingSettings(temperature=TEMPERATURE, **settings)
    plain, replayed = (Batch(Trainer(tiny_model), sampling, replay_sampling=replay) for replay in (False, True))
    one, other = (capture.score(capture.batch(), 10**6) for capture in (plain, replayed))
    torch.testing.assert_close(one.trainer_logprobs, one.own_logprobs, atol=1e-5, rtol=0)
    assert torch.equal(other.trainer_logprobs, other.replayed_logprobs)
    assert float((one.trainer_logprobs - other.trainer_logprobs)[one.mask].abs().mean()) > 0.05
    for name in ("own_logprobs", "replayed_logprobs", "entropy", "log_kept", "out_of_support"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert torch.equal(one.law_entropy, one.entropy)
    assert not torch.equal(other.law_entropy, other.entropy)
    # what is set against itself for the noise floor is the law that is judged
    for capture, scored in ((plain, one), (replayed, other)):
        scores, _ = capture.forward(capture.batch(), torch.arange(ROWS))
        torch.testing.assert_close(scores.logprobs, scored.trainer_logprobs, atol=1e-5, rtol=0)


def test_what_needs_no_replay_is_judged_on_numbers_that_it_could_not_be_made_of(tiny_model, caplog):
    capture = Batch(Trainer(tiny_model), SamplingSettings(temperature=TEMPERATURE, top_p=0.9))
    batch = capture.batch(change=CHANGES["a token late"])
    scored = capture.score(batch, 10**6)
    assert torch.equal(scored.trainer_logprobs, batch.own_logprobs)
    assert scored.replayed_logprobs is None
    assert "nats a token from what its head makes" in caplog.text


def test_numbers_that_come_from_no_forward_of_the_policy_are_judged_alone(tiny_model, caplog):
    capture = Batch(Trainer(tiny_model))
    batch = capture.batch()
    capture.scorer = capture.new_scorer(KEEP)
    scored = capture.score(batch, 10**6)
    assert torch.equal(scored.trainer_logprobs, batch.own_logprobs)
    assert "come from no forward of the policy's backbone" in caplog.text


def test_numbers_whose_pass_was_not_watched_are_the_trainers_all_the_same(tiny_model):
    capture = Batch(Trainer(tiny_model))
    batch = capture.batch(change=lambda own: own - 1e-4)
    capture.scorer = None
    scored = capture.score(batch, 4 * (PROMPT + KEEP))
    assert len(scored.rows) == 4
    assert torch.equal(scored.own_logprobs, batch.own_logprobs[scored.rows])
    assert scored.entropy is not None


@pytest.mark.parametrize(("cut", "kept"), [((2, 7), 12), ((0, 1, 2, 3, 4, 5), 6), (tuple(range(12)), 3)])
def test_completions_that_the_loss_leaves_out_are_compared_and_are_no_smaller_share(tiny_model, cut, kept):
    capture = Batch(Trainer(tiny_model))
    batch = capture.batch(cut)
    whole = Batch(capture.trainer)
    expected = whole.score(whole.batch(), 10**6)
    scored = capture.score(batch, 1)  # room for a quarter of the batch
    rows = torch.arange(ROWS) if scored.rows is None else scored.rows
    assert len(rows) == kept
    assert capture.rows_passed == [min(len(cut), 3)]
    others = ROWS - len(cut)
    left = torch.isin(rows, torch.tensor(cut)).sum()
    assert left * others == (kept - left) * len(cut)  # the same share of both
    mask = batch.engine_mask[rows]
    assert torch.equal(scored.mask, mask)
    for name in ("trainer_logprobs", "own_logprobs", "entropy"):
        got, want = getattr(scored, name), getattr(expected, name)[rows]
        torch.testing.assert_close(got[mask], want[mask], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dropout", ["attention", "lora"])
def test_a_pass_of_ours_draws_from_random_numbers_of_its_own(tiny_model, dropout):
    model = copy.deepcopy(tiny_model)
    if dropout == "lora":
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5))
    else:
        model.config.attention_dropout = 0.5
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
    capture = Batch(Trainer(model.train()))
    batch = capture.batch()
    before = torch.random.get_rng_state()
    capture.forward(batch, torch.arange(4))
    assert torch.equal(before, torch.random.get_rng_state())


TOP_K = SamplingSettings(temperature=TEMPERATURE, top_k=5)


@pytest.mark.parametrize("sampling", [None, TOP_K], ids=["plain", "top_k"])
def test_of_a_sample_the_fp32_head_has_its_tokens_and_the_own_head_all_others(tiny_model, sampling):
    model = copy.deepcopy(tiny_model).to(torch.bfloat16)
    capture = Batch(Trainer(model), sampling, share=0.3, least_tokens=1)
    batch = capture.batch()
    sampled = capture.score(batch, 10**6)
    whole = Batch(Trainer(model), sampling)
    everything = whole.score(whole.batch(), 10**6)
    drawn = sampled.weights > 0
    assert drawn[batch.engine_mask].sum() == (10 + 1) * 4 + 3  # of 7 three and the last, of 4 two and the last
    assert torch.equal(sampled.trainer_logprobs[drawn], everything.trainer_logprobs[drawn])
    assert torch.equal(sampled.trainer_logprobs[~drawn], batch.own_logprobs[~drawn].float())
    assert torch.equal(sampled.entropy[drawn], everything.entropy[drawn])
    assert sampled.entropy[~drawn].isnan().all()
    torch.testing.assert_close((sampled.weights * batch.engine_mask).sum(1), batch.engine_mask.sum(1).float())
    assert (everything.weights, capture.rows_passed) == (None, [])


def test_a_batch_that_was_sampled_can_be_scored_in_full(tiny_model):
    capture = Batch(Trainer(copy.deepcopy(tiny_model)), share=0.3, least_tokens=1)
    batch = capture.batch()
    assert capture.score(batch, 1).weights is not None
    scored = capture.score_all(batch)
    assert (scored.weights, sum(capture.rows_passed), len(scored.mask)) == (None, ROWS, ROWS)


def test_all_tokens_are_scored_where_a_sample_would_not_do(tiny_model):
    trainer = Trainer(copy.deepcopy(tiny_model))
    for capture in (
        Batch(trainer, share=1.0, least_tokens=1),
        Batch(trainer, share=0.01, least_tokens=60),  # of 93
        Batch(trainer, TOP_K, share=0.01, least_tokens=1, replay_sampling=True),  # the own head knows nothing of it
    ):
        assert capture.score(capture.batch(), 10**6).weights is None


def test_what_the_loss_leaves_out_is_scored_in_full_beside_a_sample(tiny_model):
    capture = Batch(Trainer(copy.deepcopy(tiny_model)), share=0.3, least_tokens=1)
    scored = capture.score(capture.batch(cut=(2, 7)), 10**6)
    cut = [i for i, row in enumerate(range(ROWS) if scored.rows is None else scored.rows.tolist()) if row in (2, 7)]
    assert len(cut) == 2
    assert (scored.weights[cut] == 1).all()
    assert (scored.weights == 0).any()


def test_a_pass_of_ours_is_over_the_policy_whatever_the_trainer_scores_with(tiny_model):
    """Else there would be no noise floor where a copy of the policy scores."""

    capture = Batch(Trainer(tiny_model))
    batch, rows = capture.batch(), torch.tensor([0, 2, 3])
    of_policy, own_of_policy = capture.forward(batch, rows)
    capture.scores_with = copy.deepcopy(tiny_model)
    capture.scores_with.lm_head.weight.data.mul_(3.0)
    scores, own = capture.forward(batch, rows, batch_size=2)
    torch.testing.assert_close(scores.logprobs, of_policy.logprobs)
    assert (own - own_of_policy).abs().max() > 0.1
