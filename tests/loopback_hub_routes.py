"""The part of the Hub's HTTP interface that its Python client uses, without Xet."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml
from loopback_hub_http import Answer
from loopback_hub_store import HubError, Repo, StoredFile, is_lfs

_WORDS = "revision|tree|paths-info|preupload|commit|branch|refs|resolve|discussions|settings|tag|commits"
_NAME = rf"[^/]+(?:/(?!(?:{_WORDS})(?:/|$))[^/]+)?"
_API = rf"/api/(?P<kind>models|datasets)/(?P<name>{_NAME})"
_ID = rf"(?P<id>(?:datasets/)?{_NAME})"

ROUTES: list[tuple[str, re.Pattern, Callable]] = []


def route(method: str, path: str, cdn: bool = False) -> Callable:
    def add(function: Callable) -> Callable:
        ROUTES.append((method, re.compile(("/cdn" if cdn else "") + path), function))
        return function

    return add


class Call:
    """One request on its way through the routes.

    Args:
        hub: The LoopbackHub.
        method: HTTP method.
        path: Quoted, with the query.
        headers: Of the request.
        body: Of the request.
    """

    def __init__(self, hub: Any, method: str, path: str, headers: Any, body: bytes):
        self.hub, self.method, self.headers, self.body = hub, method, headers, body
        parts = urlsplit(path)
        self.path, self.query = parts.path, {name: values[0] for name, values in parse_qs(parts.query).items()}
        self.args: dict[str, str] = {}

    def run(self) -> Answer | None:
        """The answer of the first route that fits; None: there is no such route."""
        for method, pattern, function in ROUTES:
            found = pattern.fullmatch(self.path)
            if found and self.method in method.split():
                self.args = {name: unquote(value or "") for name, value in found.groupdict().items()}
                return function(self)
        return None

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def user(self) -> str | None:
        """Who asks; None: anonymous.

        Raises:
            HubError: 401, the token is not valid.
        """
        authorization = self.headers.get("Authorization")
        if authorization is None:
            return None
        if authorization != f"Bearer {self.hub.token}":
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.hub.user

    def repo(self, write: bool = False) -> Repo:
        """The repository of the path.

        Raises:
            HubError: 401 or 404 RepoNotFound; 403 without the right to write.
        """
        name, user = self.args.get("id") or self.args["name"], self.user
        if self.args.get("kind") == "datasets":
            name = f"datasets/{name}"
        repo = self.hub.repos.get(name)
        # The client knows a 401 as "not found" by its https address, which a loopback lacks; hence the code.
        if repo is None or repo.private and user is None:
            raise HubError(
                *((404, "Repository not found") if user else (401, "Invalid username or password.")), "RepoNotFound"
            )
        if write and user is None:
            raise HubError(401, "Invalid username or password.")
        if write and name.removeprefix("datasets/").rpartition("/")[0] not in self.hub.namespaces:
            raise HubError(403, "Forbidden: you don't have the rights to write to this repository")
        return repo


@route("GET", "/api/whoami-v2")
def whoami(call: Call) -> Answer:
    if call.user is None:
        raise HubError(401, "Invalid username or password.")
    access = {"accessToken": {"displayName": "loopback", "role": "write"}}
    return Answer.of_json(
        {"type": "user", "id": "0", "name": call.user, "fullname": call.user, "orgs": [], "auth": access}
    )


@route("POST", "/api/repos/create")
def create_repo(call: Call) -> Answer:
    if call.user is None:
        raise HubError(401, "Invalid username or password.")
    asked = call.json
    namespace = asked.get("organization") or call.user
    prefix = "datasets/" if asked.get("type") == "dataset" else ""
    name = f"{prefix}{namespace}/{asked['name']}"
    url = f"{call.hub.url}/{name}"
    if name in call.hub.repos:
        return Answer.of_json({"error": f"You already created this model repo: {name}", "url": url}, 409)
    if namespace not in call.hub.namespaces:
        raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}".')
    call.hub.add_repo(name, private=asked.get("visibility") == "private" or bool(asked.get("private")))
    return Answer.of_json({"url": url, "name": name, "id": name})


@route("POST", "/api/validate-yaml")
def validate_yaml(call: Call) -> Answer:
    try:
        metadata = _front_matter(call.json["content"])
    except yaml.YAMLError as error:
        return Answer.of_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
    warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
    return Answer.of_json({"errors": [], "warnings": warnings})


@route("GET", _API + r"(?:/revision/(?P<rev>[^/]+))?")
def repo_info(call: Call) -> Answer:
    repo = call.repo()
    commit = repo.head(call.args["rev"] or "main")
    siblings = []
    for path, stored in sorted(commit.tree.items()):
        siblings.append({"rfilename": path})
        if call.query.get("blobs"):
            entry = repo.describe(path, stored)
            siblings[-1] |= {"size": entry["size"], "blobId": entry["oid"]}
            if stored.lfs:
                siblings[-1]["lfs"] = {
                    "sha256": stored.sha256,
                    "size": entry["size"],
                    "pointerSize": entry["lfs"]["pointerSize"],
                }
    card = _front_matter(commit.tree["README.md"].data.decode()) if "README.md" in commit.tree else {}
    info = {"id": call.args["name"], "modelId": call.args["name"], "author": repo.id.rpartition("/")[0] or None}
    info |= {"sha": commit.sha, "private": repo.private, "gated": "auto" if repo.gated else False, "disabled": False}
    info |= {"tags": card.get("tags") or [], "siblings": siblings, "cardData": card, "downloads": 0, "likes": 0}
    info |= {key: card[key] for key in ("library_name", "pipeline_tag") if key in card}
    info |= {"lastModified": "2025-01-01T00:00:00.000Z", "createdAt": "2025-01-01T00:00:00.000Z"}
    return Answer.of_json(info)


@route("GET", _API + r"/refs")
def refs(call: Call) -> Answer:
    repo = call.repo()
    answer = {"converts": [], "tags": []}
    for key, names, prefix in (("branches", repo.branches, "refs/heads/"), ("pullRequests", repo.pull_requests, "")):
        answer[key] = [{"name": name, "ref": prefix + name, "targetCommit": repo.refs[name]} for name in names]
    return Answer.of_json(answer)


@route("GET", _API + r"/tree/(?P<rev>[^/]+)(?:/(?P<path>.*))?")
def tree(call: Call) -> Answer:
    recursive = call.query.get("recursive", "").lower() in ("true", "1")
    return Answer.of_json(call.repo().listing(call.args["rev"], call.args["path"], recursive))


@route("POST", _API + r"/paths-info/(?P<rev>[^/]+)")
def paths_info(call: Call) -> Answer:
    wanted = parse_qs(call.body.decode()).get("paths", [])
    if "json" in call.headers.get("Content-Type", ""):
        wanted = call.json["paths"]
    everything = {entry["path"]: entry for entry in call.repo().listing(call.args["rev"], recursive=True)}
    return Answer.of_json([everything[path] for path in wanted if path in everything])


@route("POST", _API + r"/branch/(?P<rev>[^/]+)")
def create_branch(call: Call) -> Answer:
    asked = call.json if call.body else {}
    call.repo(write=True).create_branch(call.args["rev"], asked.get("startingPoint", "main"))
    return Answer.of_json({})


@route("POST", _API + r"/preupload/(?P<rev>[^/]+)")
def preupload(call: Call) -> Answer:
    repo = call.repo(write=call.query.get("create_pr") != "1")
    head = repo.head(call.args["rev"])
    files = []
    for asked in call.json["files"]:
        there = head.tree.get(asked["path"])
        mode = "lfs" if is_lfs(asked["path"], asked["size"]) else "regular"
        files.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": there and there.etag})
    return Answer.of_json({"files": files})


@route("POST", _API + r"/commit/(?P<rev>[^/]+)")
def commit(call: Call) -> Answer:
    create_pr = call.query.get("create_pr") == "1"
    repo = call.repo(write=not create_pr)
    if call.user is None:
        raise HubError(401, "Invalid username or password.")
    header: dict[str, str] = {}
    add: dict[str, StoredFile] = {}
    delete: list[str] = []
    for line in call.body.splitlines():
        item = json.loads(line)
        value = item["value"]
        if item["key"] == "header":
            header = value
        elif item["key"] == "file":
            add[value["path"]] = StoredFile(base64.b64decode(value["content"], validate=True), lfs=False)
        elif item["key"] == "lfsFile":
            if value["oid"] not in repo.lfs_objects:
                raise HubError(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
            add[value["path"]] = StoredFile(repo.lfs_objects[value["oid"]], lfs=True)
        elif item["key"] in ("deletedFile", "deletedFolder"):
            delete.append(value["path"].rstrip("/") + "/" * (item["key"] == "deletedFolder"))
        else:
            raise HubError(400, f"Unknown key {item['key']!r} in the commit")
    parent = header.get("parentCommit")
    made, ref = repo.commit(add, tuple(delete), call.args["rev"], header.get("summary", ""), parent, create_pr)
    url = f"{call.hub.url}/{repo.id}"
    answer = {"success": True, "commitOid": made.sha, "commitUrl": f"{url}/commit/{made.sha}", "hookOutput": ""}
    if create_pr:
        answer["pullRequestUrl"] = f"{url}/discussions/{ref.rpartition('/')[2]}"
    return Answer.of_json(answer)


@route("POST", rf"/{_ID}\.git/info/lfs/objects/batch")
def lfs_batch(call: Call) -> Answer:
    # Whoever may open a pull request may upload, so reading is enough here; the commit asks for more.
    repo = call.repo()
    if call.user is None:
        raise HubError(401, "Invalid username or password.")
    objects = []
    for asked in call.json["objects"]:
        oid, size, part = asked["oid"], asked["size"], call.hub.part_size
        entry: dict[str, Any] = {"oid": oid, "size": size}
        if oid not in repo.lfs_objects:
            target = f"{call.hub.cdn_url}/cdn/upload/{oid}/{quote(repo.id)}"
            upload: dict[str, Any] = {"href": target}
            if size > part:
                urls = {f"{n + 1:05d}": f"{target}?part={n + 1}" for n in range(math.ceil(size / part))}
                upload = {"href": f"{call.hub.url}/api/complete_multipart/{oid}/{quote(repo.id)}"}
                upload["header"] = {"chunk_size": str(part), **urls}
            verify = {"href": f"{call.hub.url}/{repo.id}.git/info/lfs/objects/verify"}
            entry["actions"] = {"upload": upload, "verify": verify}
        objects.append(entry)
    transfer = "multipart" if any(o["size"] > call.hub.part_size for o in objects) else "basic"
    return Answer.of_json({"transfer": transfer, "objects": objects})


@route("PUT", rf"/upload/(?P<oid>[0-9a-f]{{64}})/{_ID}", cdn=True)
def lfs_put(call: Call) -> Answer:
    oid, part = call.args["oid"], int(call.query.get("part", 0))
    if part:
        call.hub.parts[oid, part] = call.body
    else:
        _store(call.hub.repos[call.args["id"]], oid, call.body)
    return Answer(headers={"ETag": f'"{hashlib.md5(call.body).hexdigest()}"'})


@route("POST", rf"/api/complete_multipart/(?P<oid>[0-9a-f]{{64}})/{_ID}")
def complete_multipart(call: Call) -> Answer:
    oid = call.args["oid"]
    parts = [call.hub.parts.get((oid, part["partNumber"]), b"") for part in call.json["parts"]]
    if any(part["etag"] != f'"{hashlib.md5(data).hexdigest()}"' for part, data in zip(call.json["parts"], parts)):
        raise HubError(400, "A part's ETag does not match")
    _store(call.hub.repos[call.args["id"]], oid, b"".join(parts))
    return Answer.of_json({"success": True})


@route("POST", rf"/{_ID}\.git/info/lfs/objects/verify")
def lfs_verify(call: Call) -> Answer:
    stored = call.repo().lfs_objects.get(call.json["oid"])
    if stored is None or len(stored) != call.json["size"]:
        raise HubError(404, "The object is not there, or of another size")
    return Answer.of_json({})


@route("GET HEAD", rf"/{_ID}/resolve/(?P<rev>[^/]+)/(?P<path>.+)")
def resolve(call: Call) -> Answer:
    repo, path, rev = call.repo(), call.args["path"], call.args["rev"]
    if repo.gated:
        raise HubError(403 if call.user else 401, f"Access to model {repo.id} is restricted.", "GatedRepo")
    stored = repo.file(path, rev)
    headers = {"X-Repo-Commit": repo.head(rev).sha, "ETag": f'"{stored.etag}"', "Accept-Ranges": "bytes"}
    if not stored.lfs:
        return _ranged(call, stored.data, headers)
    headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(stored.data))}
    # The Hub's address is a part of the CDN's, so that one pattern of a fault reaches both.
    location = f"{call.hub.cdn_url}/cdn/{stored.sha256}/{quote(repo.id)}/resolve/{quote(rev, safe='')}/{quote(path)}"
    return Answer(302, b"", {**headers, "Location": location})


@route("GET HEAD", rf"/(?P<oid>[0-9a-f]{{64}})/{_ID}/resolve/.+", cdn=True)
def cdn(call: Call) -> Answer:
    if "Authorization" in call.headers:
        raise HubError(400, "Only one auth mechanism allowed: the address is signed, the token must not come here")
    oid = call.args["oid"]
    return _ranged(
        call, call.hub.repos[call.args["id"]].lfs_objects[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
    )


def _store(repo: Repo, oid: str, data: bytes) -> None:
    if hashlib.sha256(data).hexdigest() != oid:
        raise HubError(400, "The content does not have the announced sha256")
    repo.lfs_objects[oid] = data


def _ranged(call: Call, data: bytes, headers: dict[str, str]) -> Answer:
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range", ""))
    headers = {"Content-Type": "application/octet-stream", **headers}
    if not asked:
        return Answer(200, data, headers)
    start, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
    if start > end:
        raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{len(data)}"})
    return Answer(206, data[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"})


def _front_matter(text: str) -> dict[str, Any]:
    found = re.match(r"\s*---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    return (yaml.safe_load(found[1]) or {}) if found else {}
