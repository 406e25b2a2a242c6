"""A Hub on the loopback interface: the routes of upload and download that `huggingface_hub` speaks, held in memory.

Models are known by "owner/name", datasets by "datasets/owner/name".

The client on the other side is the true one. Small text files travel inside the commit, all else by the LFS protocol,
as on the Hub; downloads of those are redirected to another address. Private repositories are missing for who has no
token.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "t" * 34
_REGULAR = (".json", ".md", ".txt", ".py")


@dataclass
class Repository:
    private: bool = False
    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)  # (sha, message, files)

    def commit(self, message: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {message} {sorted(files)}".encode()).hexdigest()
        self.commits.append((sha, message, files))
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main" and self.commits:
            return self.commits[-1][0], self.commits[-1][2]
        return next(((sha, files) for sha, _, files in self.commits if sha == revision), None)


class HubServer:
    """Runs for a block; `endpoint` is its address, `repositories` what it holds, `requests` what was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # by SHA-256
        self.requests: list[str] = []
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        # The second is where large files lie: another host to the client, which must not send it the token.
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
        self.endpoint, self.storage = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)
        self.tokens_at_storage: list[str] = []

    def __enter__(self) -> "HubServer":
        for server in self._servers:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def files(self, repo_id: str) -> dict[str, bytes]:
        return self.repositories[repo_id].commits[-1][2]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    # -- routes --------------------------------------------------------------------------------------------------

    _ROUTES = (
        ("POST", r"/api/repos/create", "_create"),
        ("POST", r"/api/validate-yaml", "_validate"),
        ("GET", r"/api/whoami-v2", "_whoami"),
        ("POST", r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "_preupload"),
        ("POST", r"/((?P<kind>datasets)/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "_batch"),
        ("PUT", r"/objects/(?P<oid>[0-9a-f]{64})", "_put"),
        ("POST", r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "_commit"),
        ("GET", r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "_info"),
        (
            "GET",
            r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<below>.+))?",
            "_tree",
        ),
        ("POST", r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)", "_paths"),
        (
            "GET|HEAD",
            r"/((?P<kind>datasets)/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
            "_resolve",
        ),
        ("GET|HEAD", r"/objects/(?P<oid>[0-9a-f]{64})", "_object"),
    )

    def _route(self, method: str) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self._chunks()
        address = urlsplit(self.path)
        self.hub.requests.append(f"{method} {address.path}")
        if address.path.startswith("/objects/") and (token := self.headers.get("Authorization")):
            self.hub.tokens_at_storage.append(token)
        for methods, pattern, name in self._ROUTES:
            found = re.fullmatch(pattern, address.path)
            if found and method in methods.split("|"):
                values = {key: unquote(value) for key, value in found.groupdict().items() if value is not None}
                kind = values.pop("kind", "models")
                if "repo" in values:
                    repo = values["repo"] = "datasets/" * (kind == "datasets") + values["repo"]
                    known = self.hub.repositories.get(repo)
                    if known is None or (known.private and not self._authorised()):
                        return self._fail(401, "RepoNotFound")
                return getattr(self, name)(body, **values)
        return self._fail(404, "EntryNotFound")

    def _chunks(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        content = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def _fail(self, status: int, code: str) -> None:
        self._answer(status, b"{}", X_Error_Code=code, X_Error_Message=code, Content_Type="application/json")

    # -- upload --------------------------------------------------------------------------------------------------

    def _create(self, body: bytes) -> None:
        if not self._authorised():
            return self._fail(401, "Unauthorized")
        asked = json.loads(body)
        kind = "datasets/" * (asked.get("type") == "dataset")
        repo = f"{kind}{asked.get('organization') or 'me'}/{asked['name']}"
        if repo in self.hub.repositories:
            address = json.dumps({"url": f"{self.hub.endpoint}/{repo}"}).encode()
            return self._answer(409, address, X_Error_Code="RepoExists", Content_Type="application/json")
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.hub.repositories[repo] = Repository(private)
        self.hub.repositories[repo].commit("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        name = repo.removeprefix("datasets/")
        return self._json({"url": f"{self.hub.endpoint}/{repo}", "name": name, "id": name})

    def _validate(self, body: bytes) -> None:
        self._json({"errors": [], "warnings": []})

    def _whoami(self, body: bytes) -> None:
        self._json({"name": "me", "type": "user"}) if self._authorised() else self._fail(401, "Unauthorized")

    def _preupload(self, body: bytes, repo: str, revision: str) -> None:
        if not self._authorised():
            return self._fail(401, "Unauthorized")
        modes = [
            {
                "path": file["path"],
                "uploadMode": "regular" if file["path"].endswith(_REGULAR) else "lfs",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(body)["files"]
        ]
        return self._json({"files": modes})

    def _batch(self, body: bytes, repo: str) -> None:
        answers = []
        for entry in json.loads(body)["objects"]:
            answers.append(dict(entry))
            if entry["oid"] not in self.hub.objects:
                answers[-1]["actions"] = {"upload": {"href": f"{self.hub.storage}/objects/{entry['oid']}"}}
        self._json({"transfer": "basic", "objects": answers})

    def _put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._fail(400, "BadHash")
        self.hub.objects[oid] = body
        return self._answer(200)

    def _commit(self, body: bytes, repo: str, revision: str) -> None:
        if not self._authorised():
            return self._fail(403, "Forbidden")
        known = self.hub.repositories[repo]
        files, message = dict(known.commits[-1][2]), ""
        for line in body.splitlines():
            record = json.loads(line)
            key, value = record["key"], record["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                return self._fail(400, "UnknownOperation")
        sha = known.commit(message, files)
        return self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{sha}"})

    # -- download ------------------------------------------------------------------------------------------------

    def _at(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        found = self.hub.repositories[repo].at(revision)
        if found is None:
            self._fail(404, "RevisionNotFound")
        return found

    def _info(self, body: bytes, repo: str, revision: str = "main") -> None:
        if found := self._at(repo, revision):
            sha, files = found
            siblings = [{"rfilename": name} for name in files]
            private = self.hub.repositories[repo].private
            self._json({"id": repo, "modelId": repo, "sha": sha, "private": private, "siblings": siblings, "tags": []})

    def _tree(self, body: bytes, repo: str, revision: str, below: str = "") -> None:
        if found := self._at(repo, revision):
            files, folders, start = found[1], _folders(found[1]), f"{below}/" if below else ""
            if below and below not in folders:
                return self._fail(404, "EntryNotFound")
            deep = "recursive=true" in urlsplit(self.path).query.lower()
            entries = [_entry(name, files.get(name)) for name in [*folders, *files]
                       if name.startswith(start) and (deep or "/" not in name[len(start) :])]  # fmt: skip
            self._json(entries)
        return None

    def _paths(self, body: bytes, repo: str, revision: str) -> None:
        if found := self._at(repo, revision):
            asked = parse_qs(body.decode())["paths"] if body[:1] != b"{" else json.loads(body)["paths"]
            known = _folders(found[1]) | set(found[1])
            self._json([_entry(name, found[1].get(name)) for name in asked if name in known])

    def _resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        if not (found := self._at(repo, revision)):
            return None
        sha, files = found
        if path not in files:
            return self._answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        content = files[path]
        if path.endswith(_REGULAR):
            return self._answer(200, content, ETag=f'"{_blob_id(content)}"', X_Repo_Commit=sha)
        digest = hashlib.sha256(content).hexdigest()
        self.hub.objects[digest] = content
        return self._answer(
            302, b"", Location=f"{self.hub.storage}/objects/{digest}", X_Repo_Commit=sha,
            X_Linked_Etag=f'"{digest}"', X_Linked_Size=str(len(content)),
        )  # fmt: skip

    def _object(self, body: bytes, oid: str) -> None:
        self._answer(200, self.hub.objects[oid], ETag=f'"{oid}"')


def _folders(files: dict[str, bytes]) -> set[str]:
    return {str(folder) for name in files for folder in PurePosixPath(name).parents if str(folder) != "."}


def _entry(name: str, content: bytes | None) -> dict[str, Any]:
    """What the Hub tells of a file, or of a folder, which has no content."""
    if content is None:
        return {"type": "directory", "path": name, "size": 0, "oid": _blob_id(name.encode())}
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": _blob_id(content)}
    if not name.endswith(_REGULAR):
        digest = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
    return entry


def _blob_id(content: bytes) -> str:
    """The name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def fresh(hub: HubServer, tmp_path: Path, code: str, *, token: str | None = TOKEN, **environment: str) -> Any:
    """Runs code in a new process that knows the Hub and nothing else; what it prints last is JSON."""
    settings = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1] / "src"), **environment,
    }  # fmt: skip
    if token is not None:
        settings["HF_TOKEN"] = token
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=settings, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
