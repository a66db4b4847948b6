"""A local server that answers what the real wandb client asks of W&B, and keeps what it is sent."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BUCKET = {"id": "UnVuOjE=", "name": "r1", "displayName": "a run", "description": "", "config": "{}", "sweepName": None,
          "historyLineCount": 0, "logLineCount": 0, "eventsLineCount": 0, "historyTail": "[]", "eventsTail": "[]",
          "wandbConfig": "{}", "summaryMetrics": "{}",
          "project": {"id": "UHJvamVjdDox", "name": "mine", "entity": {"id": "RW50aXR5OjE=", "name": "me"}},
          }  # fmt: skip
VIEWER = {"id": "1", "entity": "me", "username": "me", "admin": False, "flags": "{}", "email": "a@b.c", "name": "me",
          "teams": {"edges": []}}  # fmt: skip


class Server(ThreadingHTTPServer):
    """``views`` by name, ``alerts``, ``history`` rows, ``files`` by path; ``refuse``: parts of queries it refuses."""

    daemon_threads = True

    def __init__(self) -> None:
        self.views: dict[str, dict[str, Any]] = {}
        self.upserts = 0
        self.alerts: list[dict[str, Any]] = []
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self.operations: list[str] = []
        self.refuse: tuple[str, ...] = ()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> Server:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        lower = query.lower()
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        self.operations.append(found.group(1) if found else query[:40])
        if "upsertview" in lower:
            self.upserts += 1
            name = variables["name"]
            self.views[name] = {k: variables[k] for k in ("displayName", "spec", "projectName", "entityName")}
            return {"upsertView": {"view": {"id": "Vmlldzox", "name": name}, "inserted": True}}
        if "allviews" in lower:
            view = self.views.get(variables["viewName"])
            return {"project": {"allViews": {"edges": [] if view is None else [{"node": {"id": "Vmlldzox", **view}}]}}}
        if "upsertbucket" in lower:
            return {"upsertBucket": {"bucket": BUCKET, "inserted": True}}
        if "notifyscriptablerunalert" in lower:
            self.alerts.append(variables)
            return {"notifyScriptableRunAlert": {"success": True}}
        if "createrunfiles" in lower:
            files = [{"name": n, "uploadUrl": f"{self.url}/upload/{n}"} for n in variables["files"]]
            made = {"runID": BUCKET["id"], "uploadHeaders": [], "files": files}
            return {"createRunFiles": made}
        if "createartifact(" in lower.replace(" ", "").replace("\n", ""):  # a table: as if it had been there before
            sequence = {"id": "QXJ0aWZhY3Q6MQ==", "latestArtifact": None}
            artifact = {"id": "QXJ0aWZhY3Q6MQ==", "state": "COMMITTED", "artifactSequence": sequence}
            return {"createArtifact": {"artifact": artifact}}
        if "__type" in lower or "__schema" in lower:
            return {"__type": None, "QueryType": None, "MutationType": None}
        return {"viewer": VIEWER, "serverInfo": {"features": []}, "project": None, "model": None}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path.endswith("/graphql"):
            request = json.loads(body)
            if any(part in request["query"] for part in self.server.refuse):
                return self.reply({"errors": [{"message": "refused by the test"}]}, 400)
            return self.reply({"data": self.server.answer(request["query"], request.get("variables") or {})})
        if self.path.endswith("/file_stream"):
            files = json.loads(body).get("files") or {}
            for line in (files.get("wandb-history.jsonl") or {}).get("content", []):
                self.server.history.append(json.loads(line))
            for line in (files.get("wandb-summary.json") or {}).get("content", []):
                self.server.summary = json.loads(line)
        return self.reply({})

    def do_PUT(self) -> None:
        self.server.files[self.path.removeprefix("/upload/")] = self.rfile.read(
            int(self.headers.get("Content-Length") or 0)
        )
        self.reply({})

    def do_GET(self) -> None:
        self.reply({})

    def reply(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


def inspect(run_dir):
    """Rows of an offline run, read back with wandb's own command."""
    [run_file] = list(run_dir.rglob("*.wandb"))
    command = [os.path.join(os.path.dirname(sys.executable), "wandb"), "leet", "inspect", "--json", str(run_file)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in out.splitlines()]
