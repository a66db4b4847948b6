"""A whole check with transformers in vLLM's place: when trials end, what is kept, and that a killed one goes on."""

import pytest
import torch
from support.models import save_tiny_model

from trl_parity.engine.offline import Sampled
from trl_parity.preflight.check import check, subject
from trl_parity.preflight.check.rows import CheckOutcome, Limits, RowVerdict
from trl_parity.preflight.check.settings import CheckSettings

pytestmark = pytest.mark.slow_unit


class Engine:
    """What a check asks of an engine, answered by the very model it is compared with; ``scale``: of its logits."""

    device_type, block_size, chunk_size, eager, tensor_parallel = "cpu", 128, 2048, True, 1
    chunks_prompts = caches_prefixes = False
    dtype = head_dtype = torch.float32

    def __init__(self, folder, scale):
        from transformers import AutoModelForCausalLM

        self.model, self.scale, self.asked = AutoModelForCausalLM.from_pretrained(folder).eval(), scale, 0
        self.hf_config, self.max_model_len = self.model.config, 128
        self.vocab_size = self.hf_config.vocab_size

    def settings(self):
        return {"kv_cache_dtype": "auto", "engine_head_dtype": "float32", "quantization": "so its weights stay unread"}

    everything = settings

    @torch.no_grad()
    def prefill_laws(self, sequences):
        return [self._law(ids)[:-1] for ids in sequences]

    def rescore(self, sequences):
        laws = zip(self.prefill_laws(sequences), sequences, strict=True)
        return [law.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0] for law, ids in laws]

    def _law(self, ids):
        return (self.scale * self.model(torch.tensor([list(ids)])).logits[0]).log_softmax(-1)

    @torch.no_grad()
    def sample(self, contexts, settings, *, max_tokens, seeds, whole=False, cold=True, ignore_eos=True):
        self.asked += 1
        out = []
        for context, seed in zip(contexts, seeds, strict=True):
            generator, ids, laws = torch.Generator().manual_seed(seed), list(context), []
            for _ in range(max_tokens):
                law = (self._law(ids)[-1] / settings.temperature).log_softmax(-1)
                laws.append(law)
                ids.append(int(torch.multinomial(law.exp(), 1, generator=generator)))
            table, taken = torch.stack(laws), torch.tensor(ids[len(context) :])
            out.append(Sampled(tuple(taken.tolist()), table.gather(-1, taken[:, None])[:, 0].double(), table, 0))
        return out

    def forget(self):
        return True

    def close(self):
        pass


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny"), num_hidden_layers=1))


@pytest.fixture
def checked(model, monkeypatch):
    def run(scale=1.0, directory=None, progress=None, **more):
        monkeypatch.setattr(subject, "build_engine", lambda folder, args: Engine(folder, scale))
        told = {"model": model, "trials": 24, "max_length": 8, "max_batch": 2, "max_tokens": 8}
        told |= {"limits": Limits(pass_rate=0.95), "skip": ("sampling", "logprob_meaning", "lengths", "invariances")}
        return check.run_check(CheckSettings(**told | more), directory, progress)

    return run


def test_trials_end_early_where_nothing_is_wrong_and_where_all_is(checked):
    fit, unfit = checked(), checked(scale=1.5)
    assert 12 <= len(fit.trials) < 24
    assert fit.outcome is CheckOutcome.FIT
    assert len(unfit.trials) == len(fit.trials)  # counts plan the look
    failed = {row.id for row in unfit.rows if row.verdict is RowVerdict.FAIL}
    assert {"kl_mean", "kl_max", "pass_rate", "logprobs", "scale"} <= failed


def test_all_trials_are_run_where_told_and_begin_alike(checked):
    few, all_of_them = checked(), checked(early_error=0.0)
    assert len(all_of_them.trials) == 24
    assert [t.mean_kl for t in all_of_them.trials[: len(few.trials)]] == pytest.approx(
        [t.mean_kl for t in few.trials], abs=1e-12
    )
    ours, theirs = ({r.id: (r.verdict, r.floor) for r in result.rows} for result in (few, all_of_them))
    assert {id: verdict for id, (verdict, _) in ours.items()} == {id: verdict for id, (verdict, _) in theirs.items()}


@pytest.mark.parametrize("killed_at", [5, 12])
def test_a_killed_check_ends_where_one_that_was_not_does(checked, tmp_path, killed_at):
    class Killed(BaseException):
        pass

    def kill(what, done, of):
        if (what, done) == ("trials", killed_at):
            raise Killed

    whole = checked()
    with pytest.raises(Killed):
        checked(directory=tmp_path, progress=kill)
    again = checked(directory=tmp_path)
    assert again.resumed > 0
    assert [t.mean_kl for t in again.trials] == pytest.approx([t.mean_kl for t in whole.trials], abs=1e-12)
    for ours, theirs in zip(again.rows, whole.rows, strict=True):
        assert (ours.id, ours.verdict) == (theirs.id, theirs.verdict)
        assert (ours.floor is None) == (theirs.floor is None)
        if theirs.floor is not None:
            assert ours.floor == pytest.approx(theirs.floor, rel=1e-6, nan_ok=True)
