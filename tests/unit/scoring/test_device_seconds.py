"""Seconds of blocks, on the host. What a GPU adds: test_cuda.py."""

import time
from contextlib import suppress

from trl_parity.scoring.device_seconds import DeviceSeconds


def test_blocks_count_one_after_the_other_whatever_becomes_of_them():
    spent = DeviceSeconds()
    for fails in (False, True):
        with suppress(ValueError), spent.counted():
            time.sleep(0.02)
            if fails:
                raise ValueError
        time.sleep(0.05)
    total = spent.total
    assert 0.04 <= total < 0.09
    assert spent.total == total  # read twice, counted once
