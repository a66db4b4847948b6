"""A halt tells which steps were learned from, and from where to go on."""

import pytest
from support.windows import window

from trl_parity import ParityConfig
from trl_parity.report.messages import halt_text
from trl_parity.report.recovery import Learned, last_checkpoint_before, learned_from
from trl_parity.verdict import Status, Verdict


def run(steps, bad, every=1, **settings):
    """A run halted at the last of these steps, bad from ``bad`` windows before it on."""
    verdicts = []
    for i, step in enumerate(steps):
        streak = max(0, i + 1 - (len(steps) - bad))
        status = Status.HALT if i == len(steps) - 1 else Status.BREACH if streak else Status.OK
        stats = window(kl_k3=0.2, trimmed__kl_k3=0.2)
        verdicts.append(Verdict(step=step, status=status, streak=streak, breaches=("kl_k3",), stats=stats))
    return verdicts, ParityConfig(every_n_steps=every, **settings)


@pytest.mark.parametrize(
    ("steps", "bad", "every", "action", "learned"),
    [
        ([1, 2, 3], 3, 1, "stop", (1, 2)),  # sick from its first batch: two were learned from
        ([10, 11, 12, 13], 3, 1, "skip_update", (11, 12)),
        ([10, 11], 1, 1, "raise", (11, 10)),  # an immediate rule: none
        ([10, 11, 12, 13], 3, 1, "log", (11, 13)),
        ([10, 20, 30, 40], 3, 10, "stop", (11, 39)),  # a window is judged before its last update
        ([10, 20], 1, 10, "stop", (11, 19)),
        ([3, 6], 2, 3, "stop", (1, 5)),
    ],
)
def test_the_steps_learned_from_are_those_of_the_drift_before_the_halt(steps, bad, every, action, learned):
    verdicts, config = run(steps, bad, every, action=action)
    assert learned_from(verdicts[-1], verdicts, config) == Learned(*learned)


def test_the_newest_whole_checkpoint_from_before_the_drift_is_the_one_to_roll_back_to(tmp_path):
    for step in (5, 10, 11, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-9").mkdir()  # cut short
    (tmp_path / "checkpoint-x").mkdir()
    assert last_checkpoint_before(tmp_path, 11) == tmp_path / "checkpoint-10"
    assert last_checkpoint_before(tmp_path, 10) == tmp_path / "checkpoint-5"
    assert last_checkpoint_before(tmp_path, 5) is None


def test_the_text_says_so(tmp_path):
    def told(steps, **settings):
        verdicts, config = run(steps, 3, **settings)
        return " ".join(halt_text(verdicts[-1], config, verdicts, tmp_path / "x", None, tmp_path).split())

    none = told([10, 11, 12, 13])
    assert "Learned steps 11 to 12 were learned from before it was sure; step 13 was not." in none
    assert "no checkpoint from before step 11" in none
    assert "trainer.train(resume_from_checkpoint=True)" in none
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text("{}")
    command = f"checkpoint from before step 11: trainer.train(resume_from_checkpoint='{tmp_path}/checkpoint-10')"
    assert command in told([10, 11, 12, 13])
    assert "steps 11 to 13 were learned from, and what follows will be" in told([10, 11, 12, 13], action="log")
