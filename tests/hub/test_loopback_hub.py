"""The loopback Hub under the real client: what is stored comes back, and what is not there is refused."""

import hashlib
import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import HfApi, file_download, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from loopback_files import BIG, FILES, WEIGHTS, read, write
from loopback_hub import LoopbackHub
from timm.models import save_for_hf


def test_upload_and_snapshot(hub, tmp_path):
    hub.part_size = 100_000
    api = HfApi()
    assert api.whoami()["name"] == "me"
    assert api.create_repo("x", private=True).repo_id == "me/x"
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("me/x")
    api.create_repo("me/x", exist_ok=True)
    made = api.upload_folder(repo_id="me/x", folder_path=write(tmp_path / "in", FILES), commit_message="all")
    repo = hub.repos["me/x"]
    assert repo.private and repo.files() == FILES and repo.head().sha == made.oid and repo.head().message == "all"
    assert [one.path[-7:] for one in hub.matching("PUT .*part=")] == ["?part=1", "?part=2", "?part=3"]
    assert {path for path, stored in repo.head().tree.items() if stored.lfs} == {WEIGHTS, "sub/deep/y.png"}
    assert read(snapshot_download("me/x", local_dir=tmp_path / "out", cache_dir=tmp_path / "c")) | FILES == read(
        tmp_path / "out"
    )
    info = api.model_info("me/x", files_metadata=True)
    assert info.private and info.sha == made.oid
    assert {s.rfilename: s.size for s in info.siblings} == {path: len(data) for path, data in FILES.items()}
    for token in (False, "hf_other"):  # neither nobody nor somebody else may see it
        with pytest.raises(HfHubHTTPError) as error:
            hf_hub_download("me/x", "config.json", token=token)
        assert error.value.response.status_code == 401
    # Unchanged files are neither sent nor committed again.
    before = len(hub.matching("PUT"))
    again = api.upload_folder(repo_id="me/x", folder_path=tmp_path / "in")
    assert again.oid == made.oid and len(hub.matching("PUT")) == before and len(repo.commits) == 2


def test_blob_ids(hub):
    repo = hub.add_repo("me/x", FILES)
    listed = {f.path: f for f in HfApi().list_repo_tree("me/x", recursive=True) if hasattr(f, "size")}
    assert listed.keys() == FILES.keys()
    # `git hash-object` of the same bytes.
    assert listed["sub/x.txt"].blob_id == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert listed[WEIGHTS].lfs.sha256 == hashlib.sha256(BIG).hexdigest() and listed["config.json"].lfs is None
    etags = {path: file_download.get_hf_file_metadata(file_download.hf_hub_url("me/x", path)).etag for path in FILES}
    assert etags == {path: f.lfs.sha256 if f.lfs else f.blob_id for path, f in listed.items()}
    assert [f.path for f in HfApi().list_repo_tree("me/x")] == ["config.json", WEIGHTS, "sub"]
    assert [f.path for f in HfApi().list_repo_tree("me/x", "sub")] == ["sub/deep", "sub/x.txt"]
    assert [f.path for f in HfApi().get_paths_info("me/x", ["sub/deep", "nope", WEIGHTS])] == ["sub/deep", WEIGHTS]
    with pytest.raises(RemoteEntryNotFoundError):
        list(HfApi().list_repo_tree("me/x", "nope"))
    assert repo.head().parent in repo.commits


def test_branches_deletions_and_stale_parents(hub):
    api = HfApi()
    first = hub.add_repo("me/x", FILES).head().sha
    api.create_branch("me/x", branch="dev/1")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch("me/x", branch="dev/1")
    api.create_branch("me/x", branch="dev/1", exist_ok=True)
    second = api.upload_file(repo_id="me/x", path_or_fileobj=b"new", path_in_repo="config.json", revision="dev/1").oid
    api.delete_folder("sub", "me/x", revision="dev/1")
    assert hub.repos["me/x"].files() == FILES
    assert hub.repos["me/x"].files("dev/1") == {"config.json": b"new", WEIGHTS: BIG}
    assert Path(hf_hub_download("me/x", "config.json", revision="dev/1")).read_bytes() == b"new"
    assert Path(hf_hub_download("me/x", "sub/x.txt", revision=second)).read_bytes() == b""
    assert {b.name: b.target_commit for b in api.list_repo_refs("me/x").branches}["main"] == first
    stale = {"repo_id": "me/x", "path_or_fileobj": b"z", "path_in_repo": "z", "parent_commit": second[:8]}
    with pytest.raises(HfHubHTTPError, match="412"):
        api.upload_file(revision="dev/1", **stale)
    with pytest.raises(HfHubHTTPError, match="A file with this name doesn't exist"):
        api.delete_file("nope", "me/x")


def test_pull_request_needs_no_right_to_write(hub):
    hub.add_repo("timm/x", FILES)
    for call in (
        lambda: HfApi().create_repo("timm/y"),
        lambda: HfApi().upload_file(repo_id="timm/x", path_or_fileobj=b"", path_in_repo="z"),
    ):
        with pytest.raises(HfHubHTTPError) as error:
            call()
        assert error.value.response.status_code == 403
    made = HfApi().upload_file(repo_id="timm/x", path_or_fileobj=BIG[::-1], path_in_repo=WEIGHTS, create_pr=True)
    assert made.pr_num == 1 and made.pr_revision == "refs/pr/1"
    assert hub.repos["timm/x"].files() == FILES
    assert hub.repos["timm/x"].files("refs/pr/1") == {**FILES, WEIGHTS: BIG[::-1]}
    assert Path(hf_hub_download("timm/x", WEIGHTS, revision="refs/pr/1")).read_bytes() == BIG[::-1]


def test_ids_without_a_namespace_and_datasets(hub, tmp_path):
    hub.add_repo("gpt", {"README.md": b"---\nlibrary_name: timm\ntags: [a]\n---\n"})
    info = HfApi().model_info("gpt")
    assert info.id == "gpt" and info.library_name == "timm" and info.tags == ["a"]
    assert [b.name for b in HfApi().list_repo_refs("gpt").branches] == ["main"]
    assert read(snapshot_download("gpt")) == hub.repos["gpt"].files()
    HfApi().create_repo("me/d", repo_type="dataset")
    HfApi().upload_folder(repo_id="me/d", repo_type="dataset", folder_path=write(tmp_path / "in", {"a.parquet": BIG}))
    assert hub.repos["datasets/me/d"].files() == {"a.parquet": BIG} and "me/d" not in hub.repos
    assert Path(hf_hub_download("me/d", "a.parquet", repo_type="dataset")).read_bytes() == BIG


def test_invalid_model_card(hub):
    hub.add_repo("me/x")
    card = {"repo_id": "me/x", "path_in_repo": "README.md"}
    with pytest.raises(ValueError, match="Invalid metadata in README.md"):
        HfApi().upload_file(path_or_fileobj=b"---\na: [\n---\n", **card)
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        HfApi().upload_file(path_or_fileobj=b"# x\n", **card)


def test_second_download_asks_only_for_the_etag(hub):
    repo = hub.add_repo("me/x", FILES)
    path = hf_hub_download("me/x", WEIGHTS)
    assert hf_hub_download("me/x", WEIGHTS) == path
    assert [(one.method, one.status) for one in hub.log] == [("HEAD", 302), ("GET", 200), ("HEAD", 302)]
    # The token goes to the Hub, never to the CDN, which is another origin.
    assert ["authorization" in one.headers for one in hub.log] == [True, False, True]
    repo.commit({WEIGHTS: BIG[::-1]})
    assert Path(hf_hub_download("me/x", WEIGHTS)).read_bytes() == BIG[::-1] and Path(path).read_bytes() == BIG


def test_what_is_not_there(hub):
    repo = hub.add_repo("me/x", FILES)
    for token, status in ((None, 404), (False, 401)):
        with pytest.raises(RepositoryNotFoundError) as raised:
            hf_hub_download("me/nope", WEIGHTS, token=token)
        assert raised.value.response.status_code == status
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info("me/nope")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("me/x", WEIGHTS, revision="nope")
    with pytest.raises(RevisionNotFoundError):
        HfApi().upload_file(repo_id="me/x", path_or_fileobj=b"", path_in_repo="z", revision="nope")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("me/x", "nope.txt")
    repo.gated = True
    with pytest.raises(GatedRepoError):
        hf_hub_download("me/x", WEIGHTS)


def small_vit(folder):
    model_args = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **model_args)
    save_for_hf(model, str(folder), safe_serialization=True)
    # timm 1.0.31 writes num_classes twice, transformers 5.23 refuses that; older folders on the Hub have it once.
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_args": model_args}))
    return model.eval()


@pytest.mark.parametrize("again", (False, True))  # what the libraries remember of one Hub must not reach the next
def test_timm_and_transformers_load_from_it(hub, tmp_path, caplog, again):
    from transformers import AutoModelForImageClassification

    model = small_vit(tmp_path / "vit")
    huggingface_hub.create_repo("me/vit", private=True)
    huggingface_hub.upload_folder(repo_id="me/vit", folder_path=tmp_path / "vit")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(timm.create_model("hf-hub:me/vit", pretrained=True).eval()(images), expected)
        loaded = AutoModelForImageClassification.from_pretrained("me/vit").eval()
        assert torch.equal(loaded(images).logits, expected)
    assert len(hub.matching(f"GET .*{WEIGHTS}")) == 1  # the two share the cache
    assert "Could not reach the Hub" not in caplog.text
    hub.repos["me/vit"].commit({}, delete=(WEIGHTS,))
    with pytest.raises(RemoteEntryNotFoundError):
        timm.create_model("hf-hub:me/vit", pretrained=True)


def test_subprocess(hub):
    hub.add_repo("me/x", FILES, private=True)
    hub.inject("HEAD", "status", times=6, status=503)
    code = f"from huggingface_hub import hf_hub_download; print(hf_hub_download('me/x', '{WEIGHTS}'))"
    run = subprocess.run([sys.executable, "-c", code], env=hub.env, capture_output=True, text=True, timeout=20)
    assert run.returncode == 0, run.stderr
    path = Path(run.stdout.strip())
    assert path.read_bytes() == BIG and path.is_relative_to(hub.env["HF_HOME"]) and hub.fired == 6


def test_unknown_requests_are_loud():
    with LoopbackHub() as hub:
        with pytest.raises(urllib.error.HTTPError) as raised:
            urllib.request.urlopen(f"{hub.url}/api/spaces/me/x?a=1")
        assert raised.value.code == 501 and hub.unknown == ["GET /api/spaces/me/x?a=1"]
        assert hub.requests == [("GET", "/api/spaces/me/x?a=1", 501)]
        with pytest.raises(ValueError, match="kind: must be one of .*got 'explode'"):
            hub.inject(".", "explode")


def test_wrong_contents_are_refused(hub):
    """Uploads must match their announced sha256, and a commit must not point at what never came."""
    repo = hub.add_repo("me/x")
    oid = hashlib.sha256(BIG).hexdigest()

    def send(method, url, body):
        request = urllib.request.Request(url, body, {"Authorization": f"Bearer {hub.token}"}, method=method)
        with pytest.raises(urllib.error.HTTPError) as raised:
            urllib.request.urlopen(request)
        return raised.value.code

    assert send("PUT", f"{hub.cdn_url}/cdn/upload/{oid}/me/x", BIG[1:]) == 400
    assert (
        send("POST", f"{hub.url}/me/x.git/info/lfs/objects/verify", json.dumps({"oid": oid, "size": 1}).encode()) == 404
    )
    line = {"key": "lfsFile", "value": {"path": WEIGHTS, "algo": "sha256", "oid": oid, "size": len(BIG)}}
    assert send("POST", f"{hub.url}/api/models/me/x/commit/main", json.dumps(line).encode()) == 400
    assert not repo.lfs_objects and not repo.files()
