"""A Hub on localhost, as much of it as uploading, downloading and loading by name need; standard library only.

    with HubServer() as hub:
        subprocess.run([...], env={**os.environ, **hub.client_env(cache_dir)})

A client reads `HF_ENDPOINT` when `huggingface_hub` is imported, so clients run as subprocesses. Endpoints: create,
repository info, tree, paths-info, preupload, LFS batch and upload, commit (NDJSON), refs, commits, validate-yaml,
whoami, and resolve with Range.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

KINDS = {"dataset": "datasets", "space": "spaces"}
LFS_SUFFIXES = (".safetensors", ".bin", ".mp4")
LFS_MIN_BYTES = 10_000_000

RESOLVE_ROUTE = re.compile(r"/(?:(datasets|spaces)/)?(.+?)/resolve/([^/]+)/(.+)")
LFS_BATCH_ROUTE = re.compile(r"/(?:(?:datasets|spaces)/)?.+?\.git/info/lfs/objects/batch")
LFS_OBJECT_ROUTE = re.compile(r"/lfs/([0-9a-f]{64})")
REPO_ROUTE = re.compile(
    r"/api/(models|datasets|spaces)/(.+?)"
    r"(?:/(revision|tree|preupload|commit|commits|refs|paths-info|auth-check)(?:/(.+))?)?"
)


class HubRepository:
    """Files of one repository, by commit."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.commits: list[tuple[str, str, dict[str, bytes]]] = []
        self.commit("initial commit", {})

    def commit(self, title: str, changes: dict[str, bytes], deleted: list[str] | None = None) -> str:
        """Record a commit and return its sha."""
        files = {**self.files, **changes}
        for gone in deleted or []:
            files = {path: data for path, data in files.items() if path != gone and not path.startswith(f"{gone}/")}
        self.files = files
        sha = hashlib.sha1(f"{title}{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits.append((sha, title, files))
        return sha

    def at(self, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        """Return `(sha, files)` of a revision, or None where there is no such revision."""
        if revision in ("main", "HEAD", None):
            return self.commits[-1][0], self.files
        return next(((sha, files) for sha, _, files in self.commits if sha == revision), None)


class HubHandler(BaseHTTPRequestHandler):
    """One request; `self.server.hub` is the `HubServer`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # requests are kept in hub.log instead
        pass

    def reply(
        self,
        status: int = 200,
        body: object = b"",
        *,
        headers: dict[str, str] | None = None,
        content_type: str = "application/json",
        cut_after: int | None = None,
    ) -> None:
        """Send one answer; `cut_after` bytes of the body the connection is closed although more was announced."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:cut_after])
        if cut_after is not None:
            self.close_connection = True

    def fail(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        """Send an error the way the Hub does: the client picks its exception by the `X-Error-Code` header."""
        error_headers = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}
        self.reply(status, {"error": message}, headers=error_headers)

    def read_body(self) -> bytes:
        """Return the request's body, sent whole or in chunks."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def handle_request(self) -> None:
        """Dispatch one request of any method."""
        hub = self.server.hub
        url = urlsplit(self.path)
        path = unquote(url.path)
        body = self.read_body() if self.command in ("POST", "PUT", "DELETE") else b""
        hub.log.append((self.command, path, self.headers.get("Range")))
        if (match := RESOLVE_ROUTE.fullmatch(path)) and self.command in ("GET", "HEAD"):
            self.send_file(f"{match[1] or 'models'}/{match[2]}", match[3], match[4])
        elif path == "/api/whoami-v2":
            token = {"type": "access_token", "accessToken": {"role": "write"}}
            self.reply(body={"name": "tester", "fullname": "tester", "type": "user", "orgs": [], "auth": token})
        elif path == "/api/validate-yaml":
            self.reply(body={"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self.create_repository(json.loads(body))
        elif LFS_BATCH_ROUTE.fullmatch(path):
            objects = [hub.lfs_answer(wanted) for wanted in json.loads(body)["objects"]]
            content_type = "application/vnd.git-lfs+json"
            self.reply(body={"transfer": "basic", "objects": objects}, content_type=content_type)
        elif (match := LFS_OBJECT_ROUTE.fullmatch(path)) and self.command == "PUT":
            hub.lfs_objects[match[1]] = body
            self.reply(body={})
        elif match := REPO_ROUTE.fullmatch(path):
            self.handle_repository(match, parse_qs(url.query), body)
        else:
            self.fail(404, "EntryNotFound", f"no route {path}")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def create_repository(self, wanted: dict) -> None:
        """Create a repository, or answer 409 as the Hub does where it exists."""
        hub = self.server.hub
        kind = KINDS.get(wanted.get("type"), "models")
        name = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        address = f"{hub.url}/{name}" if kind == "models" else f"{hub.url}/{kind}/{name}"
        if f"{kind}/{name}" in hub.repositories:
            self.reply(409, {"error": "You already created this repo", "url": address})
            return
        hub.repositories[f"{kind}/{name}"] = HubRepository()
        self.reply(body={"url": address, "name": name, "id": name})

    def handle_repository(self, match: re.Match, query: dict[str, list[str]], body: bytes) -> None:
        """Answer everything below `/api/{kind}/{repository}`."""
        kind, name, verb = match[1], match[2], match[3]
        repository = self.server.hub.repositories.get(f"{kind}/{name}")
        if repository is None:
            self.fail(404, "RepoNotFound", "Repository not found")
            return
        revision, _, folder = (match[4] or "main").partition("/")
        found = repository.at(revision)
        if found is None:
            self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        sha, files = found
        if verb in (None, "revision"):
            self.reply(body=self.server.hub.describe(name, sha, files))
        elif verb == "tree":
            self.reply(body=list_tree(files, folder, query.get("recursive", ["false"])[0].lower() == "true"))
        elif verb == "paths-info":
            wanted = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode()).get("paths", [])
            self.reply(body=[file_row(path, files[path]) for path in wanted if path in files])
        elif verb == "preupload":
            modes = [
                {"path": file["path"], "shouldIgnore": False, "oid": None, "uploadMode": upload_mode(file)}
                for file in json.loads(body)["files"]
            ]
            self.reply(body={"files": modes})
        elif verb == "commit":
            sha = self.server.hub.apply_commit(repository, body)
            address = f"{self.server.hub.url}/{name}/commit/{sha}"
            self.reply(body={"success": True, "commitOid": sha, "commitUrl": address, "hookOutput": ""})
        elif verb == "refs":
            main = {"name": "main", "ref": "refs/heads/main", "targetCommit": sha}
            self.reply(body={"branches": [main], "tags": [], "converts": []})
        elif verb == "commits":
            rows = [
                {"id": sha, "title": title, "message": "", "authors": [], "date": "2026-01-01T00:00:00.000Z"}
                for sha, title, _ in reversed(repository.commits)
            ]
            self.reply(body=rows)
        else:
            self.reply(body={})

    def send_file(self, key: str, revision: str, name: str) -> None:
        """Send a file or the part of it that a Range header asks for; cut the answer once where the test wants it."""
        hub = self.server.hub
        repository = hub.repositories.get(key)
        found = repository.at(revision) if repository else None
        if found is None:
            code = "RevisionNotFound" if repository else "RepoNotFound"
            self.fail(404, code, "Revision not found" if repository else "Repository not found")
            return
        sha, files = found
        if name not in files:
            self.fail(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
            return
        data = files[name]
        headers = {
            "X-Repo-Commit": sha,
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        cut_after = hub.cuts.pop(name, None) if self.command == "GET" else None
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        status = 200
        if wanted:
            first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        self.reply(status, data, headers=headers, content_type="application/octet-stream", cut_after=cut_after)


def file_row(path: str, data: bytes) -> dict[str, object]:
    """Describe one file as the tree endpoint does."""
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


def list_tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, object]]:
    """List the files below a folder ("" is the root), or only those directly in it."""
    prefix = f"{folder}/" if folder else ""
    paths = [path for path in sorted(files) if path.startswith(prefix)]
    return [file_row(path, files[path]) for path in paths if recursive or "/" not in path[len(prefix) :]]


def upload_mode(file: dict) -> str:
    """Say whether a file is uploaded inside the commit or as an LFS object."""
    return "lfs" if file["size"] > LFS_MIN_BYTES or file["path"].endswith(LFS_SUFFIXES) else "regular"


class HubServer:
    """The server and what it holds.

    Attributes:
        repositories: Repositories by `models/{owner}/{name}`.
        log: `(method, path, Range header or None)` of every request.
        cuts: File name -> number of bytes after which the next download of that file is cut, once.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, HubRepository] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.log: list[tuple[str, str, str | None]] = []
        self.cuts: dict[str, int] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
        self.server.daemon_threads = True
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def client_env(self, cache_dir: str | Path) -> dict[str, str]:
        """Return the environment of a client that talks to this server only."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache_dir),
            "HF_TOKEN": "hf_local",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def describe(self, name: str, sha: str, files: dict[str, bytes]) -> dict[str, object]:
        """Return the repository info that `model_info` and `pipeline(model=name)` read; the tag is the card's."""
        tag = re.search(rb"^pipeline_tag: (\S+)$", files.get("README.md", b""), re.MULTILINE)
        return {
            "id": name,
            "modelId": name,
            "sha": sha,
            "private": False,
            "disabled": False,
            "gated": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "library_name": "transformers",
            "pipeline_tag": tag[1].decode() if tag else None,
            "siblings": [{"rfilename": path} for path in sorted(files)],
        }

    def lfs_answer(self, wanted: dict) -> dict[str, object]:
        """Say where to upload an LFS object; an answer without actions means that it is already here."""
        if wanted["oid"] in self.lfs_objects:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}", "header": {}}}}

    def apply_commit(self, repository: HubRepository, body: bytes) -> str:
        """Apply the NDJSON lines of one commit and return its sha."""
        changes: dict[str, bytes] = {}
        deleted: list[str] = []
        title = ""
        for line in body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                changes[value["path"]] = self.lfs_objects[value["oid"]]
            else:
                deleted.append(value["path"].rstrip("/"))
        return repository.commit(title, changes, deleted)
