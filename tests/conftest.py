import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for the net
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each worker, and for what it starts
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder: an empty one of its own; tables are 160 columns wide."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "160")
    return folder


# Siblings of this file can be imported by name; last, so that nothing installed is hidden.
sys.path.append(str(Path(__file__).parent))

# Read by the child before anything else: its retries need not wait either.
_SHORT_SLEEPS = "import time\n_sleep = time.sleep\ntime.sleep = lambda seconds: _sleep(min(seconds, 0.02))\n"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on this computer that huggingface_hub, timm and transformers use, with an empty cache and short retries.

    Yields:
        LoopbackHub; `env` is the environment for subprocesses, `waits` the seconds that retries asked to sleep.
    """
    import huggingface_hub
    import transformers.utils.hub
    from huggingface_hub import constants, file_download, hf_api
    from huggingface_hub.utils import _cache_manager, _http
    from loopback_hub import LoopbackHub

    close_session = getattr(huggingface_hub, "close_session", lambda: None)  # since 1.0
    home = tmp_path / "hf_home"
    early = tmp_path / "early"
    early.mkdir()
    (early / "sitecustomize.py").write_text(_SHORT_SLEEPS)
    with LoopbackHub() as hub:
        variables = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_XET_CACHE": str(home / "xet"),
            "HF_TOKEN": hub.token,
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        path = os.pathsep.join(filter(None, (str(early), os.environ.get("PYTHONPATH"))))
        hub.env = {**os.environ, "PYTHONPATH": path}
        captured = {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HUGGINGFACE_HUB_CACHE": str(home / "hub"),
            "HF_ASSETS_CACHE": str(home / "assets"),
            "HF_XET_CACHE": str(home / "xet"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
        }
        for name, value in captured.items():
            monkeypatch.setattr(constants, name, value, raising=False)
        monkeypatch.setattr(_cache_manager, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(hf_api.api, "endpoint", hub.url)  # the object behind huggingface_hub.create_repo etc.
        monkeypatch.setattr(transformers.utils.hub, "HF_MODULES_CACHE", str(home / "modules"))
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)  # keeps the address it first saw

        def sleep(seconds):
            hub.waits.append(seconds)
            time.sleep(min(seconds, 0.02))

        for module in (file_download, _http):
            monkeypatch.setattr(module, "time", SimpleNamespace(**{**vars(time), "sleep": sleep}))
        close_session()
        yield hub
        close_session()
        assert not hub.unknown, f"requests that the loopback Hub does not know: {hub.unknown}"
