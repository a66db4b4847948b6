"""A batch to diagnose: the trainer's side is a tiny model on the CPU, the engine's another, behind the protocol."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from trl_parity.diagnosis.counterfactual import DiagnosedBatch
from trl_parity.engine.base import Capability
from trl_parity.records import RolloutBatch, SamplingSettings, ScoredBatch
from trl_parity.trainers.capture import Capture

B, P, C, VOCAB = 6, 5, 8, 48


def logprobs_of(model, ids):
    """(len, V) of one sequence's next tokens."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)


class Served:
    """An engine that serves a model of its own; it can be asked to score and to answer, as a server can."""

    capabilities = frozenset({Capability.RESCORE})
    dtype = head_dtype = torch.float32
    caches_prefixes = True

    def __init__(self, model, max_model_len=64, kv_cache_dtype="auto"):
        self.served, self.max_model_len, self.kv_cache_dtype, self.calls = model, max_model_len, kv_cache_dtype, []

    def settings(self):
        return {
            "kv_cache_dtype": self.kv_cache_dtype,
            "logprobs_mode": "processed_logprobs",
            "quantization": None,
        }

    def rescore(self, sequences):
        self.calls.append("rescore")
        return [logprobs_of(self.served, s)[:-1].gather(1, torch.tensor(s[1:])[:, None])[:, 0] for s in sequences]

    def next_token(self, contexts, targets, temperature, *, cached):
        self.calls.append("cached" if cached else "anew")
        answers = [logprobs_of(self.served, c)[-1, t] for c, t in zip(contexts, targets, strict=True)]
        return torch.stack(answers), torch.full((len(answers),), int(cached))


class TinyCapture(Capture):
    step = 0

    def rollout(self): ...
    def rewards(self): ...
    def log(self, values): ...

    def run_policy(self, ids, attention, keep, batch_size=None):
        with torch.no_grad():
            for one, mask in zip(
                ids.split(batch_size or len(ids)), attention.split(batch_size or len(ids)), strict=True
            ):
                self.policy(input_ids=one, attention_mask=mask)


def tiny_models():
    """A policy, and what it was before noise was laid over it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    policy = LlamaForCausalLM(config).eval()
    older = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in older.parameters():
            parameter += 0.03 * torch.randn_like(parameter)
    return policy, older


def batch_of(models, engine=True, began_healthy=True, own=False, answers=None, trained=None, **served):
    """``own``: the engine is healthy. ``trained``: the policy (served now), what sampled, the optimizer."""
    policy, older, optimizer = trained or (models[0], models[0] if own else models[1], None)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(0, VOCAB, (B, P), generator=generator)
    ids = prompts.tolist()
    reported = torch.zeros(B, C)
    for i, sequence in enumerate(ids):
        for t in range(C):
            law = logprobs_of(older, sequence)[-1]
            token = int(law.exp().multinomial(1, generator=generator))
            reported[i, t] = law[token]
            sequence.append(token)
    completions = torch.tensor(ids)[:, P:]
    if answers is not None:
        completions, reported = answers
        ids = torch.cat([prompts, completions], dim=1).tolist()
    trainer = torch.stack(
        [logprobs_of(policy, s)[P - 1 : -1].gather(1, torch.tensor(s[P:])[:, None])[:, 0] for s in ids]
    )
    mask = torch.ones(B, C, dtype=torch.bool)
    rollout = RolloutBatch(
        prompt_ids=prompts, prompt_mask=torch.ones(B, P, dtype=torch.bool), completion_ids=completions,
        completion_mask=mask, engine_mask=mask, rollout_logprobs=reported, own_logprobs=None,
        sampling=SamplingSettings(), trainer_temperature=1.0, step=0, sync_step=0, training=True,
        last_in_step=True,
    )  # fmt: skip
    scored = ScoredBatch(
        mask=mask, rollout_logprobs=reported, trainer_logprobs=trainer, own_logprobs=trainer, entropy=None
    )
    run = SimpleNamespace(accelerator=Accelerator(cpu=True), model=policy, vllm_generation=object())
    run.optimizer = optimizer
    server = Served(policy if trained else older, **served) if engine else None
    return DiagnosedBatch.of(
        TinyCapture(run, None, True), rollout, scored, server,
        token_budget=10**6, replayed=False, floor=1e-6, began_healthy=began_healthy,
    )  # fmt: skip
