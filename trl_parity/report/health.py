"""What is wrong with a run though engine and trainer agree, in words, and what mends it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

__all__ = ["HEALTH", "health"]

HEALTH = (
    "completions/stopped_but_masked", "reference/base_moved", "reference/merged", "reference/start_kl_k3",
    "teacher/temperature_gap", "teacher/mass_max", "teacher/missing", "teacher/foreign",
)  # fmt: skip


def health(stats: Mapping[str, float | None], named: Sequence[str]) -> Iterator[str]:
    """A sentence for each statistic of ``HEALTH`` that is named: over its limit."""
    for name in HEALTH:
        if name in named and (x := stats.get(name)) is not None:
            yield _SAYS[name].format(x)


_SAYS = {
    "completions/stopped_but_masked": (
        "{:.0%} of the completions that the engine ended are masked from the loss as cut off "
        "(truncation_accounting): TRL takes what doesn't end in its own EOS for truncated. "
        "mask_truncated_completions=False; or end by tokens alone (stop_token_ids) and name them to TRL: "
        "trainer.eos_token_ids += [...] before trainer.train()."
    ),
    "reference/base_moved": (
        "The frozen base has moved by {:.2%} of its size since the first window (reference_drift), and with it the "
        "reference of the KL term. Merging an adapter into half precision and taking it out again at each sync does "
        "this: model_init_kwargs={{'dtype': 'float32'}} with bf16=True."
    ),
    "reference/merged": (
        "{:.0%} of the adapter's layers are still merged into the base after the sync (reference_drift): passes "
        "leave the adapter out, so that it gets no gradient, and the reference is the policy. Find what merged it "
        "(merge_adapter) without unmerge_adapter."
    ),
    "reference/start_kl_k3": (
        "Before any update the policy is {:.3g} nats a token (k3) from its reference (reference_drift): with the "
        "adapter switched off the model is not the one training began with. PiSSA, OLoRA and other initializations "
        "that rewrite the base do this: init_lora_weights=True, or beta=0."
    ),
    "teacher/temperature_gap": (
        "The teacher's server answers for temperature 1, {:.3g} away from what the loss asked for and divides the "
        "student's logits by: vLLM's prompt log-probs know no temperature. temperature=1.0, or a teacher that is "
        "loaded beside the student."
    ),
    "teacher/mass_max": (
        "What the teacher's server gives for one place adds up to a probability of {:.4g}: these are no log-probs. "
        "vllm serve --logprobs-mode raw_logprobs (or processed_logprobs), not logits."
    ),
    "teacher/missing": (
        "For {:.1%} of the completions' tokens the teacher's server gives no finite log-prob: the loss of these is "
        "lost or infinite. Ask for more of them (loss_top_k), and look at the teacher's logits."
    ),
    "teacher/foreign": (
        "{:.1%} of the ids the teacher's server answers with are beyond the student's vocabulary: another tokenizer. "
        "A teacher of the student's family, or a trainer that matches vocabularies (GOLD)."
    ),
}
