"""Who speaks is said on every line, and no line is glued to a progress bar."""

import logging

from trl_parity.lines import LastResort, say


def test_a_line_stands_above_a_bar_that_is_being_drawn(capfd):
    from tqdm import tqdm

    with tqdm(total=3, mininterval=0) as bar:
        bar.update(1)
        say("two\nlines")
        say("\ntrl-parity: HALT at step 3.")
        bar.update(1)
    lines = [line.split("\r")[-1] for line in capfd.readouterr().err.split("\n")]
    assert "trl-parity: two" in lines
    assert "trl-parity: HALT at step 3." in lines


def test_a_warning_says_who_speaks_unless_somebody_set_up_logging(capfd, monkeypatch):
    assert sum(isinstance(h, LastResort) for h in logging.getLogger("trl_parity").handlers) == 1
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as it is where nobody has
    logger = logging.getLogger("trl_parity.live.batches")
    logger.warning("parity measurement failed at step %d", 3)
    logger.info("not loud enough")
    assert capfd.readouterr().err == "trl-parity: parity measurement failed at step 3\n"
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()])
    logger.warning("theirs now")
    assert capfd.readouterr().err == ""
