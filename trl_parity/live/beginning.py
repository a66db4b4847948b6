"""What is done and said once, at the first batch of a run."""

from __future__ import annotations

from ..collectives import fail_together
from ..lint.facts import live_traps, tell
from ..lint.rules import Finding
from ..tracking.sinks import WandbSink
from ..trainers.capture import Capture
from ..trainers.engine_args import TRLEngineArguments
from .console import shorten_console
from .trainer_run import TrainerRun

__all__ = ["begin"]


def begin(run: TrainerRun, capture: Capture, request: TRLEngineArguments | None) -> list[Finding]:
    """Refuse what can't be watched, and say what is. The advice of lint, for later. Collective.

    ``request``: what TRL's engine was to be built with. Raises ConfigError on every rank.
    """
    trainer = run.trainer = capture.trainer
    config, stages = run.config, run.judge.stages
    advice: list[Finding] = []
    with stages("panels"):
        for sink in run.judge.sinks:
            if isinstance(sink, WandbSink):
                sink.define_metrics()
                if config.panels:
                    sink.make_panels()
    run.watch_teacher(capture)
    if request is not None:  # collective: a server tells one rank alone
        error = ""
        with stages("engine arguments"):
            error = request.disagreement(capture.generation, capture.engine)
        fail_together(error, trainer.args.world_size)
    if not trainer.accelerator.is_main_process:
        return advice
    with stages("console"):
        if config.console == "short":
            shorten_console(trainer)
    with stages("start"):
        run.say_start(capture.sampling)
    with stages("surroundings"):
        run.judge.write_run(run.investigator.surroundings(capture))
    with stages("traps"):
        found = live_traps(capture, capture.replayed)
        advice = [finding for finding in found if finding.severity != "error"]
        tell(finding for finding in found if finding.severity == "error")
    return advice
