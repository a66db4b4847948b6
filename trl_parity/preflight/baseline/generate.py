"""Make a reference baseline: a transformers model answers prompts, greedily and with fixed seeds, shard by shard.

Bytes depend on what the manifest lists under ``settings`` and ``versions``, on the kind of machine, and on nothing
else: a shard is a range of prompts, its batches are made of that shard alone, and what a prompt samples comes from
(seed, index of the prompt). So several processes write the files that one would, and a run that was killed goes on
with the next shard. Batch and shard size belong to the settings: another batch shape rounds otherwise.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...errors import ConfigError, DataError
from ...files import write_atomic
from ...scoring.head import logits_chunk
from ...scoring.model_head import backbone_of, causal_lm, materialized_head
from ..prompts.cases import Prompt
from .baseline import MANIFEST, SCHEMA_VERSION, Baseline, file_sha256, open_baseline, read_manifest, versions
from .settings import Generation
from .sources import Source

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["answers", "make_baseline"]


def make_baseline(
    directory: str | Path,
    model: torch.nn.Module,
    source: Source,
    generation: Generation,
    identity: dict[str, Any],
    *,
    name: str = "",
    state: Any = None,
    progress: Callable[[int, int, int, int], None] = lambda *numbers: None,
) -> Baseline | None:
    """Write the data set, or what is missing of it, and open it.

    Args:
        directory: Made if need be. What is there already must come from the same settings and versions.
        model: On its device, in its dtype; put into evaluation mode.
        source: The prompts.
        generation: How they are answered.
        identity: What else the data depend on, for ``settings``: hashes of model and tokenizer, dtype, device.
        name: Of the model, for people.
        state: accelerate's ``PartialState`` where there are several processes; shards are dealt out to them.
        progress: Called after each batch with shards done by all processes, shards in all, and this process's answers
            and tokens so far.

    Returns:
        The checked baseline on the main process, None on the others.

    Raises:
        ConfigError: the directory holds another baseline, or can't be written.
    """
    directory = Path(directory)
    rank, world = (0, 1) if state is None else (state.process_index, state.num_processes)
    settings = identity | {
        "generation": asdict(generation) | {"seeds": list(generation.seeds)},
        "prompts": source.describe(),
    }
    manifest: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION, "complete": False, "model": name, "settings": settings,
        "versions": versions(), "num_prompts": source.count, "num_rows": 0, "shards": [],
    }  # fmt: skip
    fingerprint = hashlib.sha256(_dumped([settings, manifest["versions"]]).encode()).hexdigest()
    before = _earlier(directory, manifest)
    if rank == 0:
        if before is None:
            write_atomic(directory / MANIFEST, _dumped(manifest))
        for left in directory.glob(".shard-*.tmp"):  # by a kill
            left.unlink()
    known = {shard["file"]: shard["sha256"] for shard in (before or manifest)["shards"]}
    if state is not None:
        state.wait_for_everyone()
    total = math.ceil(source.count / generation.shard_size)
    done = [0, 0]

    def told(answers: int, tokens: int) -> None:
        done[0] += answers
        done[1] += tokens
        progress(sum(1 for _ in directory.glob("shard-*.parquet")), total, *done)

    def wanted(number: int) -> bool:
        if number % world != rank:
            return False
        path = directory / _shard_name(number)
        if path.name in known:
            return not path.is_file() or file_sha256(path) != known[path.name]
        rows = len(generation.modes) * min(generation.shard_size, source.count - number * generation.shard_size)
        return not _finished(path, fingerprint, rows)

    for number, prompts in source.shards(generation.shard_size, wanted):
        rows = answers(model.eval(), prompts, number * generation.shard_size, generation, told)
        _write_shard(directory / _shard_name(number), rows, fingerprint)
        told(0, 0)
    if state is not None:
        state.wait_for_everyone()
    if rank != 0:
        return None
    for number in range(total):
        path = directory / _shard_name(number)
        entry = {"file": path.name, "sha256": file_sha256(path), "bytes": path.stat().st_size, "rows": _num_rows(path)}
        manifest["shards"].append(entry)
    manifest |= {"num_rows": sum(shard["rows"] for shard in manifest["shards"]), "complete": True}
    write_atomic(directory / MANIFEST, _dumped(manifest))
    return open_baseline(directory)


def _dumped(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def _earlier(directory: Path, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest that is there, if it is of the same making; None: an empty place. Raises ConfigError."""
    before = read_manifest(directory)
    if before is None:
        if next(directory.glob("shard-*"), None) is not None:
            raise ConfigError(f"{directory} holds shards without a {MANIFEST}. Expected an empty or new directory.")
        return None
    differing = [
        name
        for part in ("settings", "versions")
        for name, value in sorted(_flat(before[part], manifest[part]).items())
        if value[0] != value[1]
    ]
    if differing:
        values = _flat(before["settings"] | before["versions"], manifest["settings"] | manifest["versions"])
        seen = "; ".join(f"{name} was {values[name][0]!r}, is {values[name][1]!r}" for name in differing[:4])
        more = f" (and {len(differing) - 4} more)" if len(differing) > 4 else ""
        raise ConfigError(
            f"{directory} holds a baseline of other settings: {seen}{more}. Expected the same, to go on with it. "
            "Choose another directory, or delete this one."
        )
    return before


def _flat(before: Any, now: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """(before, now) by dotted name."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return {prefix: (before, now)}
    out: dict[str, tuple[Any, Any]] = {}
    for name in sorted(before.keys() | now.keys()):
        out |= _flat(before.get(name), now.get(name), f"{prefix}.{name}" if prefix else name)
    return out


# ---- shards ---------------------------------------------------------------------------------------------------------


def _shard_name(number: int) -> str:
    return f"shard-{number:05}.parquet"


def _num_rows(path: Path) -> int:
    import pyarrow.parquet as pq

    return int(pq.read_metadata(path).num_rows)


def _finished(path: Path, fingerprint: str, rows: int) -> bool:
    """Whether a run of the same settings wrote this shard, and every page of it has its checksum."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        return False
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            metadata = file.schema_arrow.metadata or {}
            whole = sum(len(batch) for batch in file.iter_batches()) == rows
            return whole and metadata.get(b"trl_parity") == fingerprint.encode()
    except (pa.ArrowException, OSError):
        return False


def _schema(fingerprint: str) -> pa.Schema:
    import pyarrow as pa

    ids, numbers = pa.list_(pa.int32()), pa.list_(pa.float32())
    return pa.schema(
        [
            ("index", pa.int64()), ("kind", pa.string()), ("greedy", pa.bool_()), ("seed", pa.int64()),
            ("prompt_ids", ids), ("token_ids", ids), ("logprobs", numbers), ("topk_ids", pa.list_(ids)),
            ("topk_logprobs", pa.list_(numbers)), ("entropy", numbers),
        ],
        metadata={"trl_parity": fingerprint},
    )  # fmt: skip


def _write_shard(path: Path, rows: Sequence[dict[str, Any]], fingerprint: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(list(rows), schema=_schema(fingerprint))
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    write_atomic(path, buffer.getvalue().to_pybytes())


# ---- answers --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def answers(
    model: Any,
    prompts: Sequence[Prompt],
    first_index: int,
    generation: Generation,
    told: Callable[[int, int], None] = lambda answers, tokens: None,
) -> list[dict[str, Any]]:
    """The rows of one shard, in the order of prompts and modes; answered in batches of like length."""
    asked = [(place, mode) for place in range(len(prompts)) for mode in generation.modes]
    by_length = sorted(range(len(asked)), key=lambda i: (len(prompts[asked[i][0]].ids), i))
    rows: list[dict[str, Any]] = [{} for _ in asked]
    for start in range(0, len(asked), generation.batch_size):
        batch = by_length[start : start + generation.batch_size]
        ids = [prompts[asked[i][0]].ids for i in batch]
        draws = [_draws(asked[i][1], first_index + asked[i][0], generation.max_new_tokens) for i in batch]
        tokens = 0
        for i, answer in zip(batch, _decode(model, ids, draws, generation), strict=True):
            place, mode = asked[i]
            prompt = prompts[place]
            if not all(map(math.isfinite, answer["logprobs"] + answer["entropy"])):
                raise DataError(
                    f"the model's log-probs for prompt {first_index + place} are not finite. Expected a model that "
                    "computes finite ones in this dtype: check its weights, or use --dtype float32."
                )
            rows[i] = {"index": first_index + place, "kind": prompt.kind, "greedy": mode is None, "seed": mode}
            rows[i] |= {"prompt_ids": prompt.ids} | answer
            tokens += len(answer["token_ids"])
        told(len(batch), tokens)
    return rows


def _draws(seed: int | None, index: int, count: int) -> torch.Tensor | None:
    """Uniform numbers of (seed, prompt index) alone; None for greedy."""
    import numpy as np

    if seed is None:
        return None
    return torch.from_numpy(np.random.Generator(np.random.PCG64([seed, index])).random(count))


def _decode(
    model: Any, prompts: Sequence[tuple[int, ...]], draws: Sequence[torch.Tensor | None], generation: Generation
) -> list[dict[str, Any]]:
    """Answers of one batch, with a KV cache. Only one place's logits of the whole vocabulary exist at a time."""
    lm = causal_lm(model)
    device = lm.get_input_embeddings().weight.device
    ends = _end_tokens(model)
    width = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
    attention = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    positions = (attention.cumsum(-1) - 1).clamp_min(0)
    sampled = [row for row, drawn in enumerate(draws) if drawn is not None]
    uniform = torch.stack([drawn for drawn in draws if drawn is not None]) if sampled else None
    parts: list[list[torch.Tensor]] = []
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    past = None
    with materialized_head(model, 1.0) as head:
        for place in range(generation.max_new_tokens):
            out = backbone_of(lm)(
                input_ids=input_ids, attention_mask=attention, position_ids=positions,
                past_key_values=past, use_cache=True,
            )  # fmt: skip
            past = out.past_key_values
            logits = logits_chunk(out.last_hidden_state[:, -1], head)
            logprobs = torch.log_softmax(logits, dim=-1)
            chosen = logits.argmax(-1)
            if uniform is not None:
                chosen[sampled] = _inverse_cdf(logits[sampled] / generation.temperature, uniform[:, place]).to(device)
            top = logprobs.topk(min(generation.top_k, logprobs.shape[1]), dim=-1)
            entropy = -(logprobs.exp() * logprobs).nansum(-1)
            taken = logprobs.gather(1, chosen[:, None])[:, 0]
            parts.append([t.cpu() for t in (chosen, taken, top.indices, top.values, entropy)])
            ended |= torch.isin(chosen, ends)
            if ended.all():
                break
            input_ids, positions = chosen[:, None], positions[:, -1:] + 1
            attention = torch.cat([attention, attention.new_ones(len(prompts), 1)], dim=1)
    tokens, logprob, top_ids, top_logprobs, entropies = (torch.stack(part, dim=1) for part in zip(*parts, strict=True))
    out_rows = []
    for row in range(len(prompts)):
        hits = torch.isin(tokens[row], ends.cpu()).nonzero()
        n = int(hits[0]) + 1 if len(hits) else tokens.shape[1]  # the end token is part of the answer
        out_rows.append(
            {
                "token_ids": tokens[row, :n].tolist(), "logprobs": logprob[row, :n].tolist(),
                "topk_ids": top_ids[row, :n].tolist(), "topk_logprobs": top_logprobs[row, :n].tolist(),
                "entropy": entropies[row, :n].tolist(),
            }
        )  # fmt: skip
    return out_rows


def _inverse_cdf(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first token whose cumulative probability exceeds the number drawn. On the CPU: CUDA's cumsum is not
    deterministic."""
    mass = torch.softmax(logits.cpu().double(), dim=-1).cumsum(-1)
    at = torch.searchsorted(mass, (uniform * mass[:, -1])[:, None], right=True)[:, 0]
    return at.clamp_max(mass.shape[1] - 1)


def _end_tokens(model: Any) -> torch.Tensor:
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = model.config.get_text_config().eos_token_id if ends is None else ends
    device = causal_lm(model).get_input_embeddings().weight.device
    return torch.tensor([] if ends is None else ends, dtype=torch.long, device=device).reshape(-1)
