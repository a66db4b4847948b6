"""What `make dist` built, looked at: every file of the package is in the sdist and in the wheel, byte for byte.

Run by the Python of an environment that holds the wheel and little else, from outside the sources:
`python check_dist.py SOURCES`.
"""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

sources = Path(sys.argv[1])
[sdist], [wheel] = sources.glob("dist/*.tar.gz"), sources.glob("dist/*.whl")
wanted = {
    path.relative_to(sources).as_posix(): path.read_bytes()
    for path in (sources / "trl_parity").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}
with zipfile.ZipFile(wheel) as files:
    in_wheel = {name: files.read(name) for name in files.namelist() if name in wanted}
with tarfile.open(sdist) as files:
    members = {m.name.partition("/")[2]: m for m in files.getmembers()}
    in_sdist = {name: files.extractfile(members[name]).read() for name in wanted if name in members}
for built, found in ((wheel, in_wheel), (sdist, in_sdist)):
    if wrong := sorted(name for name, content in wanted.items() if found.get(name) != content):
        sys.exit(f"{built.name}: missing, or other than in the sources: {', '.join(wrong)}")

import trl_parity  # noqa: E402
from trl_parity.cli import COMMANDS  # noqa: E402

if Path(sys.prefix) not in Path(trl_parity.__file__).parents:
    sys.exit(f"{trl_parity.__file__} is not the wheel that was installed in {sys.prefix}")
for command in ([], *([name] for name in COMMANDS)):
    subprocess.run([Path(sys.prefix) / "bin/trl-parity", *command, "--help"], check=True, stdout=subprocess.DEVNULL)
trl_parity.ParityConfig(rules={"kl_k3": {"k": 8}})
print(f"{sdist.name}, {wheel.name}: {len(wanted)} files, {len(COMMANDS)} commands, all there")
