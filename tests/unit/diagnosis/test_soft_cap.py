"""A soft cap on logits, and one taken off them, number by number."""

import math

import pytest
import torch

from trl_parity.diagnosis.distribution import Distribution, Tokens, curved, log_probs, scaled_logits
from trl_parity.diagnosis.fitting import fit_soft_cap
from trl_parity.records import SamplingSettings


@pytest.mark.parametrize("cap", [2.0, 30.0])
def test_put_on_and_taken_off_it_is_the_tanh_and_its_inverse(cap):
    z = torch.tensor([-1.5, 0.0, 0.3, 1.9])
    torch.testing.assert_close(curved(z, 1 / cap), cap * torch.tanh(z / cap))
    torch.testing.assert_close(curved(z, -1 / cap), cap * torch.atanh(z / cap))
    torch.testing.assert_close(curved(curved(z, 1 / cap), -1 / cap), z)
    assert torch.equal(curved(z, 0.0), z)


@pytest.mark.parametrize("curvature", [0.1, -0.1, 5.0, -5.0])
def test_a_banned_logit_stays_banned(curvature):
    z = torch.tensor([-math.inf, 1.0, math.inf])
    assert curved(z, curvature)[[0, 2]].tolist() == [-math.inf, math.inf]
    assert math.isfinite(float(curved(z, curvature)[1]))


def test_what_no_cap_can_have_let_through_is_taken_as_just_inside_it():
    assert float(curved(torch.tensor([9.0]), -0.5)) == pytest.approx(2.0 * math.atanh(1 - 1e-6), rel=1e-2)
    assert float(curved(torch.tensor([-9.0]), -0.5)) == pytest.approx(-2.0 * math.atanh(1 - 1e-6), rel=1e-2)


def tokens_of(logits, law, n=64):
    g = torch.Generator().manual_seed(0)
    empty = torch.zeros(n, 0, dtype=torch.long)
    tokens = Tokens(logits, torch.zeros(n).long(), torch.zeros(n), empty, empty.bool(), empty.bool(), torch.arange(n))
    tokens.targets = scaled_logits(tokens, law).softmax(-1).multinomial(1, generator=g).squeeze(-1)
    tokens.reported = log_probs(tokens, law).logprobs
    return tokens


def test_it_is_found_where_the_model_bans_tokens_itself():
    """Padding rows of a vocabulary have logits of -inf: under a cap they would come back with e^-cap."""
    logits = torch.randn(64, 20, generator=torch.Generator().manual_seed(1)) * 3
    logits[:, 15:] = -math.inf
    law = Distribution(sampling=SamplingSettings(), curvature=1 / 4.0)
    tokens = tokens_of(logits, law)
    assert (tokens.targets < 15).all()
    found = fit_soft_cap(tokens, Distribution(sampling=SamplingSettings()))
    assert found is not None
    assert 1 / found.curvature == pytest.approx(4.0, rel=0.02)
    assert log_probs(tokens, found).logprobs.sub(tokens.reported).abs().max() < 0.01
