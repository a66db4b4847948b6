"""Settings as frozen data: ``ParityConfig``. Imports no torch, vllm or wandb."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

from ..credentials import without_credentials
from ..errors import ConfigError
from .fields import SHARE, at_least, check_fields, number
from .reading import read_mapping
from .rules import EVIDENCE_EFFECTS, Rule, as_mapping, refuse_unknown, rules_over_defaults

__all__ = ["ParityConfig"]

HEAD_BACKENDS = ("auto", "torch", "triton")

BATCHES = number(lambda x: x >= 0, "a number of rollout batches >= 0")

ALPHA = number(lambda x: 0 < x < 1, "a probability, more than 0 and less than 1")

FACTOR = number(lambda x: 1 <= x < math.inf, "a number >= 1")

SECONDS = number(lambda x: 0 < x < math.inf, "seconds, more than 0")


@dataclass(frozen=True)
class ParityConfig:
    """Settings of ``ParityCallback``; fields work as YAML keys and as TrlParser arguments."""

    every_n_steps: Annotated[int, at_least(1)] = field(
        default=1,
        metadata={
            "help": "Optimizer steps per window: every rollout batch is measured, and each window is reduced over "
            "all ranks, judged and logged once. 1 judges every batch before it is learned from."
        },
    )
    action: str = field(
        default="stop",
        metadata={
            "help": "What a HALT verdict does. 'log': nothing but log. 'skip_update': keep the condemned batch's "
            "gradient from the weights and go on. 'stop': the same, then save a checkpoint and end train() cleanly. "
            "'raise': raise ParityHalt before the batch is learned from.",
            "choices": ["log", "skip_update", "stop", "raise"],
        },
    )
    consecutive: Annotated[int, at_least(1)] = field(
        default=3,
        metadata={"help": "Breached windows in a row that halt, for rules that do not set their own number."},
    )
    breach_memory: Annotated[int, at_least(0)] = field(
        default=20,
        metadata={
            "help": "Healthy windows that a breached one is remembered for: as many breaches as `consecutive` halt "
            "though they are not in a row, where fewer healthy windows than this lie between them. 0: none is."
        },
    )
    rules: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Limits by statistic, laid over the defaults, e.g. {'kl_k3': {'k': 8}, 'seq/ess': {'limit': 0.5, "
            "'below': true}}; a bare number is an absolute limit, without the noise floor; null or false drops a "
            "default rule. On a command line: JSON."
        },
    )
    warmup: Annotated[int, at_least(0)] = field(
        default=0,
        metadata={
            "help": "First windows of a run that can breach but not halt (immediate rules can). Healthy ones are "
            "CALIBRATING."
        },
    )
    evidence_alpha: Annotated[float, ALPHA] = field(
        default=1e-4,
        metadata={
            "help": "Probability that the sequential tests (evidence/*) ever condemn a healthy run, of any length, "
            "over all of them: the rules on them have the limit -log10 of it."
        },
    )
    evidence_floor_factor: Annotated[float, FACTOR] = field(
        default=1.25,
        metadata={"help": "Multiple of the noise floor's upper bound that drift must exceed to speak for a fault."},
    )
    evidence_change_factor: Annotated[float, FACTOR] = field(
        default=1.25,
        metadata={"help": "Multiple of its level in the run's past that drift must exceed to speak for a change."},
    )
    evidence_effects: dict[str, float] | str | None = field(
        default=None,
        metadata={
            "help": "The smallest effects that matter to the sequential tests, laid over the defaults: {'honesty': "
            "0.002, 'kl_k1': 0.002, 'logp_abs_diff/mean': 0.001, 'kl_k3': 0.0001, 'entropy/drift': 0.02}; honesty: of "
            "the mean ratio, the others in nats. On a command line: JSON."
        },
    )
    floor_tokens: Annotated[int, at_least(0)] = field(
        default=2048,
        metadata={
            "help": "Completion tokens per rank on which the noise floor is measured, of 8 sequences over all ranks "
            "at least: the trainer against itself and the engine against itself. 0: no floor, rules with k use their "
            "absolute limit."
        },
    )
    lag_probe_tokens: Annotated[int, at_least(0)] = field(
        default=512,
        metadata={
            "help": "Asynchronous training: tokens the server generates after each weight sync only to be compared, "
            "since both sides hold the same weights then; what is trained on lags behind. 0: none, and steps without "
            "tokens at lag 0 are NO_DATA."
        },
    )
    floor_every_n_windows: Annotated[int, at_least(1)] = field(
        default=50,
        metadata={
            "help": "Windows between measurements of the noise floor, at least. It is also measured anew before a "
            "window is condemned by it."
        },
    )
    floor_cost_share: Annotated[float, SHARE] = field(
        default=0.005,
        metadata={
            "help": "Bound on the share of training time that regular measurements of the noise floor may take; the "
            "first one, and those that confirm a breach, are always made."
        },
    )
    engine_dtype: str | None = field(
        default=None,
        metadata={
            "help": "The engine's dtype (e.g. bfloat16) where it can't be read, as behind a server that does not tell "
            "its settings. Default there: the trainer's compute dtype."
        },
    )
    engine_args: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "What TRL's colocated engine is built with, over what TRL passes: a preset (rl, throughput, "
            "long_context, mixed_cluster), a YAML file of vLLM's engine arguments, or a mapping such as {'preset': "
            "'rl', 'max_model_len': 4096}. Checked before anything is loaded, and again on the live engine at the "
            "first step. With a server: only compared. On a command line a mapping is JSON."
        },
    )
    temperatures: dict[str, float] | str | None = field(
        default=None,
        metadata={
            "help": "The sampling temperature meant for each phase, checked against what the engine was asked for: "
            "{'train': 0.7, 'eval': 0.0, 'train@200': 1.0}, '@' for the first step of a later phase. Default: not "
            "checked beyond engine against trainer. On a command line: JSON."
        },
    )
    reward_baseline: str | None = field(
        default=None,
        metadata={
            "help": "JSON file of historical rewards (RewardBaseline.save), compared with the run's last rewards."
        },
    )
    reward_window: Annotated[int, at_least(20)] = field(
        default=1000, metadata={"help": "Last rewards of the run that are compared with the baseline."}
    )
    reward_min_effect: Annotated[float, SHARE] = field(
        default=0.3,
        metadata={"help": "Cliff's delta or Kolmogorov-Smirnov distance from which on rewards count as parted."},
    )
    on_state_mismatch: str = field(
        default="restart",
        metadata={
            "help": "A checkpoint whose trl-parity state this version can't read: 'restart' with an empty streak and "
            "a new floor (and a warning), or 'error'.",
            "choices": ["restart", "error"],
        },
    )
    truncation: str = field(
        default="ignore",
        metadata={
            "help": "What the engine's top-k, top-p, min-p and penalties are to the verdict. 'ignore': the trainer's "
            "policy as TRL's loss has it is judged, which knows none of them, so that they are drift. 'replay': the "
            "trainer's policy with all of them applied is judged, for a loss that really renormalizes; the drift of "
            "TRL's own is then left out. Both are measured (replayed/*, own_head/*, truncation/*).",
            "choices": ["ignore", "replay"],
        },
    )
    diagnose: str = field(
        default="breach",
        metadata={
            "help": "When the cause of a drift is looked for, once an episode: 'breach' at its first breached window, "
            "'warn' already at a WARN, 'never' only on callback.diagnose(). The episode's first halt asks once more "
            "where it is still unknown.",
            "choices": ["breach", "warn", "never"],
        },
    )
    diagnose_tokens: Annotated[int, at_least(1)] = field(
        default=4096,
        metadata={"help": "Tokens per rank (prompts and padding included) of the batch that a diagnosis looks at."},
    )
    diagnose_budget: Annotated[float, BATCHES] = field(
        default=2.0,
        metadata={
            "help": "Time the first diagnosis of an episode may take, in rollout batches (generating and scoring "
            "one). Where it is spent before all is asked that could have another answer, nothing is named before the "
            "halt, whose diagnosis asks all, as does one that is asked for."
        },
    )
    server_timeout: Annotated[float, SECONDS] = field(
        default=60.0,
        metadata={
            "help": "Seconds one request of trl-parity's own to a vLLM server may take until its whole answer is "
            "there (its settings, scoring tokens again). After one that it does not answer, nothing more is asked "
            "before the next window; a server that does not even answer with its settings is not asked again in the "
            "run."
        },
    )
    eval_batches: str = field(
        default="separate",
        metadata={
            "help": "'separate': measure evaluation rollouts too and log them under eval/parity/*, never mixed into "
            "training windows and never judged. 'skip': leave them alone.",
            "choices": ["separate", "skip"],
        },
    )
    token_budget: Annotated[int, at_least(1)] = field(
        default=8192,
        metadata={
            "help": "Tokens per rollout batch and rank (prompts and padding included) of the callback's own forward "
            "pass, run only where TRL makes none (vllm_importance_sampling_correction=False) or leaves completions "
            "out (mask_truncated_completions: a quarter of the batch, if that is more)."
        },
    )
    cost_budget: Annotated[float, SHARE] = field(
        default=0.005,
        metadata={
            "help": "Share of the training time that measuring may take: half a percent. What the fp32 head and "
            "entropy would take beyond it is saved by a random sample of each sequence's tokens (cost_min_tokens at "
            "least); the trainer's numbers cover every token. All are scored again in a window that a rule on the "
            "mismatch warns of or condemns, while breaches are remembered, and for a diagnosis. 1: always all; what "
            "the entropies alone show (a hidden top-k) is then found sooner where it is faint."
        },
    )
    cost_min_tokens: Annotated[int, at_least(1)] = field(
        default=4096,
        metadata={
            "help": "Tokens per rollout batch and rank that the sample has at least, whatever they cost: one of them "
            "then moves no mean over tokens by more than 1 / 4096 of its own size. A batch of less than twice as many "
            "is scored in full."
        },
    )
    chunk_mib: Annotated[int, at_least(1)] = field(
        default=64,
        metadata={"help": "Upper bound in MiB of the fp32 head's temporary memory (logits tile and all)."},
    )
    head_backend: str = field(
        default="auto",
        metadata={
            "help": "What computes the fp32 head. 'auto': the Triton kernel on NVIDIA GPUs from the A100's generation "
            "on, once its first numbers are found to be torch's; torch elsewhere.",
            "choices": list(HEAD_BACKENDS),
        },
    )
    bootstrap_samples: Annotated[int, at_least(2)] = field(
        default=200, metadata={"help": "Bootstrap resamples of sequences behind the honesty interval."}
    )
    halt_on_error: bool = field(
        default=False,
        metadata={
            "help": "Whether windows that could not be measured (ERROR) may halt the run by themselves. By default "
            "they keep a streak growing but a halt needs a measured breach in it."
        },
    )
    rich_every_n_windows: Annotated[int, at_least(0)] = field(
        default=10,
        metadata={
            "help": "Every how many windows the log-ratio histogram and the tables of worst and sampled tokens go to "
            "W&B and trackio, and the sample to tokens.jsonl (and at each change to WARN, BREACH or HALT). 0: never."
        },
    )
    panels: bool = field(
        default=False,
        metadata={
            "help": "Make the ready-made W&B workspace (trl-parity panels) in the run's project, when the run is "
            "online and the project has none of this version."
        },
    )
    console: str = field(
        default="short",
        metadata={
            "help": "How many of the parity/* scalars are on the line that transformers prints at each log: 'short' "
            "those looked at first, 'all'. Trackers and files get all of them.",
            "choices": ["short", "all"],
        },
    )
    worst_tokens: Annotated[int, at_least(0)] = field(default=20, metadata={"help": "Rows of the worst-token table."})
    sample_tokens: Annotated[int, at_least(0)] = field(
        default=512,
        metadata={
            "help": "Tokens drawn uniformly for scatter, positions and entropies in reports: their log-probs, neither "
            "ids nor text. 0: none."
        },
    )
    redact_text: bool = field(
        default=False,
        metadata={"help": "Keep token ids and text out of everything that is logged or written."},
    )
    parity_dir: str | None = field(
        default=None, metadata={"help": "Where metrics.jsonl goes. Default: <output_dir>/parity."}
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.engine_args is not None and not isinstance(self.engine_args, str | Mapping):
            raise ConfigError(
                f"engine_args is a {type(self.engine_args).__name__}. Expected a preset's name, a path or a mapping."
            )
        try:  # it is kept with the run
            json.dumps(self.engine_args)
        except TypeError as e:
            raise ConfigError(
                f"engine_args holds what YAML can't ({e}). Write a dtype as text: 'bfloat16'; anything else goes by "
                "trl_parity.trainers.engine_args.TRLEngineArguments."
            ) from e
        self.temperature_phases()
        self.evidence_smallest_effects()
        self.resolved_rules()  # a wrong rule fails here, before any training

    def resolved_rules(self) -> tuple[Rule, ...]:
        """The default rules with ``rules`` laid over them, each with its ``consecutive`` filled in."""
        return rules_over_defaults(self.rules, self.consecutive, -math.log10(self.evidence_alpha))

    def evidence_smallest_effects(self) -> dict[str, float]:
        """``evidence_effects`` as a mapping of those that are set."""
        effects = as_mapping(self.evidence_effects, "evidence_effects")
        refuse_unknown(effects, list(EVIDENCE_EFFECTS), "evidence_effects")
        for name, value in effects.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ConfigError(f"evidence_effects.{name} is {value!r}. Expected a number > 0.")
        return {name: float(value) for name, value in effects.items()}

    def engine_source(self) -> str | dict[str, Any] | None:
        """``engine_args`` as a name, a path or a mapping."""
        source = self.engine_args
        return as_mapping(source, "engine_args") if str(source).lstrip().startswith("{") else source

    def temperature_phases(self) -> dict[str, list[tuple[int, float]]]:
        """``temperatures`` as {"train" or "eval": [(first step, temperature), ...] in order of steps}."""
        phases: dict[str, list[tuple[int, float]]] = {}
        for key, value in as_mapping(self.temperatures, "temperatures").items():
            kind, at, step = str(key).partition("@")
            if kind not in ("train", "eval") or (at and not step.isdigit()):
                raise ConfigError(f"temperatures has the phase {key!r}. Expected 'train', 'eval' or 'train@<step>'.")
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise ConfigError(f"temperatures.{key} is {value!r}. Expected a number >= 0.")
            phases.setdefault(kind, []).append((int(step or 0), float(value)))
        return {kind: sorted(steps) for kind, steps in phases.items()}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str = "config") -> ParityConfig:
        """Build from a mapping; unknown keys raise ``ConfigError`` naming the nearest known one."""
        refuse_unknown(values, [f.name for f in fields(cls)], where)
        return cls(**values)

    @classmethod
    def of(cls, config: ParityConfig | None, overrides: Mapping[str, Any], where: str) -> ParityConfig:
        """``config`` (None: all defaults) with fields laid over it, as constructors take them."""
        if config is not None and not isinstance(config, ParityConfig):
            raise ConfigError(
                f"config is a {type(config).__name__}. Expected a ParityConfig; read a file with "
                "ParityConfig.from_yaml(path)."
            )
        refuse_unknown(overrides, [f.name for f in fields(cls)], where)
        return replace(config or cls(), **overrides)

    @classmethod
    def from_yaml(cls, path: str | Path) -> ParityConfig:
        """Read a YAML mapping of field names. Unknown keys, wrong values and broken YAML raise ``ConfigError``."""
        return cls.from_mapping(read_mapping(path, "every_n_steps: 1"), where=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain values of all fields, as JSON and YAML take them; ``***`` for keys, tokens and passwords."""
        mappings = {
            name: as_mapping(getattr(self, name), name) or None
            for name in ("rules", "temperatures", "evidence_effects")
        }
        kept: dict[str, Any] = without_credentials(asdict(self) | mappings)
        return kept
