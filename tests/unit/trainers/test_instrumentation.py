"""TRL's classes as they are wrapped."""

import warnings

import pytest

from trl_parity.errors import InterceptionError

pytestmark = pytest.mark.slow_unit

# ---- other TRLs, other prompts ------------------------------------------------------------------------------------


def test_an_untested_trl_is_warned_about_once_by_version(monkeypatch):
    import trl
    from trl import GRPOTrainer

    from trl_parity.trainers.instrumentation import TESTED_TRL, instrument, uninstrument

    assert GRPOTrainer  # a class is wrapped once somebody has imported it

    uninstrument()
    monkeypatch.setattr(trl, "__version__", "9.9.1")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        instrument()
        instrument()
    [warned] = [str(w.message) for w in seen if "trl-parity" in str(w.message)]
    assert "9.9.1" in warned
    assert all(version in warned for version in TESTED_TRL)


@pytest.mark.parametrize("name", ["_compute_loss", "_get_per_token_logps_and_entropies"])
def test_a_method_that_moved_is_named(monkeypatch, name):
    from trl import RLOOTrainer

    from trl_parity.trainers.instrumentation import instrument, uninstrument

    uninstrument()
    try:
        with monkeypatch.context() as patch:
            patch.delattr(RLOOTrainer, name)
            with pytest.raises(InterceptionError, match=f"RLOOTrainer .* has no '{name}'"):
                instrument()
    finally:
        uninstrument()
        instrument()
