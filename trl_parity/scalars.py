"""Every scalar trl-parity reports, with its formula: the one list that rules, logs, JSONL and README share.

Notation: mean over the window's compared tokens of all ranks (completion tokens the engine generated, both
log-probs finite) unless said otherwise; Δ = trainer log-prob (fp32 head) - rollout log-prob of the sampled token, in
nats; w = e^Δ; per sequence S = the sum of its Δ. Trackers show each as ``parity/<name>``.
"""

from __future__ import annotations

SCALARS: dict[str, str] = {
    "kl_k1": "mean(-Δ); unbiased estimate of KL(rollout‖trainer), can be negative",
    "kl_k3": "mean(e^Δ - 1 - Δ); estimate of KL(rollout‖trainer), never negative; equals the KL where honesty is 1",
    "logp_abs_diff/mean": "mean |Δ|",
    "logp_abs_diff/p99": "99th percentile of |Δ| (from a histogram, bins 3.7 % wide)",
    "logp_abs_diff/max": "largest |Δ|",
    "ratio/mean": "mean(w), raw: neither clipped nor masked",
    "ratio/p01": "1st percentile of w (from the histogram of Δ)",
    "ratio/p50": "median of w (from the histogram of Δ)",
    "ratio/p99": "99th percentile of w (from the histogram of Δ)",
    "ratio/max": "largest w",
    "ratio/out_of_band": "share of tokens with w outside [0.9, 1.1]",
    "ess": "(Σw)² / (N Σw²): effective sample size of the tokens, as a share of N",
    "chi2": "mean(w²) - 1; estimate of the chi-squared divergence of trainer from rollout",
    "seq/log_ratio_mean": "mean of S over sequences",
    "seq/log_ratio_max": "largest |S|",
    "seq/ess": "(Σe^S)² / (N Σe^2S) over sequences, S clamped to 300",
    "entropy/trainer": "mean exact entropy of the trainer's fp32-head law, nats",
    "entropy/rollout": "mean of -rollout log-prob: Monte Carlo entropy of the law sampled from, nats",
    "entropy/drift": "entropy/trainer - entropy/rollout",
    "honesty": "mean(w): 1 if the engine reports the true log-prob of the law it sampled from",
    "honesty_low": "lower end of the 99 % interval of honesty (Poisson bootstrap over sequences)",
    "honesty_high": "upper end of the 99 % interval of honesty",
    "honesty_gap": "distance of that interval from 1; 0 where it contains 1",
    "truncation/kept_mass": "mean probability the trainer gives to the support the engine sampled from",
    "truncation/log_bias": "mean log kept mass: what truncation alone does to Δ",
    "truncation/out_of_support": "share of sampled tokens outside the trainer's own kept set",
    "own_head/kl_k3": "kl_k3 with the trainer's own head and no replayed processing: what the run really has",
    "own_head/logp_abs_diff/mean": "mean |Δ| with the trainer's own head",
    "confident_disagreement": "share of tokens the engine gave >= 50 % and the trainer > 2 nats less",
    "nonfinite_rate": "share of completion tokens whose rollout or trainer log-prob is NaN, None or infinite",
    "policy_drift/kl_k3": "kl_k3 of the training policy at each update against the policy that generated the batch",
    "lag": "mean optimizer steps between the weights the engine held and the trainer's at generation",
    "cost/seconds": "host seconds spent in trl-parity per rollout batch, mean over ranks",
    "cost/share": "host seconds spent in trl-parity / wall seconds, since the window before",
    "breaker/status": "0 OK, 1 WARN, 2 BREACH, 3 HALT, -1 NO_DATA, -2 ERROR, -3 CALIBRATING",
    "breaker/streak": "breached windows in a row",
}
