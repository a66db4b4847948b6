"""Children forked from a process that has imported the heavy stack once, in the place of fresh interpreters.

Importing torch, transformers, TRL and vLLM takes longer than what most children do. ``Child`` looks like ``Popen`` for
a ``python`` command: its own environment, folder, session and exit code. The parent of them all, one a test run, has
imported the libraries and nothing of this package, made no thread and drawn no number; what is read from the
environment when a library is imported (``TRITON_INTERPRET``, say) can not be changed any more.

``python -m support.warm SOCKET PID`` is that parent; it ends with the process PID.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from support import PATH, ROOT


class Child:
    """A forked interpreter that runs a module (``["-m", name, ...]``), code (``["-c", code, ...]``) or a script."""

    def __init__(self, args: list[Any], *, env: dict[str, str], stdout: Path, stderr: Path, cwd: Path = ROOT):
        self.args, self.stdout, self.stderr, self.returncode = [*map(str, args)], stdout, stderr, None
        request = {"args": self.args, "env": env, "cwd": str(cwd), "stdout": str(stdout), "stderr": str(stderr)}
        self._told = _connected()
        self._told.sendall(json.dumps(request).encode() + b"\n")
        self._answers = self._told.makefile()
        self.pid = int(self._answers.readline())

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._told], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._told], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args[:2], timeout or 0.0)
            self.returncode = int(self._answers.readline())
            self._told.close()
        return self.returncode

    def kill(self) -> None:
        """With all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def run(args: list[Any], *, env: dict[str, str], timeout: float, cwd: Path = ROOT) -> Any:
    """As ``subprocess.run`` of a Python command that captures text."""
    with tempfile.TemporaryDirectory(prefix="trl-parity-child-") as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        child = Child(args, env=env, stdout=out, stderr=err, cwd=cwd)
        try:
            child.wait(timeout)
        finally:
            child.kill()
        texts = (path.read_text(errors="replace") for path in (out, err))
        return subprocess.CompletedProcess(child.args, child.returncode, *texts)


def _connected() -> socket.socket:
    """To the parent of this test run, started by whoever comes first."""
    session = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    place = Path(tempfile.gettempdir()) / f"trl-parity-warm-{session}.socket"
    with open(place.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (found := _try(place)) is None:
            place.unlink(missing_ok=True)
            command = [sys.executable, "-m", "support.warm", str(place), str(session)]
            env = os.environ | {"PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"}
            started = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL)
            while (found := _try(place)) is None:
                assert started.poll() is None, f"the warm parent ended with {started.returncode}"
                time.sleep(0.1)
    return found


def _try(place: Path) -> socket.socket | None:
    found = socket.socket(socket.AF_UNIX)
    try:
        found.connect(str(place))
    except OSError:
        found.close()
        return None
    return found


# ---- the parent -------------------------------------------------------------------------------------------------


def serve(place: str, session: int) -> dict[str, Any] | None:
    """Fork a child for each request until the session is over; in a child, its request."""
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import torch
    import transformers  # noqa: F401
    import vllm.entrypoints.llm
    import vllm.entrypoints.openai.api_server
    import vllm.v1.engine.core  # noqa: F401
    from trl import GRPOConfig, GRPOTrainer  # noqa: F401
    from trl.generation import vllm_generation  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what is here is looked through in no child
    threads = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    # arrow's allocator looks after its own in a fork
    assert len([x for x in threads if x != "jemalloc_bg_thd"]) <= 1, f"with threads there is no safe fork: {threads}"
    woken, wake = socket.socketpair()
    for end in (woken, wake):
        end.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place)
        listener.listen(64)
        while True:
            ready, _, _ = select.select([listener, woken], [], [], 5.0)
            if woken in ready:
                with contextlib.suppress(BlockingIOError):
                    woken.recv(4096)
            _reap(children)
            if listener in ready:
                teller = listener.accept()[0]
                request = json.loads(teller.makefile().readline() or "null")
                if request is None:
                    teller.close()
                elif pid := os.fork():
                    children[pid] = teller
                    with contextlib.suppress(OSError):  # it has done so itself, or is over
                        os.setpgid(pid, pid)
                    teller.sendall(b"%d\n" % pid)
                else:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for inherited in (listener, woken, wake, teller, *children.values()):
                        inherited.close()
                    return request
            try:
                os.kill(session, 0)
            except ProcessLookupError:
                os.unlink(place)
                return None


def _reap(children: dict[int, socket.socket]) -> None:
    for pid in [*children]:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            with contextlib.suppress(OSError):
                children[pid].sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
            children.pop(pid).close()


def become(request: dict[str, Any]) -> None:
    """Be the interpreter that was asked for."""
    os.setpgid(0, 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        opened = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    random.seed()
    for path in reversed(os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        if path and path not in sys.path:
            sys.path.insert(0, path)
    first, *rest = request["args"]
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(rest[0], "<child>", "exec"), main.__dict__)
    elif first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, str(Path(first).resolve().parent))
        runpy.run_path(first, run_name="__main__")


def ended(run: Callable[[], None]) -> int:
    """The exit code of an interpreter that did this, with what is done at its end."""
    code = 0
    try:
        run()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if not isinstance(e.code, int | None):
            print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    return code


if __name__ == "__main__":
    if (asked := serve(sys.argv[1], int(sys.argv[2]))) is not None:
        code = ended(lambda: become(asked))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # taking the libraries apart, object by object, takes longer than many a child
