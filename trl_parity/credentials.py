"""Keys, tokens and passwords taken out of what is kept: by the names they have, and by the forms they come in.

Applied where a value enters a record: settings, an engine's address, a command line, the text of an error. What has
neither a name nor a form (a password as a bare word) can't be told from anything else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["HIDDEN", "masked", "without_credentials"]

HIDDEN = "***"

# what a name ends in
_ENDS = (
    r"(?:token|secret|passw(?:or)?d|pwd|passphrase|credentials?|authorization|cookie|bearer"
    r"|(?:api|access|account|secret|private|auth|encryption|signing|master)[_-]?key)"
)

_NAME = re.compile(rf"(?:^|[_.-]){_ENDS}$")

# of a vocabulary, or of a text
_NO_SECRET = re.compile(
    r"(?:^|[_.-])(?:bos|eos|pad|unk|sep|cls|mask|image|audio|video|start|end|stop|special|per|last|next)[_.-]token$"
)

_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")

# each bounded, so that no text takes long
_FORMS = tuple(
    re.compile(form)
    for form in (
        r"(?<=://)[^\s/?#\"'<>]{1,500}(?=@)",  # user and password of an address
        r"(?i)(?<=\bbearer )\s*[\w.~+/=-]{8,}",
        r"(?i)(?<=\bbasic )\s*[\w+/=-]{8,}",
        r"\bhf_[A-Za-z0-9]{16,}",  # Hugging Face
        r"\b(?:sk|rk|pk)-[\w-]{16,500}",  # OpenAI, Anthropic and others
        r"\bgh[oprsu]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}|\bglpat-[\w-]{16,500}",
        r"\bxox[a-z]-[\w-]{10,500}|\bwandb_v1_\w{16,}|\bAIza[\w-]{30,500}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
        r"(?<![\w-])eyJ[\w-]{10,2000}\.[\w-]{10,2000}\.[\w-]{0,2000}",  # JSON web token
        r"(?s)-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|$)",
    )
)

_HINT = re.compile(r"(?i)token|secret|pass|pwd|credential|authorization|cookie|bearer|key|sig|auth")

_QUERY = re.compile(
    r"(?i)(?<=[?&])([\w.-]{0,100}?(?:token|key|secret|password|signature|sig|auth|credential)=)[^&\s\"'#]+"
)

# quoted, in JSON within JSON, or a word
_VALUE = r"""(?P<value>(?P<open>\\*["'])(?:\\.|(?!(?P=open))[^\\])*(?P=open)|[^\s"'&,;)\]}\\]+)"""

_NAMED = rf"(?i)(?<![\w.-])(?P<name>[\w.-]{{0,100}}?{_ENDS})"

_ASSIGNED = re.compile(rf"""{_NAMED}(?P<quote>\\*["'])?\s?(?P<sign>[=:])\s?{_VALUE}""")  # name=value, "name": value

_FLAG = re.compile(rf"{_NAMED.replace('(?P<name>', '(?P<name>--?')}\s+{_VALUE}")  # --name value


def secret_name(name: str) -> bool:
    """Whether a value of this name is a secret: ``hf_token``, ``WANDB_API_KEY``, ``--api-key``, ``clientSecret``."""
    plain = _CAMEL.sub("_", name).lower()
    return _NAME.search(plain) is not None and _NO_SECRET.search(plain) is None


def masked(text: str) -> str:
    """A text without the secrets that their form, or a name before them, gives away."""
    for form in _FORMS:
        text = form.sub(HIDDEN, text)
    if _HINT.search(text) is None:
        return text
    text = _QUERY.sub(rf"\1{HIDDEN}", text)
    return _FLAG.sub(_hidden, _ASSIGNED.sub(_hidden, text))


def _hidden(found: re.Match[str]) -> str:
    parts = found.groupdict()
    name, value, mark = parts["name"], parts["value"], parts["open"] or ""
    # "a token: ..." is a sentence
    sentence = name.lower() == "token" and parts.get("sign") == ":" and not parts.get("quote")
    if sentence or not secret_name(name) or value.lower() in ("none", "null", "true", "false"):
        return found[0]
    return f"{found[0][: found.start('value') - found.start()]}{mark}{HIDDEN}{mark}"


def without_credentials(value: Any) -> Any:
    """Settings, at any depth, or a command's words, with ``***`` for every secret."""
    if isinstance(value, Mapping):
        return {name: _named(str(name), held) for name, held in value.items()}
    if isinstance(value, list | tuple):
        words = [without_credentials(word) for word in value]
        for i, flag in enumerate(value[:-1]):
            if isinstance(flag, str) and flag.startswith("-") and secret_name(flag) and isinstance(value[i + 1], str):
                words[i + 1] = HIDDEN
        return words
    return masked(value) if isinstance(value, str) else value


def _named(name: str, value: Any) -> Any:
    if not secret_name(name) or value is None or isinstance(value, bool) or value == "":
        return without_credentials(value)
    return HIDDEN
