"""A bar is drawn on a terminal alone."""

import os
import pty
import subprocess
import sys

from support import ROOT

SCRIPT = """
from trl_parity.progress import progress_bar
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
