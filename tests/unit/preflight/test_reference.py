"""The reference's scores against the model's own forward, one sequence at a time."""

import pytest
import torch
from support.models import save_tiny_gemma, save_tiny_model

from trl_parity.preflight.check.reference import Reference
from trl_parity.scoring.cache_grids import declared_grids

SEQUENCES = [[5], [7, 3], list(range(3, 40)), [9, 9, 9, 4], list(range(40, 5, -1)), [2, 8] * 30]


@pytest.mark.parametrize("save", [save_tiny_model, save_tiny_gemma])
@pytest.mark.parametrize("batch_tokens", [64, 4096])
def test_scores_are_those_of_the_models_own_logits(tmp_path, save, batch_tokens):
    reference = Reference(str(save(tmp_path)))
    positions = [torch.tensor([0]), None, torch.arange(36), torch.tensor([1, 3]), None, torch.arange(10, 20)]
    scored = reference.score(SEQUENCES, positions, temperature=0.7, batch_tokens=batch_tokens)
    assert len(scored) == len(SEQUENCES)
    for ids, at, one in zip(SEQUENCES, positions, scored, strict=True):
        with torch.no_grad():
            logits = reference.model(torch.tensor([ids])).logits[0].double()
        taken = torch.tensor(ids[1:])[:, None]
        torch.testing.assert_close(
            one.logprobs, logits[:-1].log_softmax(-1).gather(-1, taken)[:, 0], atol=2e-5, rtol=0
        )
        if at is None:
            naive = (logits[:-1] / 0.7).log_softmax(-1).gather(-1, taken)[:, 0]
            torch.testing.assert_close(one.tempered, naive, atol=2e-5, rtol=0)
            assert one.laws is None
        else:
            torch.testing.assert_close(one.laws, logits[at].log_softmax(-1).float(), atol=2e-5, rtol=0)


def test_other_worlds_end_with_their_block(tmp_path):
    reference = Reference(str(save_tiny_model(tmp_path)))
    plain = reference.score(SEQUENCES)[2].logprobs
    worlds = {
        "rounded": reference.rounded(torch.bfloat16, torch.bfloat16, 0),
        "cached": reference.cached_on(declared_grids("fp8_e5m2")[0]),
        "holding": reference.holding({n: t * 1.1 for n, t in reference.named_tensors() if "mlp" in n}),
    }
    for name, world in worlds.items():
        with world:
            assert not torch.equal(reference.score(SEQUENCES)[2].logprobs, plain), name
        assert torch.equal(reference.score(SEQUENCES)[2].logprobs, plain), name


def test_a_model_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Expected the folder or the name"):
        Reference(str(tmp_path))
