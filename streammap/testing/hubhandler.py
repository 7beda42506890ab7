"""The answers of a HubServer: the part of the Hub's protocol that huggingface_hub uses.

GET  /api/models/ID[/revision/REV]      sha and files
GET  /api/models/ID/tree/REV            files
HEAD, GET  /ID/resolve/REV/FILE         bytes: ETag, X-Repo-Commit, ranges
GET  /api/whoami-v2;  POST /api/repos/create, /api/validate-yaml, .../branch/NAME,
.../preupload/REV, /ID.git/info/lfs/objects/batch, .../commit/REV;  PUT /lfs/ID/OID
"""

import base64
import json
import re
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from typing import Any, cast
from urllib.parse import parse_qs, unquote, urlsplit

from streammap.testing import hubrepos
from streammap.testing.hubrepos import Blob, Repo
from streammap.testing.hubstate import HubState, Seen

_PIECE = 2**16
_ID = r"(?P<id>[^/]+/[^/]+?)"


class RefusedError(Exception):
    """An error answer."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        """Keep the answer; the client goes by `code`."""
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    protocol_version = "HTTP/1.1"
    sent = 0
    """Bytes of the current answer's body."""
    status = 0

    @property
    def hub(self) -> HubState:
        """The server's state."""
        return cast("HubState", self.server.hub)  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Read."""
        self._answer("GET")

    def do_HEAD(self) -> None:
        """Ask what a file is."""
        self._answer("HEAD")

    def do_POST(self) -> None:
        """Create, ask, commit."""
        self._answer("POST")

    def do_PUT(self) -> None:
        """Send a file."""
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        self.sent, self.status = 0, 0
        path = urlsplit(self.path).path
        body = self._body()
        try:
            if self.hub.faults.seconds:
                time.sleep(self.hub.faults.seconds)
            self._route(method, path, body)
        except RefusedError as refused:
            content = json.dumps({"error": refused.message}).encode()
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self._send(refused.status, content, {**headers, **refused.headers})
        except OSError:
            self.close_connection = True
        finally:
            self._record(method, path)

    def _body(self) -> bytes:
        """The body of the request, chunked or not."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while n := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(n))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(pieces)

    def _record(self, method: str, path: str) -> None:
        span, agent = self.headers.get("Range") or "", self.headers.get("User-Agent") or ""
        with self.hub.ledger.lock:
            seen = Seen(method, path, span, self.status, self.sent, agent)
            self.hub.ledger.seen.append(seen)

    def _route(self, method: str, path: str, body: bytes) -> None:
        for known, pattern, name in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method in known:
                parts = {key: unquote(value) for key, value in match.groupdict().items()}
                getattr(self, name)(body=body, **parts)
                return
        raise RefusedError(404, "", f"no such page: {method} {path}")

    def _user(self) -> str | None:
        given = self.headers.get("Authorization") or ""
        if not given:
            return None
        user = self.hub.tokens.get(given.removeprefix("Bearer "))
        if user is None:
            raise RefusedError(401, "", "Invalid credentials in Authorization header")
        return user

    def _repo(self, name: str, *, reads_files: bool = False) -> Repo:
        user, repo = self._user(), self.hub.repos.get(name)
        if repo is None or (repo.private and user is None):
            status = 401 if user is None else 404
            raise RefusedError(status, "RepoNotFound", "Repository not found")
        if reads_files and repo.gated and (user or "", name) not in self.hub.lets_in:
            raise RefusedError(
                401 if user is None else 403,
                "GatedRepo",
                f"Access to model {name} is restricted. You must be authenticated to access it.",
            )
        return repo

    def _commit(self, repo: Repo, revision: str) -> str:
        sha = repo.resolve(revision)
        if sha is None:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    # ---- reading

    def whoami(self, *, body: bytes) -> None:
        """The owner of a token."""
        user = self._user()
        if user is None:
            raise RefusedError(401, "", "Invalid username or password.")
        self._json({"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token"}})

    def model(self, *, body: bytes, id: str, rev: str = "main") -> None:
        """A model's commit and files."""
        repo = self._repo(id)
        sha = self._commit(repo, rev)
        files = [blob.sibling(name) for name, blob in repo.commits[sha].items()]
        self._json({"id": id, "sha": sha, "private": repo.private, "siblings": files})

    def tree(self, *, body: bytes, id: str, rev: str, path: str = "") -> None:
        """The files of a folder; with `recursive`, of all its subfolders too."""
        repo = self._repo(id)
        files = repo.commits[self._commit(repo, rev)]
        prefix = f"{path}/" if path else ""
        deep = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"
        entries = [
            blob.entry(name)
            for name, blob in files.items()
            if name.startswith(prefix) and (deep or "/" not in name[len(prefix) :])
        ]
        self._json(entries)

    def refs(self, *, body: bytes, id: str) -> None:
        """Branches."""
        repo = self._repo(id)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
            for name, sha in repo.branches.items()
        ]
        self._json({"branches": branches, "tags": [], "converts": []})

    def resolve(self, *, body: bytes, id: str, rev: str, file: str) -> None:
        """A file's bytes, or a redirect to them."""
        repo = self._repo(id, reads_files=True)
        sha = self._commit(repo, rev)
        blob = repo.commits[sha].get(file)
        if blob is None:
            raise RefusedError(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": sha})
        headers = {"X-Repo-Commit": sha}
        if self.hub.redirects and blob.is_lfs:
            self._count_try()
            etag = self.hub.faults.etag or blob.etag
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(blob.nbytes)}
            # Another origin, so that a client does not send its token there.
            elsewhere = self.hub.url.replace("127.0.0.1", "localhost")
            self._send(302, b"", {**headers, "Location": f"{elsewhere}/storage/{id}/{sha}/{file}"})
            return
        self._count_try()
        self._send_blob(blob, headers)

    def storage(self, *, body: bytes, id: str, rev: str, file: str) -> None:
        """The address that redirects lead to; it refuses tokens, which must not get there."""
        if self.headers.get("Authorization"):
            raise RefusedError(400, "", "a token was sent to the storage")
        blob = self.hub.repos[id].commits[rev][file]
        self._send_blob(blob, {})

    def _count_try(self) -> None:
        ledger = self.hub.ledger
        if self.command != "GET":
            return
        with ledger.lock:
            n = ledger.tried[self.path] = ledger.tried.get(self.path, 0) + 1
        if n <= self.hub.faults.unavailable:
            raise RefusedError(503, "", "Service Unavailable")

    def _send_blob(self, blob: Blob, headers: Mapping[str, str]) -> None:
        faults = self.hub.faults
        start, end, status = 0, blob.nbytes, 200
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if span and not faults.ignore_ranges:
            start = int(span[1])
            end = min(int(span[2]) + 1 if span[2] else blob.nbytes, blob.nbytes)
            status = 206
            if start >= blob.nbytes:
                size = {"Content-Range": f"bytes */{blob.nbytes}"}
                raise RefusedError(416, "", "Range Not Satisfiable", **size)
        fields = {**headers, "ETag": f'"{faults.etag or blob.etag}"', "Accept-Ranges": "bytes"}
        if status == 206:
            fields["Content-Range"] = f"bytes {start}-{end - 1}/{blob.nbytes}"
        self._head(status, end - start, fields)
        if self.command == "HEAD":
            return
        with self.hub.ledger.lock:
            self.hub.ledger.n_bodies += 1
            n = self.hub.ledger.n_bodies
        stop = max(end - faults.short_by, (start + end + 1) // 2) if status == 206 else end
        if faults.drop_every and n % faults.drop_every == 0:
            stop = start + (end - start) // 2
        while start < stop:
            piece = blob.read(start, min(start + _PIECE, stop))
            self.wfile.write(piece)
            self.sent += len(piece)
            start += len(piece)
            if faults.nbytes_per_second:
                time.sleep(len(piece) / faults.nbytes_per_second)
        if stop < end:
            self.close_connection = True

    # ---- writing

    def create(self, *, body: bytes) -> None:
        """A new repository."""
        asked = json.loads(body)
        user = self._user()
        if user is None:
            raise RefusedError(401, "", "Invalid username or password.")
        name = f"{asked.get('organization') or user}/{asked['name']}"
        if name in self.hub.repos:
            known = {
                "error": "You already created this model repo",
                "url": f"{self.hub.url}/{name}",
            }
            self._send(409, json.dumps(known).encode(), {"Content-Type": "application/json"})
            return
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        repo = self.hub.repos[name] = Repo(name, private=private)
        repo.commit({}, "main")
        self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def validate(self, *, body: bytes) -> None:
        """A model card's metadata; all of it is valid."""
        self._json({"errors": [], "warnings": []})

    def branch(self, *, body: bytes, id: str, rev: str) -> None:
        """A new branch."""
        repo = self._writable(id)
        if rev in repo.branches:
            raise RefusedError(409, "", f"Reference already exists: {rev}")
        repo.branches[rev] = repo.branches["main"]
        self._json({})

    def preupload(self, *, body: bytes, id: str, rev: str) -> None:
        """Which files go to LFS storage, and which into the commit."""
        repo = self._writable(id)
        files = []
        for file in json.loads(body)["files"]:
            name = file["path"]
            apart = file["size"] > hubrepos.LFS_NBYTES or name.endswith(hubrepos.LFS_SUFFIXES)
            there = repo.files(rev).get(name)
            mode = "lfs" if apart else "regular"
            entry = {"path": name, "uploadMode": mode, "shouldIgnore": False}
            files.append(entry if there is None else {**entry, "oid": there.etag})
        self._json({"files": files})

    def batch(self, *, body: bytes, id: str) -> None:
        """Where to send files; what is there already is not sent again."""
        repo = self._writable(id)
        objects: list[dict[str, object]] = []
        for wanted in json.loads(body)["objects"]:
            if repo.stored(wanted["oid"]) is not None:
                objects.append(dict(wanted))
                continue
            href = f"{self.hub.url}/lfs/{id}/{wanted['oid']}"
            objects.append({**wanted, "actions": {"upload": {"href": href}}})
        self._json({"transfer": "basic", "objects": objects})

    def upload(self, *, body: bytes, id: str, oid: str) -> None:
        """One file."""
        ledger, most = self.hub.ledger, self.hub.faults.refuse_uploads_after
        with ledger.lock:
            ledger.n_uploads += 1
            if most is not None and ledger.n_uploads > most:
                raise RefusedError(403, "", "Forbidden")
        stored = hubrepos.blob("sent.bin", body)
        if stored.sha256 != oid:
            raise RefusedError(400, "", f"expected {oid}, got {stored.sha256}")
        self.hub.repos[id].uploaded[oid] = stored
        self._send(200, b"", {})

    def commit(self, *, body: bytes, id: str, rev: str) -> None:
        """Commit the files that were sent."""
        repo = self._writable(id)
        with repo.lock:
            files = dict(repo.files(rev))
            for line in body.splitlines():
                self._operation(repo, files, json.loads(line))
            sha = repo.commit(files, rev)
        url = f"{self.hub.url}/{id}/commit/{sha}"
        self._json({"success": True, "commitOid": sha, "commitUrl": url})

    def _operation(self, repo: Repo, files: dict[str, Blob], line: Mapping[str, Any]) -> None:
        value = line["value"]
        if line["key"] == "header":
            repo.messages.append(value["summary"])
        elif line["key"] == "file":
            files[value["path"]] = hubrepos.blob(value["path"], base64.b64decode(value["content"]))
        elif line["key"] == "lfsFile":
            stored = repo.stored(value["oid"])
            if stored is None:
                raise RefusedError(400, "", f"{value['path']}: {value['oid']} was not sent")
            files[value["path"]] = stored
        elif line["key"] == "deletedFile":
            files.pop(value["path"], None)

    def _writable(self, name: str) -> Repo:
        if self._user() is None:
            raise RefusedError(401, "", "Invalid username or password.")
        return self._repo(name)

    # ---- answers

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self._head(status, len(content), headers)
        if self.command != "HEAD":
            self.wfile.write(content)
            self.sent += len(content)

    def _head(self, status: int, nbytes: int, headers: Mapping[str, str]) -> None:
        self.status = status
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(nbytes))
        self.end_headers()


_MODEL = rf"/api/models/{_ID}"
_ROUTES = (
    (("GET",), r"/api/whoami-v2", "whoami"),
    (("GET",), _MODEL, "model"),
    (("GET",), rf"{_MODEL}/revision/(?P<rev>[^/]+)", "model"),
    (("GET",), rf"{_MODEL}/tree/(?P<rev>[^/]+)", "tree"),
    (("GET",), rf"{_MODEL}/tree/(?P<rev>[^/]+)/(?P<path>.+)", "tree"),
    (("GET",), rf"{_MODEL}/refs", "refs"),
    (("GET", "HEAD"), rf"/storage/{_ID}/(?P<rev>[^/]+)/(?P<file>.+)", "storage"),
    (("GET", "HEAD"), rf"/{_ID}/resolve/(?P<rev>[^/]+)/(?P<file>.+)", "resolve"),
    (("POST",), r"/api/repos/create", "create"),
    (("POST",), r"/api/validate-yaml", "validate"),
    (("POST",), rf"{_MODEL}/branch/(?P<rev>[^/]+)", "branch"),
    (("POST",), rf"{_MODEL}/preupload/(?P<rev>[^/]+)", "preupload"),
    (("POST",), rf"{_MODEL}/commit/(?P<rev>[^/]+)", "commit"),
    (("POST",), rf"/{_ID}\.git/info/lfs/objects/batch", "batch"),
    (("PUT",), r"/lfs/(?P<id>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})", "upload"),
)
"""HTTP methods, path, and the method of Handler that answers."""
