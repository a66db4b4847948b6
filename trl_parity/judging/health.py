"""What is wrong with a run though engine and trainer agree: the cause, in words, and what mends it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..causes import CAUSES
from ..records import NamedCause
from ..verdict import Verdict

__all__ = ["HEALTH", "Sign", "of_drift", "signs", "standing"]

# what is over a limit and says nothing of log-probs that differ
_OTHERWISE = (
    "completions/", "correction/", "entropy/", "evidence/entropy", "policy_drift/", "reference/", "reward/",
    "teacher/",
)  # fmt: skip

# a warning of these is of a drift; of others it is of one window, whose chance a diagnosis weighs against its batch
_CERTAIN = ("evidence/", "floor/", "nonfinite_rate", "temperature/")


@dataclass(frozen=True, slots=True)
class Sign:
    """A statistic that tells by itself what is wrong."""

    seen: str  # a sentence without its end; the statistic goes into {}
    fix: str = ""  # where it is not the cause's own
    cause: str = ""  # identifier in trl_parity.causes; "": what is seen is all there is to say

    @property
    def mends(self) -> str:
        """What a person does about it."""
        return self.fix or CAUSES[self.cause].fix


def of_drift(verdict: Verdict) -> bool:
    """Whether a statistic of the mismatch is over a limit, or warned of and no matter of one window's chance."""
    warned = [name for name in verdict.warnings if name.startswith(_CERTAIN)]
    return not all(name.startswith(_OTHERWISE) for name in (*verdict.breaches, *warned))


def signs(stats: Mapping[str, float | None], named: Collection[str]) -> Iterator[tuple[Sign, str]]:
    """Each of ``HEALTH`` that is named, over its limit, with what was seen."""
    for name, sign in HEALTH.items():
        if name in named and (x := stats.get(name)) is not None:
            yield sign, sign.seen.format(x)


def standing(verdicts: Iterable[Verdict]) -> tuple[NamedCause, ...]:
    """The causes that a run's windows tell of: what was over its limit when it was last measured."""
    last: dict[str, NamedCause] = {}
    for verdict in verdicts:
        stats: Mapping[str, float | None] = verdict.stats or {}
        over = {*verdict.breaches, *verdict.warnings}
        for name, sign in HEALTH.items():
            if not sign.cause or stats.get(name) is None:
                continue
            last.pop(name, None)
            for _, seen in signs(stats, over & {name}):
                last[name] = NamedCause(cause=sign.cause, explained=0.0, confidence=1.0, finding=seen, fix=sign.mends)
    return tuple(last.values())


HEALTH: dict[str, Sign] = {
    "completions/duplicates": Sign(
        "beside what their probability allows, {:.0%} of the pairs of completions of one prompt are equal, token by "
        "token",
        cause="duplicate_rollouts",
    ),
    "completions/probability": Sign(
        "a whole completion has a probability of {:.2g} on average: the policy has next to one answer, so that the "
        "rewards of a group are equal, nothing is learned, and a drift can't show",
        "raise the entropy (a higher temperature, beta > 0, a lower learning rate), or resume from before that.",
    ),
    "completions/stopped_but_masked": Sign(
        "{:.0%} of the completions that the engine ended are masked from the loss as cut off: TRL takes what doesn't "
        "end in its own EOS for truncated",
        cause="truncation_accounting",
    ),
    "reference/base_moved": Sign(
        "the frozen base has moved by {:.2%} of its size since the first window, and with it the reference of the KL "
        "term: merging an adapter into half precision and taking it out again at each sync does this",
        "model_init_kwargs={'dtype': 'float32'} with bf16=True.",
        cause="reference_drift",
    ),
    "reference/merged": Sign(
        "{:.0%} of the adapter's layers are still merged into the base after the sync: passes leave the adapter out, "
        "so that it gets no gradient, and the reference is the policy",
        "find what merged it (merge_adapter) without unmerge_adapter.",
        cause="reference_drift",
    ),
    "reference/start_kl_k3": Sign(
        "before any update the policy is {:.3g} nats a token (k3) from its reference: with the adapter switched off "
        "the model is not the one training began with. PiSSA, OLoRA and other initializations that rewrite the base "
        "do this",
        "init_lora_weights=True, or beta=0.",
        cause="reference_drift",
    ),
    "teacher/temperature_gap": Sign(
        "the teacher's server answers for temperature 1, {:.3g} away from what the loss asked for and divides the "
        "student's logits by: vLLM's prompt log-probs know no temperature",
        "temperature=1.0, or a teacher that is loaded beside the student.",
    ),
    "teacher/mass_max": Sign(
        "what the teacher's server gives for one place adds up to a probability of {:.4g}: these are no log-probs",
        "vllm serve --logprobs-mode raw_logprobs (or processed_logprobs), not logits.",
    ),
    "teacher/missing": Sign(
        "for {:.1%} of the completions' tokens the teacher's server gives no finite log-prob: the loss of these is "
        "lost or infinite",
        "ask for more of them (loss_top_k), and look at the teacher's logits.",
    ),
    "teacher/foreign": Sign(
        "{:.1%} of the ids the teacher's server answers with are beyond the student's vocabulary: another tokenizer",
        "a teacher of the student's family, or a trainer that matches vocabularies (GOLD).",
    ),
}
