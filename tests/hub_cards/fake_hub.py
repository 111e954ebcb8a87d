"""A Hub of one process: repositories with commits and branches, over the protocol that huggingface_hub speaks."""

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN, READ_TOKEN, USER = "hf_of_user", "hf_that_reads", "user"
LICENSES = {"apache-2.0", "mit", "llama3"}
LFS = (".safetensors", ".png")


def blob_id(content: bytes) -> str:
    """git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def environment(hub, home, **more):
    """Of a process whose Hub is `hub`, and whose cache is in `home`."""
    quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    place = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
    return {**{k: v for k, v in os.environ.items() if k != "HF_TOKEN"}, **quiet, **place, **more}


def described(name: str, content: bytes) -> dict:
    """A file as the Hub lists it: one in LFS by the hash of its content, and by that of its pointer."""
    if not name.endswith(LFS):
        return {"type": "file", "path": name, "size": len(content), "oid": blob_id(content)}
    digest = hashlib.sha256(content).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(content)}\n".encode()
    lfs = {"oid": digest, "size": len(content), "pointerSize": len(pointer)}
    return {"type": "file", "path": name, "size": len(content), "oid": blob_id(pointer), "lfs": lfs}


def metadata_errors(card: str) -> list[str]:
    """What the Hub would not take of a card's front matter."""
    data = yaml.safe_load(card.split("---")[1])
    errors = []
    if data.get("license") not in (None, *LICENSES):
        errors.append(f'"license" must be one of {sorted(LICENSES)}')
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", data.get("base_model") or "user/none"):
        errors.append('"base_model" with value "{}" is not valid. Use a model id from https://hf.co/models.')
    return errors


class FakeHub:
    """`repos[id]` has `refs` (branch -> commit), `commits` (commit -> {path: bytes}), `log` (main's commits in order),
    `private`. `fail` is a request's method and a part of its path: it is answered with an error. `between` is called
    once, before the next commit of a client: somebody else's push."""

    def __init__(self):
        self.repos, self.uploads, self.requests, self.fail, self.between = {}, {}, [], None, None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def create(self, repo_id: str, private: bool = False) -> dict:
        self.repos[repo_id] = {"refs": {}, "commits": {}, "log": [], "private": private}
        self.commit(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.repos[repo_id]

    def commit(self, repo_id: str, files: dict[str, bytes], branch: str = "main") -> str:
        repo = self.repos[repo_id]
        names = sorted((path, blob_id(content)) for path, content in files.items())
        # As git's, it depends on where it is and on what was before.
        parent = [repo_id, repo["refs"].get(branch), len(repo["commits"])]
        oid = hashlib.sha1(json.dumps([names, parent]).encode()).hexdigest()
        repo["commits"][oid] = files
        repo["refs"][branch] = oid
        repo["log"].append((branch, oid))
        return oid

    def publish(self, repo_id: str, folder: Path) -> str:
        """What a client would have pushed; returns the commit."""
        if repo_id not in self.repos:
            self.create(repo_id)
        return self.commit(repo_id, {**self.files(repo_id), **{p.name: p.read_bytes() for p in folder.iterdir()}})

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo_id]
        return repo["commits"][repo["refs"][branch]]

    def writes(self) -> list[str]:
        """What clients asked to change, in order."""
        return [f"{method} {path}" for method, path in self.requests if method not in ("GET", "HEAD")]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *args):
        pass

    def answer(self, status: int, body=None, headers: dict | None = None, length: int | None = None):
        content = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status: int, code: str, message: str):
        self.answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def handle_any(self):
        split = urlsplit(self.path)
        path, query = unquote(split.path), parse_qs(split.query)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.hub.requests.append((self.command, path))
        if self.hub.fail and self.command == self.hub.fail[0] and self.hub.fail[1] in path:
            return self.refuse(507, "OutOfStorage", "no space is left on this Hub")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        signed_in = token in (TOKEN, READ_TOKEN)
        if token and not signed_in:
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            role = {"accessToken": {"role": "write" if token == TOKEN else "read"}}
            account = {"name": USER, "type": "user", "orgs": [], "auth": role}
            return self.answer(200, account) if signed_in else self.not_signed_in()
        if path == "/api/validate-yaml":
            errors = [{"message": message} for message in metadata_errors(json.loads(body)["content"])]
            return self.answer(400 if errors else 200, {"errors": errors, "warnings": []})
        if path.startswith("/lfs/"):
            self.hub.uploads[path.removeprefix("/lfs/")] = body
            return self.answer(200)
        if self.command in ("POST", "DELETE") and token != TOKEN:
            if not signed_in:
                return self.not_signed_in()
            return self.refuse(403, "", "You must use a token with the right to write")
        if path.startswith("/api/repos/"):
            return self.change_repos(path, json.loads(body))
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, path):
                repo_id, *rest = match.groups()
                repo = self.hub.repos.get(repo_id)
                if repo is None or (repo["private"] and not signed_in):
                    # What is private is not told from what is missing.
                    return (
                        self.refuse(404, "RepoNotFound", "Repository not found") if signed_in else self.not_signed_in()
                    )
                return method(self, repo_id, repo, *rest, query=query, body=body)
        return self.refuse(404, "NotFound", f"no such route: {path}")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815 - http.server's names

    def not_signed_in(self):
        self.refuse(401, "", "Invalid username or password.")

    def change_repos(self, path: str, body: dict):
        repo_id = f"{body.get('organization') or USER}/{body['name']}"
        if not repo_id.startswith(f"{USER}/"):
            return self.refuse(403, "", f"You have no rights in the namespace of {repo_id}")
        if path.endswith("/delete"):
            self.hub.repos.pop(repo_id)
            return self.answer(200)
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.hub.repos:
            return self.answer(409, answer | {"error": "You already created this model repo"})
        self.hub.create(repo_id, body.get("visibility") == "private" or bool(body.get("private")))
        return self.answer(200, answer)

    def resolve(self, repo: dict, revision: str) -> str | None:
        oid = repo["refs"].get(revision, revision)
        if oid not in repo["commits"]:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return oid

    def info(self, repo_id, repo, revision="main", **_):
        if oid := self.resolve(repo, revision):
            names = [{"rfilename": name} for name in sorted(repo["commits"][oid])]
            self.answer(200, {"id": repo_id, "sha": oid, "private": repo["private"], "siblings": names, "tags": []})

    def tree(self, repo_id, repo, revision, folder=None, **_):
        oid = self.resolve(repo, revision)
        if oid is None:
            return
        files = {n: c for n, c in repo["commits"][oid].items() if folder is None or n.startswith(f"{folder}/")}
        if not files:
            self.refuse(404, "EntryNotFound", f"Entry not found: {folder}")
            return
        self.answer(200, [described(name, content) for name, content in files.items()])

    def branch(self, repo_id, repo, name, body, **_):
        if self.command == "DELETE":
            del repo["refs"][name]
            return self.answer(200)
        if name in repo["refs"]:
            return self.refuse(409, "", "Reference already exists")
        if oid := self.resolve(repo, json.loads(body or b"{}").get("startingPoint", "main")):
            repo["refs"][name] = oid
            self.answer(200)
        return None

    def preupload(self, repo_id, repo, revision, body, **_):
        oid = self.resolve(repo, revision)
        if oid is None:
            return
        there = repo["commits"][oid]
        files = []
        for file in json.loads(body)["files"]:
            lfs = file["path"].endswith(LFS)
            old = there.get(file["path"])
            names = {False: blob_id, True: lambda content: hashlib.sha256(content).hexdigest()}
            known = names[lfs](old) if old is not None else None
            mode = "lfs" if lfs else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": known})
        self.answer(200, {"files": files})

    def lfs_batch(self, repo_id, repo, body, **_):
        objects = [
            {**o, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}}
            for o in json.loads(body)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, repo_id, repo, revision, query, body, **_):
        between, self.hub.between = self.hub.between, None
        if between:
            between()
        oid = self.resolve(repo, revision)
        if oid is None:
            return
        files = dict(repo["commits"][oid])
        for line in body.decode().splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header" and value.get("parentCommit") not in (None, oid):
                self.refuse(412, "", "A commit has happened since. Please refresh and try again.")
                return
            if key == "deletedFile" and value["path"] not in files:
                self.refuse(404, "EntryNotFound", "A file with this name doesn't exist")
                return
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                content = self.hub.uploads[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                files[value["path"]] = content
            elif key == "deletedFile":
                del files[value["path"]]
        pull = {}
        if query.get("create_pr") == ["1"]:
            revision = f"refs/pr/{1 + sum(name.startswith('refs/pr') for name in repo['refs'])}"
            pull = {"pullRequestUrl": f"{self.hub.url}/{repo_id}/discussions/{revision.rpartition('/')[2]}"}
        oid = self.hub.commit(repo_id, files, revision)
        self.answer(200, {"commitOid": oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}", **pull})

    def file(self, repo_id, repo, revision, name, **_):
        oid = self.resolve(repo, revision)
        if oid is None:
            return
        content = repo["commits"][oid].get(name)
        if content is None:
            self.refuse(404, "EntryNotFound", f"Entry not found: {name}")
            return
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": oid}
        self.answer(200, content, headers)


ID, REVISION = r"([\w.-]+/[\w.-]+)", r"(refs/pr/\d+|[^/]+)"
ROUTES = [
    (rf"/api/models/{ID}", Handler.info),
    (rf"/api/models/{ID}/revision/(.+)", Handler.info),
    (rf"/api/models/{ID}/tree/{REVISION}(?:/(.+))?", Handler.tree),
    (rf"/api/models/{ID}/branch/(.+)", Handler.branch),
    (rf"/api/models/{ID}/preupload/(.+)", Handler.preupload),
    (rf"/api/models/{ID}/commit/(.+)", Handler.commit),
    (rf"/{ID}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (rf"/{ID}/resolve/{REVISION}/(.+)", Handler.file),
]
