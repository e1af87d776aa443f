"""Repositories of the loopback Hub in memory: files, commits, branches and pull requests."""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import threading
from dataclasses import dataclass, field
from functools import cached_property

LFS_PATTERNS = ("*.safetensors", "*.png", "*.bin", "*.parquet", "*.pt", "*.npz")
LFS_SIZE = 10 * 2**20  # bytes; larger files are LFS whatever their name
POINTER_SIZE = 134  # bytes of an LFS pointer file, nearly constant


class HubError(Exception):
    """An answer with an error status.

    Args:
        status: HTTP status.
        message: Text of the answer.
        code: Value of the header X-Error-Code, by which the client picks its exception.
        headers: Further headers.
    """

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


@dataclass(frozen=True)
class StoredFile:
    """One version of a file."""

    data: bytes = field(repr=False)
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def blob_id(self) -> str:
        """The git blob id, of the pointer file for LFS."""
        data = self.data
        if self.lfs:
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(data)}\n"
            data = pointer.encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id


@dataclass(frozen=True)
class Commit:
    """A snapshot of all the files."""

    sha: str
    parent: str | None
    message: str
    tree: dict[str, StoredFile] = field(repr=False)


def is_lfs(path: str, size: int) -> bool:
    """Whether the Hub would keep a file of `size` bytes at `path` in LFS."""
    return size > 0 and (size > LFS_SIZE or any(fnmatch.fnmatch(path.rpartition("/")[2], p) for p in LFS_PATTERNS))


class Repo:
    """One repository.

    Args:
        repo_id: With or without a namespace; data sets with the prefix `datasets/`.
        private: Invisible without a token.
        gated: Files are refused to everybody; information is not.
    """

    def __init__(self, repo_id: str, private: bool = False, gated: bool = False):
        self.id, self.private, self.gated = repo_id, private, gated
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self._lock = threading.RLock()
        self._serial = itertools.count()
        self.commit({}, message="initial commit")

    @property
    def branches(self) -> list[str]:
        return [name for name in self.refs if not name.startswith("refs/")]

    @property
    def pull_requests(self) -> list[str]:
        return [name for name in self.refs if name.startswith("refs/pr/")]

    def head(self, rev: str = "main") -> Commit:
        """The commit of a branch, a pull request, or a full or abbreviated commit id.

        Raises:
            HubError: 404 RevisionNotFound.
        """
        sha = self.refs.get(rev, rev)
        found = [c for c in self.commits.values() if c.sha == sha or len(sha) >= 7 and c.sha.startswith(sha)]
        if not found:
            raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        return found[0]

    def files(self, rev: str = "main") -> dict[str, bytes]:
        """Contents by path."""
        return {path: stored.data for path, stored in sorted(self.head(rev).tree.items())}

    def file(self, path: str, rev: str = "main") -> StoredFile:
        """
        Raises:
            HubError: 404 RevisionNotFound or EntryNotFound.
        """
        commit = self.head(rev)
        if path not in commit.tree:
            raise HubError(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit.sha})
        return commit.tree[path]

    def commit(
        self,
        add: dict[str, bytes | StoredFile],
        delete: tuple[str, ...] = (),
        rev: str = "main",
        message: str = "",
        parent: str | None = None,
        create_pr: bool = False,
    ) -> tuple[Commit, str]:
        """Add a commit to a branch, or to a new pull request.

        Args:
            add: Contents by path; bytes become LFS or regular files by the rule of the Hub.
            delete: Paths; those that end in `/` are folders.
            rev: Branch or pull request.
            message: First line.
            parent: The commit, full or abbreviated, that `rev` must still be at.
            create_pr: Leave `rev` alone and open a pull request on it.

        Returns:
            The commit and the reference that it is on.

        Raises:
            HubError: 404 for an unknown branch or deleted path, 412 where `parent` is not the head.
        """
        with self._lock:
            if self.commits and rev not in self.refs:
                raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
            head = self.head(rev) if self.commits else None
            if parent is not None and not create_pr and not head.sha.startswith(parent):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            tree = dict(head.tree) if head else {}
            for path in delete:
                gone = [p for p in tree if p == path or path.endswith("/") and p.startswith(path)]
                if not gone:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                for p in gone:
                    del tree[p]
            for path, content in add.items():
                tree[path] = (
                    content if isinstance(content, StoredFile) else StoredFile(content, is_lfs(path, len(content)))
                )
                if tree[path].lfs:
                    self.lfs_objects[tree[path].sha256] = tree[path].data
            listing = "".join(f"{path} {stored.blob_id}\n" for path, stored in sorted(tree.items()))
            text = f"{self.id} {next(self._serial)} {head and head.sha} {message}\n{listing}"
            made = Commit(hashlib.sha1(text.encode()).hexdigest(), head and head.sha, message, tree)
            self.commits[made.sha] = made
            ref = f"refs/pr/{len(self.pull_requests) + 1}" if create_pr else rev
            self.refs[ref] = made.sha
            return made, ref

    def create_branch(self, name: str, start: str = "main") -> None:
        """
        Raises:
            HubError: 409 if it exists, 404 for an unknown start.
        """
        with self._lock:
            if name in self.refs:
                raise HubError(409, f"Reference already exists: {name}")
            self.refs[name] = self.head(start).sha

    def describe(self, path: str, stored: StoredFile) -> dict:
        """The entry of a file in the answers to `tree` and `paths-info`."""
        entry = {"type": "file", "path": path, "size": len(stored.data), "oid": stored.blob_id}
        if stored.lfs:
            entry["lfs"] = {"oid": stored.sha256, "size": len(stored.data), "pointerSize": POINTER_SIZE}
        return entry

    def listing(self, rev: str, folder: str = "", recursive: bool = False) -> list[dict]:
        """Files and folders below `folder`.

        Raises:
            HubError: 404 RevisionNotFound, or EntryNotFound for a folder that is not there.
        """
        commit = self.head(rev)
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        entries: dict[str, dict] = {}
        for path, stored in sorted(commit.tree.items()):
            if not path.startswith(prefix):
                continue
            *parents, _ = path[len(prefix) :].split("/")
            for depth in range(1, len(parents) + 1 if recursive else min(len(parents), 1) + 1):
                name = prefix + "/".join(parents[:depth])
                entries[name] = {
                    "type": "directory",
                    "path": name,
                    "size": 0,
                    "oid": hashlib.sha1(name.encode()).hexdigest(),
                }
            if recursive or not parents:
                entries[path] = self.describe(path, stored)
        if prefix and not entries:
            raise HubError(404, f"{folder} does not exist on {rev!r}", "EntryNotFound", {"X-Repo-Commit": commit.sha})
        return list(entries.values())
