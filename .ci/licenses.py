"""The licences of what the lock files pin, as a table: `make licenses`.

`python licenses.py LOCK=ENVIRONMENT ...`: each package as its own metadata in that environment says.
"""

import re
import sys
from email.parser import HeaderParser
from pathlib import Path

HEAD = """# Licences of the pinned packages

trl-parity itself is under the [Apache License 2.0](LICENSE), and its wheel holds nobody else's code. This is what
`make setup`, `make setup-ppo`, `make setup-deepspeed` and `make docs` install, each licence as the package's metadata
states it (`make licenses` writes the table; the packages bring the texts, in their `dist-info`).
"""

NAME = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)", re.MULTILINE)


def normal(name):
    """As the lock files write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def licence(about, folder):
    """SPDX where there is one, else the classifiers, else the first line of the text it brings."""
    if about["License-Expression"]:
        return about["License-Expression"]
    said = [c.split(" :: ")[-1] for c in about.get_all("Classifier", []) if c.startswith("License :: ")]
    said = [c for c in said if c != "OSI Approved"]
    texts = [about["License"] or "", *(path.read_text("utf-8", "replace") for path in folder.rglob("LICENSE*"))]
    lines = next((text.strip().splitlines() for text in texts if text.strip()), [])
    return ", ".join(said) or (lines[0].strip()[:80] if lines else "not told")


def main(pairs):
    """Print the table."""
    rows = {}
    for lock, environment in (pair.split("=") for pair in pairs):
        [packages] = Path(environment).glob("lib/python3*/site-packages")
        found = {}
        for path in (*packages.glob("*.dist-info/METADATA"), *packages.glob("*.egg-info/PKG-INFO")):
            about = HeaderParser().parsestr(path.read_text("utf-8", "replace"))
            found[normal(about["Name"])] = licence(about, path.parent)
        for name, version in NAME.findall(Path(lock).read_text()):
            told = found.get(normal(name), "not installed here")
            home = rows.setdefault((normal(name), version), (told.replace("|", "/"), []))
            home[1].append(lock.removeprefix("requirements-").removesuffix(".lock"))
    print(HEAD)
    print("| package | version | licence | in |\n|---|---|---|---|")
    for (name, version), (told, where) in sorted(rows.items()):
        print(f"| {name} | {version} | {told} | {', '.join(where)} |")


main(sys.argv[1:])
