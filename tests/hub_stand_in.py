"""The part of the Hugging Face hub's HTTP API that pushing and pulling use, on this machine."""

import base64
import hashlib
import json
import re
from collections.abc import Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    """Oldest first, by their hash."""

    def at(self, revision: str) -> str | None:
        return list(self.commits)[-1] if revision == "main" else revision if revision in self.commits else None


@dataclass
class Hub:
    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    """What was uploaded by git-LFS, by SHA-256."""
    requests: list[str] = field(default_factory=list)

    def files(self, name: str) -> dict[str, bytes]:
        return list(self.repositories[name].commits.values())[-1]

    def commit(self, name: str, files: dict[str, bytes], deleted: Collection[str] = ()) -> str:
        repository = self.repositories.setdefault(name, Repository())
        new = {path: content for path, content in (self.files(name) | files).items() if path not in deleted}
        oid = hashlib.sha1(repr((len(repository.commits), sorted(new.items()))).encode()).hexdigest()
        repository.commits[oid] = new
        return oid


@contextmanager
def hub() -> Generator[Hub]:
    """Serves until the block ends. The token `hf_write` may write, any other may not."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def reply(self, status: int, body: Any = b"", **headers: str) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            served.requests.append(f"{self.command} {path}")
            if self.command in ("POST", "PUT"):
                token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
                if token != "hf_write" and not path.startswith("/lfs/"):
                    self.reply(403 if token else 401, {"error": "no right to write"})
                    return
                self.write(path, body)
            else:
                self.read(path)

        do_GET = do_HEAD = do_POST = do_PUT = answer

        def write(self, path: str, body: bytes) -> None:
            if path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                served.repositories[name] = Repository(private=asked.get("visibility") == "private")
                self.reply(200, {"url": f"{served.url}/{name}"})
            elif path == "/api/validate-yaml":
                self.reply(200, {"errors": [], "warnings": []})
            elif path.startswith("/lfs/"):
                oid = path.removeprefix("/lfs/")
                assert hashlib.sha256(body).hexdigest() == oid
                served.large[oid] = body
                self.reply(200)
            elif path.endswith(".git/info/lfs/objects/batch"):
                objects = [
                    wanted | {"actions": {"upload": {"href": f"{served.url}/lfs/{wanted['oid']}"}}}
                    for wanted in json.loads(body)["objects"]
                ]
                self.reply(200, {"transfer": "basic", "objects": objects})
            elif re.fullmatch(r"/api/models/.+/preupload/main", path):
                modes = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
                self.reply(200, {"files": modes})
            elif found := re.fullmatch(r"/api/models/(.+)/commit/main", path):
                lines = [json.loads(line) for line in body.splitlines()]
                values = {line["value"]["path"]: line["value"] for line in lines if line["key"].endswith("ile")}
                deleted = {path for path in values if {"key": "deletedFile", "value": {"path": path}} in lines}
                oid = served.commit(
                    found[1],
                    {
                        name: base64.b64decode(value["content"]) if "content" in value else served.large[value["oid"]]
                        for name, value in values.items()
                        if name not in deleted
                    },
                    deleted,
                )
                self.reply(200, {"commitUrl": f"{served.url}/{found[1]}/commit/{oid}", "commitOid": oid})
            else:
                self.reply(404)

        def read(self, path: str) -> None:
            about = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            if not (about or file):
                self.reply(404)
                return
            name = (about or file)[1]
            repository = served.repositories.get(name)
            if repository is None:
                self.reply(404, X_Error_Code="RepoNotFound")
                return
            oid = repository.at(about[3] or "main" if about else file[2])
            if oid is None:
                self.reply(404, X_Error_Code="RevisionNotFound")
                return
            files = repository.commits[oid]
            if file:
                if file[3] not in files:
                    self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
                    return
                content = files[file[3]]
                self.reply(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=oid)
            elif about[2] == "tree":
                self.reply(
                    200,
                    [
                        {"type": "file", "path": path, "size": len(value), "oid": hashlib.sha1(value).hexdigest()}
                        for path, value in files.items()
                    ],
                )
            else:
                siblings = [{"rfilename": path} for path in files]
                self.reply(200, {"id": name, "sha": oid, "private": repository.private, "siblings": siblings})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Hub(url=f"http://127.0.0.1:{server.server_port}")
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
