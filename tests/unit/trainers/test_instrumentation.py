"""TRL's classes as they are wrapped, alone and with other libraries that do so."""

import functools
import warnings
from types import SimpleNamespace

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


# ---- other libraries ----------------------------------------------------------------------------------------------

WRAPPED = ("_generate_and_score_completions", "_compute_loss")


@pytest.fixture
def trl_module(monkeypatch):
    """``trl.trainer.rloo_trainer``: everything in it is TRL's own before and after."""
    import trl.trainer.rloo_trainer as module

    from trl_parity.trainers.instrumentation import instrument, uninstrument

    uninstrument()
    cls = module.RLOOTrainer
    before = {name: vars(cls)[name] for name in WRAPPED}
    yield module
    module.RLOOTrainer = cls
    uninstrument()
    for name, method in before.items():
        setattr(cls, name, method)
    instrument()


class Watched:
    """A trainer as far as the wrappers look at one; ``calls``: who was there, in order."""

    def __init__(self):
        self.calls, self.callback_handler, self.model = (
            [],
            SimpleNamespace(callbacks=[]),
            SimpleNamespace(training=True),
        )


def theirs_over(original):
    """Another library's wrapper, which copies what ``functools.wraps`` copies."""

    @functools.wraps(original)
    def method(self, *args):
        self.calls.append("theirs")
        return original(self, *args)

    return method


def own(self, *args):
    self.calls.append("trl")


def noticed(monkeypatch, calls):
    """Counts how often our wrappers look for somebody to tell."""
    from trl_parity.trainers import instrumentation

    monkeypatch.setattr(instrumentation, "observer_of", lambda trainer: calls.append(1))


def test_ours_under_theirs_and_over_theirs_each_looks_on_once_and_leaves_theirs(trl_module, monkeypatch):
    from trl_parity.trainers.instrumentation import instrument, uninstrument

    cls, name = trl_module.RLOOTrainer, "_generate_and_score_completions"
    setattr(cls, name, own)
    setattr(cls, name, theirs_over(own))  # before us
    instrument()
    setattr(cls, name, theirs := theirs_over(vars(cls)[name]))  # and after us
    assert instrument() == set()
    over = vars(cls)[name]
    assert over is not theirs
    assert instrument() == set()
    assert vars(cls)[name] is over  # once for each time that something was laid over ours
    trainer, looks = Watched(), []
    noticed(monkeypatch, looks)
    cls._generate_and_score_completions(trainer, None)
    assert trainer.calls == ["theirs", "theirs", "trl"]
    assert len(looks) == 1
    uninstrument()
    assert vars(cls)[name] is theirs
    trainer.calls.clear()
    looks.clear()
    cls._generate_and_score_completions(trainer, None)
    assert trainer.calls == ["theirs", "theirs", "trl"]
    assert not looks


def test_a_patch_that_replaces_ours_stays_and_is_wrapped(trl_module):
    from trl_parity.trainers.instrumentation import instrument, uninstrument

    cls = trl_module.RLOOTrainer
    instrument()
    cls._compute_loss = own
    assert instrument() == set()
    assert vars(cls)["_compute_loss"].__wrapped__ is own
    uninstrument()
    assert vars(cls)["_compute_loss"] is own


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_librarys_own_class_in_trls_module_is_wrapped_once(trl_module, monkeypatch, when):
    from trl_parity.trainers.instrumentation import instrument, uninstrument

    base, name = trl_module.RLOOTrainer, "_generate_and_score_completions"
    monkeypatch.setattr(base, name, own)
    if when == "after":
        instrument()
    delegating = {
        n: lambda self, *a, _n=n: self.calls.append("theirs") or getattr(base, _n)(self, *a) for n in WRAPPED
    }
    theirs = type("FastRLOOTrainer", (base,), delegating | {"__module__": "fast_cache"})
    trl_module.RLOOTrainer = theirs
    assert ("rloo" in instrument()) == (when == "before")
    found = vars(theirs)[name], vars(base)[name]
    assert [instrument() for _ in range(3)] == [set()] * 3
    assert (vars(theirs)[name], vars(base)[name]) == found
    trainer, looks = Watched(), []
    noticed(monkeypatch, looks)
    theirs._generate_and_score_completions(trainer, None)
    assert trainer.calls == ["theirs", "trl"]
    assert len(looks) == 1
    base._generate_and_score_completions(trainer, None)  # who imported TRL's own before
    assert len(looks) == 2
    uninstrument()
    assert vars(theirs)[name] is delegating[name]
    assert vars(base)[name] is own
