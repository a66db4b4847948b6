"""Every scalar trl-parity reports, with its formula: the one list that rules, logs, JSONL and docs share.

Notation: mean over the window's compared tokens of all ranks (completion tokens the engine generated, both
log-probs finite) unless said otherwise; Δ = trainer log-prob (fp32 head) - rollout log-prob of the sampled token, in
nats; w = e^Δ (Δ clamped to 300); per sequence S = the sum of its Δ. Trackers show each as ``parity/<name>``.
"""

from __future__ import annotations

LAG_BUCKETS = ("0", "1", "2", "3_4", "5_up")  # optimizer steps between the weights that sampled and the trainer's

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
    "ratio/clipped": "mean(min(w, 2)); of a sample of tokens (cost/coverage below 1) by the trainer's own head",
    "ratio/clipped_square": "mean((min(w, 2) - 1)²); the same",
    "copies": "the largest number of equal rows in a batch (the same completion of the same prompt), or over all "
    "batches and ranks the mean one, where that is more",
    "se/kl_k1": "standard error of kl_k1, over independent sequences (equal ones are one)",
    "se/logp_abs_diff/mean": "the same of logp_abs_diff/mean",
    "se/kl_k3": "the same of kl_k3",
    "se/entropy/drift": "the same of entropy/drift",
    "ratio/out_of_band": "share of tokens with w outside [0.9, 1.1]",
    "ratio/extreme": "share of tokens with |Δ| above 4.07 nats, w outside [1/58, 58] (from the histogram)",
    "ess": "(Σw)² / (N Σw²): effective sample size of the tokens, as a share of N",
    "chi2": "mean((w - 1)²); estimate of the chi-squared divergence of trainer from rollout, never negative",
    "seq/log_ratio_mean": "mean of S over sequences",
    "seq/log_ratio_max": "largest |S|",
    "seq/ess": "(Σe^S)² / (N Σe^2S) over sequences: the same for S and S + any constant",
    "seq/khat": "PSIS k-hat of the sequences' e^S, from 25 sequences on: the shape of its largest min(N / 5, 3 √N)",
    "seq/khat_limit": "min(1 - 1 / log10 N, 0.7), N the sequences: weights of a larger k-hat are not to be relied on",
    "seq/bias_gap": "honesty_gap x mean tokens of a sequence: nats a sequence is off, beyond chance and honest noise",
    "concentration/sequences": "smallest share of the sequences that carries 90 % of Σ k3",
    "concentration/prompts": "the same of prompts, each in a batch of one rank",
    "concentration/dispersion": "Σ (Σ k3 of a sequence)² / its mean, had the same tokens been dealt out to the "
    "sequences at random: 1 where drift is spread evenly",
    "last_token/logp_abs_diff/mean": "mean |Δ| of the last token of each sequence",
    "last_token/disagreement": "share of last tokens with |Δ| > 1",
    "correction/zeroed": "share of sequences (token modes: of a sequence's tokens, mean over sequences) whose loss "
    "TRL's correction multiplies by 0",
    "correction/lost": "1 - mean(min(u, 1)), u the weight that the correction gave a sequence (token modes: the mean "
    "of its tokens)",
    "correction/weight_median": "median of u (from a histogram, bins 21 % wide)",
    "correction/ess": "(Σu)² / (N Σu²) over sequences; 0 where all are 0",
    "correction/long/zeroed": "correction/zeroed of sequences longer than their batch's mean",
    "correction/long/lost": "correction/lost of the same",
    "entropy/trainer": "mean exact entropy of the trainer's fp32-head law, nats",
    "entropy/rollout": "mean of -rollout log-prob: Monte Carlo entropy of the law sampled from, nats",
    "entropy/drift": "trainer's exact entropy (of the law that is judged) - entropy/rollout",
    "honesty": "mean(w): 1 if the engine reports the true log-prob of the law it sampled from, and that law rules no "
    "token out",
    "honesty_low": "lower end of the 99 % interval of honesty (sequences are independent, equal ones count once)",
    "honesty_high": "upper end of the 99 % interval of honesty",
    "honesty_gap": "distance of that interval from 1; 0 where it contains 1",
    "entropy/drift_low": "lower end of its 99 % interval",
    "entropy/drift_high": "upper end of its 99 % interval",
    "entropy/drift_gap": "distance of that interval from 0; 0 where it contains 0",
    "kl_over_entropy": "kl_k3 / entropy/trainer: drift against the uncertainty it can show in",
    "entropy/nonfinite_rate": "share of tokens with finite log-probs whose trainer entropy is NaN or infinite; all "
    "entropies of the trainer are NaN where there is one",
    "entropy/trend": "slope of entropy/trainer over the last 20 windows (least squares), nats per window",
    "entropy/relative": "entropy/trainer / its median over the run's first 5 windows",
    "truncation/kept_mass": "mean probability the trainer gives to the support the engine sampled from",
    "truncation/log_bias": "mean log kept mass: what truncation alone does to Δ",
    "truncation/out_of_support": "share of sampled tokens outside the trainer's own kept set",
    "own_head/kl_k3": "kl_k3 with the trainer's own head and no replayed processing: what the run really has",
    "own_head/logp_abs_diff/mean": "mean |Δ| with the trainer's own head",
    "replayed/kl_k3": "kl_k3 with the fp32 head and the engine's truncation and penalties replayed on it: what is "
    "left of the drift beside them",
    "replayed/logp_abs_diff/mean": "mean |Δ| of the same",
    "confident_disagreement": "share of tokens the engine gave >= 50 % and the trainer > 2 nats less",
    "trimmed/kl_k3": "kl_k3 without the token of largest |Δ|; the rest of the 0.1 % largest count 8 at most",
    "trimmed/logp_abs_diff/mean": "the same for logp_abs_diff/mean, 8 nats at most",
    "trimmed/ess": "the same for ess, w at most 8",
    "trimmed/logp_abs_diff/p99": "logp_abs_diff/p99 without the 0.1 % of tokens (at least one) of largest |Δ|",
    "trimmed/ratio/out_of_band": "the same for ratio/out_of_band",
    "trimmed/ratio/extreme": "ratio/extreme without one of its tokens",
    "trimmed/last_token/disagreement": "last_token/disagreement without one of its sequences",
    "trimmed/correction/zeroed": "correction/zeroed without one of the zeroed sequences",
    "trimmed/correction/lost": "correction/lost without the sequence that lost most",
    "trimmed/correction/long/zeroed": "the same of correction/long/zeroed",
    "trimmed/correction/long/lost": "the same of correction/long/lost",
    "trimmed/confident_disagreement": "confident_disagreement without one of its tokens",
    "trimmed/nonfinite_rate": "nonfinite_rate without one of its tokens",
    "floor/kl_k3": "95 % upper bound of trimmed/kl_k3 of one side against itself: the largest of the floor's sources, "
    "the engine's at most 4 x rounding's",
    "floor/logp_abs_diff/mean": "the same for logp_abs_diff/mean (at most 2 x rounding's)",
    "floor/logp_abs_diff/p99": "the same for logp_abs_diff/p99 (at most 2 x rounding's)",
    "floor/ratio/out_of_band": "the same for ratio/out_of_band",
    "floor/ratio/extreme": "the same for ratio/extreme, all tokens counted",
    "floor/ess": "the same for ess: the lower bound, and the smallest",
    "floor_upper/kl_k3": "99.9 % upper bound, as floor/kl_k3 is of 95 %",
    "floor_upper/logp_abs_diff/mean": "the same of logp_abs_diff/mean",
    "floor/engine_excess": "95 % lower bound of the engine's mean |Δ| against itself - 3 x rounding's upper bound, at "
    "least 0",
    "floor/same_experts/kl_k3": "of a mixture of experts: floor/kl_k3 by rounding alone, with each token held to the "
    "experts it takes without rounding; what is missing to floor/kl_k3 is flips of routers",
    "floor/same_experts/logp_abs_diff/mean": "the same of logp_abs_diff/mean",
    "floor/router_flips": "share of the routers' choices (a token in a layer, padding too) that rounding changes",
    "floor/age": "windows since the floor was measured",
    "floor/sequences": "sequences the floor is measured on, of all measurements that agree",
    "excess/kl_k3": "trimmed/kl_k3 - floor/kl_k3",
    "excess/logp_abs_diff/mean": "trimmed - floor of logp_abs_diff/mean",
    "excess/logp_abs_diff/p99": "trimmed - floor of logp_abs_diff/p99",
    "excess/ratio/out_of_band": "trimmed - floor of ratio/out_of_band",
    "excess/ratio/extreme": "trimmed - floor of ratio/extreme",
    "excess/ess": "floor/ess - trimmed/ess: effective sample size lost beyond noise",
    "limit/kl_k3": "what the rule on kl_k3 lets its excess be: max(limit, (k - 1) x floor), at most ceiling - floor",
    "limit/logp_abs_diff/mean": "the same for logp_abs_diff/mean",
    "temperature/trainer": "what the loss divides logits by",
    "temperature/engine": "what the requests of the window's last batch asked the engine for",
    "temperature/gap": "largest |difference| between engine, trainer and the temperature set for this phase",
    "engine/prefix_cache_hit_rate": "share of the rollouts' prompt tokens read from the prefix cache; none where off",
    "engine/kv_cache_usage": "largest share of the KV cache's blocks that running rollouts held (a server: sampled)",
    "reward/mean": "mean reward of the window's batches",
    "reward/effect_size": "Cliff's delta of the run's last rewards against the stored baseline, -1 to 1",
    "reward/ks": "two-sample Kolmogorov-Smirnov distance of the same",
    "reward/p_value": "its p-value",
    "reward/parted": "1 where the two differ by more than chance and by more than reward_min_effect, else 0",
    "completions/equal_pairs": "of the pairs of completions of one prompt, the share that are equal, token by token "
    "(in a batch of one rank; of groups spread over ranks by the number of rows a draw has over all)",
    "completions/duplicates": "the same without 10 x the pairs that the completions' own probabilities make equal by "
    "chance, and without 3; at least 0",
    "completions/probability": "mean probability of a whole completion, as the engine reports it: 1 of a policy that "
    "has one answer",
    "completions/stopped_but_masked": "of the completions that a colocated engine ended by itself, the share that "
    "mask_truncated_completions takes out of the loss",
    "reference/base_moved": "mean |x - x at the first window| / mean |x| of a sample of the frozen weights",
    "teacher/logprob": "mean log-prob of the completions' tokens by the teacher's server",
    "teacher/temperature_gap": "|temperature that the teacher's server was asked for - that of its answers|",
    "teacher/mass": "mean sum of the probabilities that the server gives for a place: of log-probs at most 1",
    "teacher/mass_max": "the largest such sum",
    "teacher/missing": "share of the completions' tokens the server gives no finite number for",
    "teacher/foreign": "share of the ids it answers with that are beyond the student's vocabulary",
    "reference/merged": "share of an adapter's layers that are merged into the base when a window ends",
    "reference/start_kl_k3": "k3 of the reference against the policy before the first update, mean over tokens",
    "cost/floor_share": "host seconds spent on the noise floor / wall seconds, since the run began",
    "nonfinite_rate": "share of completion tokens whose rollout or trainer log-prob is NaN, None or infinite",
    "policy_drift/kl_k3": "kl_k3 of the training policy at each update against the policy that generated the batch",
    "lag": "mean optimizer steps between the engine's weights and the trainer's, at generation or (async) at the loss",
    **{
        f"lag/{n}/kl_k3": f"kl_k3 of trained tokens at lag {n} (async); beyond lag 0 staleness is in it"
        for n in LAG_BUCKETS
    },
    **{
        f"lag/{n}/tokens": f"trained tokens at lag {n} (async); rules see those at lag 0, and the probe's"
        for n in LAG_BUCKETS
    },
    "lag/probe_tokens": "tokens sampled right after a weight sync only to be compared (async); at lag 0, in no lag/0",
    "lag/in_flight_share": "share of trained tokens in sequences queued after the next sync began (async)",
    "lag/nonfinite_rate": "nonfinite_rate of the tokens at lag > 0",
    "cost/seconds": "host seconds spent in trl-parity per rollout batch, mean over ranks; of the fp32 head on a GPU "
    "those of the device",
    "cost/share": "the same seconds / wall seconds, since the window before; what has an account of "
    "its own (floor, diagnosis, incident) is not in it",
    "cost/coverage": "share of the compared tokens that the fp32 head scored (cost_budget); below 1, statistics are "
    "estimates from a sample of each sequence's tokens: unbiased where they are means over tokens",
    "cost/diagnosis_seconds": "host seconds of diagnoses since the window before was judged, mean over ranks",
    "cost/incident_seconds": "the same of incidents left behind, their pictures included",
    "effective_sequences": "(Σ n)² / Σ n², n the tokens of independent sequences: how many of one length they are",
    "replica/kl_k3": "lower bound of a rank's own kl_k3, without its largest token, that it reached in each of its "
    "last `consecutive` windows, or now and in too many of its last 22 for chance; the largest over ranks",
    "replica/logp_abs_diff/mean": "the same of logp_abs_diff/mean",
    "replica/rank": "the rank of the largest replica/logp_abs_diff/mean",
    "replica/windows": "in how many of its last windows that rank reached it, where it is sick now and then",
    "evidence/honesty": "log10 of the evidence of a run's windows that the mean ratio is not 1; 4 decides",
    "evidence/drift": "the same that mean Δ, mean |Δ| or k3 are above what the noise floor allows",
    "evidence/change": "the same that mean |Δ| or k3 are above what they were in the run's past",
    "evidence/entropy": "the same that sampled tokens are more or less surprising than the trainer's law says",
    "evidence/onset": "step since when the strongest of these rises",
    "breaker/status": "0 OK, 1 WARN, 2 BREACH, 3 HALT, -1 NO_DATA, -2 ERROR, -3 CALIBRATING",
    "breaker/streak": "breached windows in a row",
    "breaker/level": "breached windows remembered: each adds 1, a healthy one takes 1 / breach_memory; halts above "
    "consecutive - 1",
    "breaker/skipped": "updates dropped since the row before (action=skip_update)",
    "breaker/skipped_total": "updates dropped in all",
    "breaker/windows": "windows that this row of the trackers holds, merged as one: above 1 where logging_steps > "
    "every_n_steps; not in metrics.jsonl",
}

# statistics with a noise floor; ``ess`` falls with noise, the others rise
FLOORED = ("kl_k3", "logp_abs_diff/mean", "logp_abs_diff/p99", "ratio/out_of_band", "ratio/extreme", "ess")
