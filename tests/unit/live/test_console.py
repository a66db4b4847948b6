"""What the console shows of a row."""

from types import SimpleNamespace

from transformers.trainer_callback import PrinterCallback, ProgressCallback

from trl_parity.live.console import SHORT, shorten_console
from trl_parity.metrics.scalars import SCALARS


def test_the_console_has_fewer_than_thirty_of_ours_and_all_of_the_others(capsys):
    assert len(SHORT) < 30
    assert set(SCALARS) >= SHORT
    printer, bar = PrinterCallback(), ProgressCallback()
    trainer = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[printer, bar, object()]))
    shorten_console(trainer)
    shorten_console(trainer)  # a second run of the same trainer
    logs = {f"{prefix}parity/{name}": 0.5 for prefix in ("", "eval_") for name in SCALARS} | {"loss": 1.0, "reward": 0}
    told = SimpleNamespace(is_local_process_zero=True, is_world_process_zero=True)
    bar.training_bar = SimpleNamespace(write=print)
    for callback in (printer, bar):
        callback.on_log(None, told, None, logs=logs)
        shown = eval(capsys.readouterr().out)
        assert len([name for name in shown if "parity/" in name]) == 2 * len(SHORT)
        assert {"loss", "reward", "parity/kl_k3", "parity/breaker/status", "eval_parity/kl_k3"} <= set(shown)
    assert len(logs) == 2 * len(SCALARS) + 2  # the trackers' row is as it was
