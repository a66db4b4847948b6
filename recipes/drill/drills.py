"""The drills: ways to break the real stack, each with the cause a diagnosis should name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import patches

from trl_parity.errors import ConfigError

CONTROL = "control"
PREFIX = "mint oak fox sea " * 3  # every prompt's first tokens where the prefix cache matters


@dataclass(frozen=True, slots=True)
class Setting:
    """What a drill's arguments may depend on."""

    temperature: float
    tokenizer: Any

    def ids(self, letters: str) -> list[int]:
        """The tokens of single letters."""
        return [int(i) for i in self.tokenizer.convert_tokens_to_ids(list(letters))]


Arguments = Callable[[Any, Setting], dict[str, Any]]  # (strength, setting) -> fields of GRPOConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Drill:
    """One way to break the stack, at several strengths; a drill uses the last, benchmarks all.

    What begins with ``base`` is not the fault but what it needs to show: the control beside it has it too.
    """

    name: str
    cause: str  # identifier in trl_parity.causes; "": nothing is wrong
    what: str  # the strength goes into {}
    strengths: tuple[Any, ...]
    base: Arguments = lambda s, _: {}
    base_engine: dict[str, Any] = field(default_factory=dict)
    arguments: Arguments = lambda s, _: {}
    engine: Callable[[Any], dict[str, Any]] = lambda s: {}  # engine arguments: a process of its own
    patch: patches.Patch | None = None
    onset: int = 1  # first window that can show it
    halts: bool = True  # False: engine and trainer agree; a window warns, and a diagnosis that is asked for names it
    experts: bool = False  # on a mixture of experts, whatever model the other drills have

    def says(self, strength: Any) -> str:
        """What is broken, in a line."""
        return self.what.format(strength)

    def engine_args(self, strength: Any, control: bool) -> dict[str, Any]:
        """Engine arguments laid over TRL's own."""
        return self.base_engine | ({} if control else self.engine(strength))

    def run_args(self, strength: Any, setting: Setting, control: bool) -> dict[str, Any]:
        """Fields of GRPOConfig."""
        common = {"temperature": setting.temperature} | self.base(strength, setting)
        return common if control else common | self.arguments(strength, setting)


def rate(s: float, _: Setting) -> dict[str, Any]:
    """The strength is the learning rate: how far the weights move from one sync to the next."""
    return {"learning_rate": s}


def at_1e_3(s: Any, _: Setting) -> dict[str, Any]:
    return {"learning_rate": 1e-3}


CACHED = {"block_size": 32, "enable_prefix_caching": True}

DRILLS = [
    Drill(name=CONTROL, cause="", what="nothing is wrong (learning rate {})", strengths=(1e-6, 1e-4, 1e-3), base=rate),
    Drill(name="raw-logprobs", cause="raw_logprobs", strengths=(1.25, 0.8, 0.65),
          what="engine argument logprobs_mode=raw_logprobs (run at {} x the temperature: at 1 raw is processed)",
          base=lambda s, at: {"temperature": at.temperature * s},
          engine=lambda s: {"logprobs_mode": "raw_logprobs"}),
    Drill(name="temperature", cause="temperature", strengths=(1.05, 1.15, 1.5),
          what="temperature in generation_kwargs, {} x the run's",
          arguments=lambda s, at: {"generation_kwargs": {"temperature": at.temperature * s}}),
    Drill(name="logit-scale", cause="temperature", what="the engine's logits x {}", strengths=(1.05, 1.1, 1.15),
          patch=patches.touch_logits(patches.scale)),
    Drill(name="soft-cap", cause="temperature", what="the engine caps its logits at {}", strengths=(6.0, 4.0, 2.0),
          patch=patches.touch_logits(patches.soft_capped)),
    Drill(name="top-p", cause="truncated_sampling", what="top_p={}, not replayed", strengths=(0.98, 0.95, 0.9),
          arguments=lambda s, _: {"top_p": s}),
    Drill(name="min-p", cause="truncated_sampling", what="min_p={}, not replayed", strengths=(0.02, 0.05, 0.2),
          arguments=lambda s, _: {"min_p": s}),
    Drill(name="hidden-top-k", cause="truncated_sampling", what="requests get top_k={} behind TRL's back",
          strengths=(16, 12, 8), patch=patches.hidden("top_k")),
    Drill(name="repetition-penalty", cause="penalties", what="repetition_penalty={}, not replayed",
          strengths=(1.02, 1.05, 1.2), arguments=lambda s, _: {"repetition_penalty": s}),
    Drill(name="presence-penalty", cause="penalties", what="requests get presence_penalty={} behind TRL's back",
          strengths=(0.1, 0.3, 0.6), patch=patches.hidden("presence_penalty")),
    Drill(name="logit-bias", cause="constrained_decoding", what="logit_bias={} on the letter f",
          strengths=(-0.5, -2.0, -100.0),
          arguments=lambda s, at: {"generation_kwargs": {"logit_bias": {at.ids("f")[0]: s}}}),
    Drill(name="allowed-tokens", cause="constrained_decoding", what="allowed_token_ids without the letters {!r}",
          strengths=("x", "xo", "xoea"),
          arguments=lambda s, at: {"generation_kwargs": {
              "allowed_token_ids": sorted(set(range(len(at.tokenizer))) - set(at.ids(s)))}}),
    Drill(name="tilted-logits", cause="constrained_decoding", what="a bias of up to {} on the engine's logits",
          strengths=(0.2, 0.5, 1.0), patch=patches.touch_logits(patches.tilted)),
    Drill(name="shifted-logprobs", cause="token_misalignment", strengths=(0.05, 0.2, 0.5),
          what="log-probs one place late in {} of the sequences", patch=patches.touch_logprobs(patches.shift)),
    Drill(name="double-bos", cause="token_misalignment", strengths=(1,),
          what="{} more BOS token before each prompt, seen by the engine only", patch=patches.extra_bos),
    Drill(name="short-prompts", cause="token_misalignment", strengths=(1, 2), patch=patches.short_prompts,
          what="the engine reads prompts without their first {} tokens"),
    Drill(name="crossed-logprobs", cause="token_misalignment", strengths=(0.25, 0.5, 1.0), patch=patches.crossed,
          what="{} of the pairs of sequences have each other's log-probs"),
    Drill(name="nan-logprobs", cause="nonfinite_logprobs", what="log-prob NaN at {} of the tokens",
          strengths=(0.02, 0.1, 0.3), patch=patches.touch_logprobs(patches.spoil)),
    Drill(name="lost-sync", cause="stale_weights", what="syncs lost after the first (learning rate {})",
          strengths=(1e-4, 3e-4, 1e-3), base=rate, patch=patches.lose_sync, onset=2),
    Drill(name="lost-tensors", cause="partial_sync", what="tensors of {!r} never arrive after the first sync",
          strengths=("layers.0.mlp.down", "layers.0", "mlp"), base=at_1e_3, patch=patches.lose_tensors, onset=2),
    Drill(name="tied-head", cause="partial_sync", what="the tied {} never arrives after the first sync",
          strengths=("embed_tokens",), base=at_1e_3, patch=patches.lose_tensors, onset=2),
    Drill(name="scaled-tensors", cause="partial_sync", what="o_proj x {} in the engine after each sync",
          strengths=(1.05, 1.15, 1.3), patch=patches.touch_tensors("o_proj", lambda x, by: x * by)),
    Drill(name="rolled-embeddings", cause="partial_sync", what="the engine's embeddings are {} tokens on",
          strengths=(1,), patch=patches.touch_tensors("embed_tokens", lambda x, by: x.roll(by, 0))),
    Drill(name="exchanged-layers", cause="engine_state", strengths=("o_proj", "down_proj", "mlp"),
          what="the engine's loader exchanges {} of two layers", patch=patches.exchange_layers),
    Drill(name="kept-prefix-cache", cause="stale_prefix_cache", what="prefix cache kept over syncs (learning rate {})",
          strengths=(1e-4, 3e-4, 1e-3), base=lambda s, at: rate(s, at) | {"prompt_prefix": PREFIX},
          base_engine=CACHED, patch=patches.keep_cache, onset=2),
    Drill(name="in-flight-update", cause="in_flight_update", what="weights arrive amid a batch (learning rate {})",
          strengths=(1e-4, 3e-4, 1e-3), base=rate, patch=patches.update_in_flight, onset=2),
    Drill(name="dropout", cause="trainer_numerics", what="attention dropout {} left on", strengths=(0.01, 0.05, 0.2),
          patch=patches.dropout),
    Drill(name="noise", cause="engine_numerics", what="the engine's logits get noise of {}, another one at each call",
          strengths=(0.05, 0.1, 0.2), patch=patches.noisy),
    Drill(name="trainer-eps", cause="model_definition", strengths=(0.1, 0.3, 1.0),
          what="the trainer's norms have eps {}", patch=patches.numbers("trainer", "variance_epsilon")),
    Drill(name="own-law", cause="model_definition", strengths=(1.05, 1.1, 1.2), patch=patches.own_law,
          what="both models multiply their logits by {}; TRL's loss does not know"),
    Drill(name="trainer-rope", cause="model_definition", what="the trainer's rope frequencies x {}",
          strengths=(1.02, 1.05, 1.3), patch=patches.other_rope),
    Drill(name="engine-rope", cause="model_definition", what="the engine's rope_theta is {:g} (hf_overrides)",
          strengths=(5e3, 5e4, 5e5),
          engine=lambda s: {"hf_overrides": {"rope_parameters": {"rope_theta": s, "rope_type": "default"}}}),
    Drill(name="rotary-table", cause="engine_state", what="the engine's rotary table is another from position {} on",
          strengths=(16, 8, 2), patch=patches.other_table),
    Drill(name="attention-scale", cause="engine_state", what="the engine's attention scale x {}",
          strengths=(1.1, 1.3, 2.0), patch=patches.other_scale),
    Drill(name="fp8-kv", cause="kv_cache_precision", what="kv_cache_dtype=fp8_e5m2 (at most {} tokens)",
          strengths=(10, 20, 40), base=lambda s, _: {"max_completion_length": s},
          engine=lambda s: {"kv_cache_dtype": "fp8_e5m2"}),
    Drill(name="coarse-kv", cause="kv_cache_precision", strengths=("float8_e5m2",),
          what="keys and values go through {} on their way into the engine's cache, which no setting says",
          patch=patches.coarse_cache),
    Drill(name="fp8-logits", cause="head_precision", what="the engine's logits are rounded to {}",
          strengths=("float8_e4m3fn",), patch=patches.touch_logits(patches.rounded)),
    Drill(name="bf16-head", cause="head_precision", strengths=("float16", "bfloat16"),
          what="both sides in float32, but the engine's logits in {} (run at 0.3 x the temperature: they are small)",
          base=lambda s, at: {"bf16": False, "temperature": 0.3 * at.temperature}, base_engine={"dtype": "float32"},
          patch=patches.touch_logits(patches.rounded)),
    Drill(name="favoured-expert", cause="moe_routing", what="the engine's routers add {} to one expert's logit",
          strengths=(0.5, 1.0, 2.0), patch=patches.favoured_expert, experts=True,
          base_engine={"enforce_eager": True}),  # compiled for a CPU, routers can't be reached
    Drill(name="one-seed", cause="duplicate_rollouts", what="seed={} in generation_kwargs", strengths=(0,),
          arguments=lambda s, _: {"generation_kwargs": {"seed": s}}, halts=False),
    Drill(name="narrow-correction", cause="correction_weights", strengths=(0.99, 0.98),
          what="sequences whose ratio is above {} are taken out of the loss (vllm_importance_sampling_clip_max)",
          arguments=lambda s, _: {"vllm_importance_sampling_clip_max": s}),
    Drill(name="stop-strings", cause="truncation_accounting", strengths=("=",),
          what="answers end by the stop string {!r}, and mask_truncated_completions masks them",
          base=lambda s, _: {"mask_truncated_completions": True},
          arguments=lambda s, _: {"generation_kwargs": {"stop": [s]}}, halts=False),
    Drill(name="rewritten-base", cause="reference_drift", strengths=("pissa", "olora"),
          what="the adapter's initialization ({}) rewrites the base, which is the reference of the KL term",
          base=lambda s, _: {"beta": 0.05, "adapter": True}, arguments=lambda s, _: {"adapter": s}, halts=False),
]  # fmt: skip


def pick(names: list[str], drills: list[Drill]) -> list[Drill]:
    """The drills of these names, in the list's order. Raises ConfigError naming the nearest known one."""
    known = [drill.name for drill in drills]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name.replace("_", "-"), known, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"no drill is called {name!r}.{hint} There are: {', '.join(known)}.")
    return [drill for drill in drills if drill.name in names]
