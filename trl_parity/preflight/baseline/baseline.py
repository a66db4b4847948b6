"""A reference data set on disk: what a model of known weights answers, token by token, and who made it with what.

    baseline = open_baseline("baselines/qwen3", model="Qwen/Qwen3-0.6B")
    for row in baseline.rows():
        row["prompt_ids"], row["token_ids"], row["logprobs"]

The folder holds ``shard-00000.parquet`` and so on, and ``manifest.json``, which names the model, tokenizer, settings
and versions and has the SHA-256 of each shard. ``open_baseline`` reads every shard once and refuses by name what
was changed, is cut off or missing, was made by a newer trl-parity, or belongs to another model, tokenizer or stack.
``trl_parity.preflight.baseline.generate`` makes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConfigError, DataError
from ...files import open_regular, read_versioned, require_kinds

__all__ = ["Baseline", "model_sha256", "open_baseline", "tokenizer_sha256"]

SCHEMA_VERSION = 1

MANIFEST = "manifest.json"

_MAKE = "Make it with trl-parity baseline"

_REMEDY = "make it again with trl-parity baseline, or copy the whole folder anew"


@dataclass(frozen=True, slots=True)
class Baseline:
    """A checked reference data set. ``manifest`` is what ``manifest.json`` says."""

    directory: Path
    manifest: Mapping[str, Any]

    def __len__(self) -> int:
        """Rows: one for each prompt and mode."""
        return int(self.manifest["num_rows"])

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows one after the other, in the order of prompts; a few are held at a time.

        ``index`` of the prompt and its ``kind``; ``greedy``, and ``seed`` (None where greedy); ``prompt_ids``;
        ``token_ids`` generated, T of them; ``logprobs`` (T), ``topk_ids`` and ``topk_logprobs`` (T x k, falling) and
        ``entropy`` (T): nats, of the model's law at temperature 1, whatever temperature was sampled at.
        """
        import pyarrow.parquet as pq

        for shard in self.manifest["shards"]:
            path = self.directory / shard["file"]
            with open_regular(path, within=True) as raw, pq.ParquetFile(raw) as file:
                for batch in file.iter_batches(batch_size=64):
                    yield from batch.to_pylist()


def open_baseline(directory: str | Path, model: str | Path | None = None, tokenizer: Any = None) -> Baseline:
    """Open a data set and check it.

    Args:
        directory: Where ``trl-parity baseline`` wrote it.
        model: Folder or hub name of the model it has to belong to.
        tokenizer: The tokenizer it has to belong to: an object, a folder or a hub name.

    Raises:
        DataError: it is corrupt: a manifest that can't be read, a shard missing, cut off or changed.
        ConfigError: it is no baseline, unfinished, or foreign: of another model or tokenizer, or of a version of
            trl-parity, torch or transformers that may mean something else by the same numbers.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if manifest is None:
        raise ConfigError(f"{directory} holds no {MANIFEST}. Expected a reference baseline. {_MAKE}.")
    if not manifest["complete"]:
        raise ConfigError(
            f"the baseline in {directory} is unfinished. Run the command that began it again: it goes on."
        )
    _check_versions(directory, manifest["versions"])
    if model is not None:
        _check_hash(directory, "model", str(model), model_sha256(model), manifest)
    if tokenizer is not None:
        name = tokenizer if isinstance(tokenizer, (str, Path)) else getattr(tokenizer, "name_or_path", "the given one")
        _check_hash(directory, "tokenizer", str(name), tokenizer_sha256(tokenizer), manifest)
    for shard in manifest["shards"]:
        path = directory / shard["file"]
        if not path.is_file():
            raise DataError(f"{path} is missing; {MANIFEST} lists it. {_MAKE} again, or copy the whole folder.")
        try:
            seen = file_sha256(path, within=True)
        except OSError as e:
            raise DataError(f"{path} can't be read: {e.strerror}. {_MAKE} again, or copy the whole folder.") from e
        if seen != shard["sha256"]:
            raise DataError(
                f"{path} is corrupt: its SHA-256 is {seen[:12]}…, {MANIFEST} says {shard['sha256'][:12]}… "
                f"({path.stat().st_size:,} bytes, expected {shard['bytes']:,}). Delete it and run the command that "
                "made the baseline again, or copy the folder anew."
            )
    return Baseline(directory, manifest)


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """``manifest.json`` with the keys this version knows; None where there is none."""
    path = directory / MANIFEST
    if not path.exists():
        return None
    manifest = read_versioned(
        path,
        (SCHEMA_VERSION,),
        {"complete": bool, "settings": dict, "versions": dict, "shards": list, "num_rows": int},
        expected="the manifest of a reference baseline",
        remedy=_REMEDY,
        damaged=DataError,
    )
    keys = {"file", "sha256", "rows", "bytes"}
    if any(not isinstance(shard, dict) or keys - shard.keys() for shard in manifest["shards"]):
        raise DataError(f"{path} has a shard without {', '.join(sorted(keys))}. {_MAKE} again.")
    try:
        require_kinds(manifest["shards"], [{"file": str, "sha256": str, "rows": int, "bytes": int}], "shards")
        if away := next((s["file"] for s in manifest["shards"] if Path(s["file"]).name != s["file"]), None):
            raise ValueError(f"the shard {away[:80]!r}, which is no name in its folder")
    except ValueError as e:
        raise DataError(f"{path} has {e}. Expected the manifest of a reference baseline; {_REMEDY}.") from e
    return manifest


def versions() -> dict[str, str]:
    """Of what the data depend on."""
    import torch
    import transformers

    from ..._version import __version__

    return {"trl_parity": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _check_versions(directory: Path, made_with: Mapping[str, str]) -> None:
    from packaging.version import InvalidVersion, Version

    for name, here in versions().items():
        try:
            there = Version(str(made_with.get(name)))
        except InvalidVersion as e:
            raise DataError(f"{directory / MANIFEST} is corrupt: no version of {name} ({e}). {_MAKE} again.") from e
        # trl-parity: the schema decides. The others: a new major version may compute another function.
        if name != "trl_parity" and there.major != Version(here).major:
            raise ConfigError(
                f"the baseline in {directory} was made with {name} {there}, here is {here}: the same model may "
                f"compute other numbers there. {_MAKE} of this environment, or install {name} {there.major}.*."
            )


def _check_hash(directory: Path, what: str, name: str, seen: str, manifest: Mapping[str, Any]) -> None:
    expected = str(manifest["settings"].get(f"{what}_sha256"))
    if seen != expected:
        here = f"{name!r} has {seen[:12]}…"
        raise ConfigError(
            f"the baseline in {directory} is of another {what}: that of {manifest.get('model')!r} with SHA-256 "
            f"{expected[:12]}…, and {here}. {_MAKE} for this {what}, or pass the one it was made for."
        )


# ---- who is who -----------------------------------------------------------------------------------------------------


def file_sha256(path: Path, *, within: bool = False) -> str:
    """Of a regular file's bytes, read in pieces. ``within``: which is no link out of its folder."""
    raw: Any = open_regular(path, within=within)
    with raw as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_sha256(model: str | Path, revision: str | None = None) -> str:
    """SHA-256 over the model's config and its weight files: names and bytes, without which transformers saved it.

    ``model``: a folder, or a hub name (what is not yet cached is downloaded). Raises ConfigError.
    """
    folder = model_folder(model, revision)
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")) or sorted(folder.glob("*.gguf"))
    if not weights or not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json or no weights. Expected a model as save_pretrained writes it.")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as e:
        raise ConfigError(f"{folder / 'config.json'} is not valid JSON ({e}). Expected a model's config.") from e
    kept = {name: value for name, value in config.items() if name not in ("transformers_version", "_name_or_path")}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for path in weights:
        digest.update(f"\0{path.name}\0{file_sha256(path)}".encode())
    return digest.hexdigest()


def model_folder(model: str | Path, revision: str | None = None) -> Path:
    """The folder itself, or the hub's snapshot of it in the cache."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.model"]
        folder = Path(snapshot_download(str(model), revision=revision, allow_patterns=patterns))
        if not any(folder.glob("*.safetensors")):  # an old repository
            folder = Path(snapshot_download(str(model), revision=revision, allow_patterns=[*patterns, "*.bin"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        raise ConfigError(
            f"{str(model)!r} is no folder here, and the hub gives none ({type(e).__name__}). Expected the folder of "
            "a model, or the hub name of one."
        ) from e
    return folder


def tokenizer_sha256(tokenizer: Any) -> str:
    """SHA-256 over what decides ids: vocabulary, merges, normalization, special tokens, chat template.

    Not over padding and truncation, which a program sets as it goes. ``tokenizer``: an object, a folder, a hub name.
    """
    if isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    core = json.loads(backend.to_str()) if backend is not None else dict(sorted(tokenizer.get_vocab().items()))
    for name in ("padding", "truncation"):
        core.pop(name, None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    parts = [core, special, tokenizer.eos_token_id, getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def load_tokenizer(name: str | Path, revision: str | None = None) -> Any:
    """transformers' tokenizer. Raises ConfigError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as e:
        first = str(e).strip().splitlines()[0]
        raise ConfigError(f"no tokenizer in {str(name)!r} ({first}). Expected a folder or hub name of one.") from e
