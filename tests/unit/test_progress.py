"""A bar is drawn on a terminal alone."""

import os
import pty
import subprocess
import sys

from support import ROOT

from trl_parity.lines import progress_bar

SCRIPT = """
from trl_parity.lines import progress_bar
with progress_bar("shards", kept=True, shown=%r) as update:
    update(3, 10, more="12 answers here")
    update(4, 0, "trials")
"""


def drawn(shown, terminal):
    if not terminal:
        done = subprocess.run([sys.executable, "-c", SCRIPT % shown], capture_output=True, check=True, cwd=ROOT)
        return done.stdout + done.stderr
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT % shown], stderr=theirs, cwd=ROOT, env=os.environ | {"COLUMNS": "100"}
    )
    os.close(theirs)
    out = b""
    try:
        while block := os.read(ours, 65536):
            out += block
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    return out


def test_a_bar_is_drawn_on_a_terminal_alone():
    assert b"trials" in drawn(True, terminal=True)
    assert drawn(False, terminal=True) == b""
    assert drawn(True, terminal=False) == b""


def test_where_there_is_no_terminal_a_log_gets_a_line_when_something_else_begins(capfd):
    with progress_bar("starting", logged=True) as update:
        for done in range(1, 4):
            update(done, 100, "trials")
        update(0, 0, "weights")
    assert capfd.readouterr().err.splitlines() == [
        "trl-parity: starting",
        "trl-parity: trials 1/100",
        "trl-parity: weights",
    ]
