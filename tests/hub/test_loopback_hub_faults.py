"""What the real client makes of the faults of the loopback Hub."""

import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants, get_session, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from loopback_files import BIG, FILES, WEIGHTS, read, write


def cached_blobs():
    """Everything that the cache holds of file contents, finished or not."""
    return [p.name for p in Path(constants.HF_HUB_CACHE).glob("*/blobs/*")]


def transport_error(name):
    """An exception of the HTTP library under the client (httpx, httpx2): its name is what they share."""
    errors = sys.modules[type(get_session()).__module__.partition(".")[0]]
    return getattr(errors, name)


def test_resume_after_dropped_connections(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**16)  # the client keeps whole chunks, by default 10 MiB
    hub.add_repo("me/x", FILES)
    fault = hub.inject(f"GET .*resolve/main/{WEIGHTS}", "drop", times=2, after=70_000)
    assert Path(hf_hub_download("me/x", WEIGHTS)).read_bytes() == BIG
    got = [(one.status, one.headers.get("range")) for one in hub.matching(f"GET .*{WEIGHTS}")]
    assert got == [(200, None), (206, "bytes=65536-"), (206, "bytes=131072-")]
    assert fault.fired == hub.fired == 2 and fault.times == 0 and hub.waits == [1, 1]


DOWNLOADS = {  # fault of the GET -> exception, GETs that the client sends
    "dropped once": ("drop", {}, None, 2),
    "dropped always": ("drop", {"times": 99}, "RemoteProtocolError", 6),
    "not answered once": ("lose", {}, None, 2),
    "reset once": ("reset", {}, "ReadError", 1),
    "truncated": ("truncate", {}, OSError, 1),
    "401": ("status", {"status": 401}, 401, 1),
    "403": ("status", {"status": 403}, 403, 1),
    "404": ("status", {"status": 404}, 404, 1),
    "429 once": ("status", {"status": 429, "retry_after": 3}, None, 2),
    "429 always": ("status", {"status": 429, "times": 99}, 429, 6),
    "500 once": ("status", {"status": 500}, 500, 1),
    "503 once": ("status", {"status": 503}, 503, 1),
}


@pytest.mark.parametrize("name", DOWNLOADS)
def test_spoilt_downloads(hub, name):
    kind, details, expected, gets = DOWNLOADS[name]
    hub.add_repo("me/x", FILES)
    fault = hub.inject(f"GET .*{WEIGHTS}", kind, **details)
    if expected is None:
        hf_hub_download("me/x", WEIGHTS)
    else:
        error = transport_error(expected) if isinstance(expected, str) else OSError
        with pytest.raises(error) as raised:
            hf_hub_download("me/x", WEIGHTS)
        if isinstance(expected, int):
            assert isinstance(raised.value, HfHubHTTPError) and raised.value.response.status_code == expected
        elif expected is OSError:
            assert "Consistency check failed" in str(raised.value)
        assert not cached_blobs()  # nothing finished, nothing half done
    assert len(hub.matching(f"GET .*{WEIGHTS}")) == gets and fault.fired == (gets if expected else 1)
    assert hub.waits == {"429 once": [4], "429 always": [1, 2, 4, 8, 8]}.get(name, [1] * (gets - 1))
    fault.times = 0
    assert Path(hf_hub_download("me/x", WEIGHTS)).read_bytes() == BIG


def test_corrupt_download_is_cached_for_good(hub):
    """The client does not compare contents with the etag."""
    hub.add_repo("me/x", FILES)
    hub.inject(f"GET .*{WEIGHTS}", "corrupt", after=5)
    wrong = BIG[:5] + bytes([BIG[5] ^ 0xFF]) + BIG[6:]
    assert Path(hf_hub_download("me/x", WEIGHTS)).read_bytes() == wrong
    assert Path(hf_hub_download("me/x", WEIGHTS)).read_bytes() == wrong
    assert Path(hf_hub_download("me/x", WEIGHTS, force_download=True)).read_bytes() == BIG


@pytest.mark.parametrize("status, times", [(429, 1), (503, 1), (503, 99), (403, 1), (404, 1), (401, 1)])
def test_spoilt_metadata(hub, status, times):
    hub.add_repo("me/x", FILES)
    fault = hub.inject(f"HEAD .*{WEIGHTS}", "status", times=times, status=status)
    if status in (429, 503) and times == 1:
        hf_hub_download("me/x", WEIGHTS)
    elif status == 401:
        with pytest.raises(HfHubHTTPError):
            hf_hub_download("me/x", WEIGHTS)
    else:
        with pytest.raises(LocalEntryNotFoundError) as raised:
            hf_hub_download("me/x", WEIGHTS)
        assert raised.value.__cause__.response.status_code == status
    assert fault.fired == (7 if times == 99 else 1)
    # What the cache has already is used without a word.
    fault.times = 0
    path = hf_hub_download("me/x", WEIGHTS)
    fault.times = 1
    assert hf_hub_download("me/x", WEIGHTS) == path and fault.times == 0


def test_stalls(hub, monkeypatch):
    for module, name in ((constants, "HF_HUB_DOWNLOAD_TIMEOUT"), (constants, "HF_HUB_ETAG_TIMEOUT")):
        monkeypatch.setattr(module, name, 0.8)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**16)
    hub.add_repo("me/x", FILES)
    faults = [hub.inject(f"{method} .*{WEIGHTS}", "stall", seconds=60) for method in ("HEAD", "GET")]
    faults.append(hub.inject(f"GET .*{WEIGHTS}", "stall", seconds=60, after=100_000))
    assert Path(hf_hub_download("me/x", WEIGHTS)).read_bytes() == BIG
    assert [fault.fired for fault in faults] == [1, 1, 1]
    assert hub.log[-1].headers["range"] == "bytes=65536-"


def test_interrupted_snapshot_keeps_what_it_has(hub, tmp_path):
    hub.add_repo("me/x", FILES)
    hub.inject(f"GET .*{WEIGHTS}", "truncate")
    with pytest.raises(OSError, match="Consistency check failed"):
        snapshot_download("me/x", max_workers=1)
    done = len(cached_blobs())
    assert read(snapshot_download("me/x")) == FILES
    assert 1 <= done < len(FILES) and len(hub.matching("GET .*config.json")) == 1


UPLOADS = {  # request -> (what 503 always gives, how many requests the client sends)
    "repos/create": (HfHubHTTPError, 1),
    "preupload": (HfHubHTTPError, 6),
    "objects/batch": (HfHubHTTPError, 6),
    "PUT .*part=2": (RuntimeError, 6),
    "complete_multipart": (RuntimeError, 6),
    "objects/verify": (RuntimeError, 6),
    "/commit/main": (HfHubHTTPError, 1),
}


@pytest.mark.parametrize("match", UPLOADS)
def test_spoilt_uploads(hub, tmp_path, match):
    hub.part_size = 100_000
    files = {"config.json": b"{}", WEIGHTS: BIG}
    folder = write(tmp_path / "in", files)
    error, sent = UPLOADS[match]

    def upload():
        HfApi().create_repo("me/x", exist_ok=True)
        HfApi().upload_folder(repo_id="me/x", folder_path=folder)

    fault = hub.inject(match, "status", times=99, status=503)
    with pytest.raises(error) as raised:
        upload()
    assert fault.fired == sent and hub.waits == [1, 2, 4, 8, 8][: sent - 1]
    assert isinstance(raised.value if error is HfHubHTTPError else raised.value.__cause__, HfHubHTTPError)
    fault.times = 0
    for repo in hub.repos.values():
        assert not repo.files()
        repo.lfs_objects.clear()  # what has come already would not be sent again
    # One dropped connection: retried, but for the two requests that are never retried.
    fault = hub.inject(match, "drop", after=1000)
    if sent == 1:
        with pytest.raises(transport_error("TransportError")):
            upload()
        assert not any(repo.files() for repo in hub.repos.values())
        upload()
    else:
        upload()
    assert fault.fired == 1 and hub.repos["me/x"].files() == files and len(hub.repos["me/x"].commits) == 2


def test_lost_answer_to_a_commit(hub):
    repo = hub.add_repo("me/x")
    hub.inject("/commit/main", "lose", times=2)
    file = {"repo_id": "me/x", "path_or_fileobj": BIG, "path_in_repo": WEIGHTS}
    with pytest.raises(transport_error("RemoteProtocolError")):
        HfApi().upload_file(**file)
    made = HfApi().upload_file(**file)  # finds it done
    assert repo.files() == {WEIGHTS: BIG} and made.oid == repo.head().sha and len(repo.commits) == 2
    with pytest.raises(transport_error("RemoteProtocolError")):
        HfApi().upload_file(create_pr=True, **{**file, "path_in_repo": "b.bin"})
    assert HfApi().upload_file(create_pr=True, **{**file, "path_in_repo": "b.bin"}).pr_num == 2
