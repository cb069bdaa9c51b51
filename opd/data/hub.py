"""The Hugging Face hub, online or offline."""

from functools import cache
from pathlib import Path

import datasets
from huggingface_hub import HfApi, constants, get_session, hf_hub_download

from opd.errors import OutputError


@cache
def detect_offline() -> None:
    """Make the libraries use their caches only if the hub is unreachable, where each would retry for a minute. Asks the hub once."""
    if not constants.HF_HUB_OFFLINE:
        try:
            get_session().head(constants.ENDPOINT, timeout=10)
        except Exception:  # noqa: BLE001 - errors of the transport differ between versions of the hub's client
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def expect(source: str) -> None:
    """Prepare for loading `source`: unless it is a local folder, find out whether the hub is reachable."""
    if not Path(source).is_dir():
        detect_offline()


def model_card(repository: str, revision: str | None) -> str:
    """Return the text of a model's README, or an empty text if it is not available."""
    detect_offline()
    try:
        return Path(hf_hub_download(repository, "README.md", revision=revision)).read_text(encoding="utf-8", errors="replace")
    except Exception:  # noqa: BLE001 - see above; a repository may also have none
        return ""


def push(folder: Path, repository: str) -> str:
    """Upload a model folder, to a new private repository if there is none, and return its address. Raises `OutputError`."""
    try:
        hub = HfApi()
        address = hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Model distilled with opd")
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OutputError(f"--push {repository}: {reason}; log in with `hf auth login`. The model is in {folder}") from error
    return str(address)
