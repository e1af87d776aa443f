"""What a broken connection, a wrong answer or a damaged file does to loading and publishing: an error or a retry."""

from pathlib import Path

import pytest
import timm
import torch

from timm_collapse import CollapseError, CollapseOrder
from timm_collapse.hub.publish import push
from timm_collapse.hub.save import save_model

RANKER = {"img_size": 16, "patch_size": 4, "dim": 32, "depth": 1, "phases": (0.0, 0.5)}
WEIGHTS = "GET .*resolve/.*/model.safetensors"
ANY = "(HEAD|GET) .*resolve/.*/model.safetensors"


@pytest.fixture
def ranker():
    return timm.create_model("collapse_ranker_tiny", **RANKER).eval()


@pytest.fixture
def folder(ranker, tmp_path):
    return save_model(ranker, tmp_path / "model")


@pytest.fixture
def published(folder, hub):
    hub.add_repo("me/ranker", {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")})
    return hub


def load():
    return CollapseOrder.from_pretrained("me/ranker").model


def same(one, other):
    return all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())


def left_behind(hub_home):
    """Weight files in the cache, whole or in parts."""
    return [p for p in Path(hub_home).rglob("*") if p.is_file() and p.stat().st_size > 4000]


HEALED = {
    "connection dropped in the file": dict(match=WEIGHTS, kind="drop"),
    "connection reset in the file": dict(match=WEIGHTS, kind="reset"),
    "connection dropped before the answer": dict(match=ANY, kind="drop", after=0),
    "too many requests": dict(match=ANY, kind="status", status=429, retry_after=1),
    "not available": dict(match="HEAD .*model.safetensors", kind="status", status=503),
    "truncated file": dict(match=WEIGHTS, kind="truncate"),
    "wrong hash": dict(match=WEIGHTS, kind="corrupt"),
    "wrong hash twice": dict(match=WEIGHTS, kind="corrupt", times=2),
}


@pytest.mark.parametrize("name", HEALED)
def test_a_passing_fault_is_healed(name, published, ranker):
    fault = published.inject(**HEALED[name])
    assert same(ranker, load()) and fault.fired >= 1
    requests = len(published.matching(WEIGHTS))
    assert same(ranker, load()) and len(published.matching(WEIGHTS)) == requests  # cached, whole


LASTING = {
    "connection dropped in the file": (dict(match=WEIGHTS, kind="drop"), "peer closed|disconnected"),
    "connection reset in the file": (dict(match=WEIGHTS, kind="reset"), "ReadError"),
    "unauthorised": (dict(match=ANY, kind="status", status=401), "401"),
    "forbidden": (dict(match=ANY, kind="status", status=403), "403"),
    "no such repository": (dict(match=ANY, kind="status", status=404, code="RepoNotFound"), "RepositoryNotFound.*404"),
    "no such file": (dict(match=ANY, kind="status", status=404, code="EntryNotFound"), "EntryNotFound.*404"),
    "too many requests": (dict(match=ANY, kind="status", status=429, retry_after=1), "429"),
    "not available": (dict(match=ANY, kind="status", status=503), "503"),
    "truncated file": (dict(match=WEIGHTS, kind="truncate"), "should be of size"),
    "wrong hash": (dict(match=WEIGHTS, kind="corrupt"), "is damaged: 3 times its content did not have the hash"),
}


@pytest.mark.parametrize("name", LASTING)
def test_a_lasting_fault_is_one_error_and_leaves_nothing(name, published, ranker, tmp_path):
    fault, message = LASTING[name]
    fault = published.inject(**fault, times=1000)
    with pytest.raises(CollapseError, match=f"pretrained: model.safetensors of 'me/ranker'.*({message})") as caught:
        load()
    assert "\n" not in str(caught.value) and fault.fired >= 1
    assert not left_behind(tmp_path / "hf_home")
    fault.times = 0
    assert same(ranker, load())  # nothing in the cache stands in the way


@pytest.mark.parametrize("name", ["wrong hash", "truncated file", "not available"])
def test_timms_own_name_gives_the_same_errors(name, published, tmp_path):
    fault, message = LASTING[name]
    published.inject(**fault, times=1000)
    with pytest.raises(CollapseError, match=message):
        timm.create_model("hf-hub:me/ranker", pretrained=True)
    assert not left_behind(tmp_path / "hf_home")


def test_an_unreachable_hub_falls_back_to_what_is_cached(published, ranker):
    assert same(ranker, load())
    published.inject("(HEAD|GET)", kind="status", status=503, times=1000)
    assert same(ranker, load())


UPLOAD_HEALED = {
    "dropped in mid-upload": dict(match="PUT ", kind="drop", after=1000),
    "upload answered with 503": dict(match="PUT ", kind="status", status=503),
    "upload answered with 429": dict(match="PUT ", kind="status", status=429, retry_after=1),
    "upload done, answer lost": dict(match="PUT ", kind="lose"),
    "batch answered with 503": dict(match="info/lfs/objects/batch", kind="status", status=503),
}


@pytest.mark.parametrize("name", UPLOAD_HEALED)
def test_a_passing_fault_of_an_upload_is_healed(name, hub, folder, ranker):
    fault = hub.inject(**UPLOAD_HEALED[name])
    push(folder, "me/ranker")
    assert fault.fired == 1 and same(ranker, load())


UPLOAD_LASTING = {
    "dropped in mid-upload": (dict(match="PUT ", kind="drop", after=1000), "run the same command again"),
    "upload answered with 503": (dict(match="PUT ", kind="status", status=503), "503.*run the same command again"),
    "unauthorised": (dict(match="POST .*commit", kind="status", status=401), "hf auth login"),
    "forbidden": (dict(match="POST /api/repos/create", kind="status", status=403), "403.*hf auth login"),
    "commit answered with 503": (dict(match="POST .*commit", kind="status", status=503), "503.*again"),
    "commit answered with 429": (dict(match="POST .*commit", kind="status", status=429), "429.*again"),
    "no such repository": (dict(match="POST .*preupload", kind="status", status=404, code="RepoNotFound"), "404"),
    "connection closed at the start": (dict(match="POST /api/repos/create", kind="drop"), "Disconnected|disconnected"),
}


@pytest.mark.parametrize("name", UPLOAD_LASTING)
def test_a_lasting_fault_of_an_upload_leaves_no_half_model_and_is_mended_by_running_again(name, hub, folder, ranker):
    fault, message = UPLOAD_LASTING[name]
    fault = hub.inject(**fault, times=1000)
    with pytest.raises(CollapseError, match=f"repo_id: 'me/ranker' could not be written.*({message})") as caught:
        push(folder, "me/ranker")
    assert "\n" not in str(caught.value) and fault.fired >= 1
    assert "me/ranker" not in hub.repos or set(hub.repos["me/ranker"].files()) <= {".gitattributes"}
    sent = len(hub.matching("PUT "))
    fault.times = 0
    push(folder, "me/ranker")
    assert same(ranker, load())
    if "commit" in name:  # the large file was there already
        assert len(hub.matching("PUT ")) == sent


def test_what_is_there_already_is_not_sent_twice(hub, folder):
    first = push(folder, "me/ranker")
    sent = len(hub.matching("PUT "))
    assert sent == 1 and push(folder, "me/ranker") == first and len(hub.matching("PUT ")) == sent


def test_a_lost_answer_to_the_commit_does_no_harm(hub, folder, ranker):
    hub.inject("POST .*commit", kind="lose")
    with pytest.raises(CollapseError, match="run the same command again"):
        push(folder, "me/ranker")
    commits = hub.repos["me/ranker"].head()
    push(folder, "me/ranker")
    assert hub.repos["me/ranker"].head() == commits and same(ranker, load())


def test_a_folder_without_a_model_is_not_sent(hub, tmp_path):
    with pytest.raises(CollapseError, match="folder: .* holds no saved model"):
        push(tmp_path, "me/ranker")
    assert not hub.log
