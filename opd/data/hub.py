"""The Hugging Face hub, or its absence."""

from functools import cache
from pathlib import Path

import datasets
from huggingface_hub import HfApi, constants, get_session, hf_hub_download

from opd.errors import OutputError


@cache
def offline() -> bool:
    """Whether the hub cannot be reached; asked once. The libraries then look into their caches alone, instead of trying for a minute."""
    if constants.HF_HUB_OFFLINE:
        return True
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # noqa: BLE001 - the transport's own errors, which differ between versions of the hub's client
        constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True
        return True
    return False


def expect(source: str) -> None:
    """Prepare for loading `source`: a local folder needs nothing, a hub id an answer of the hub or the caches."""
    if not Path(source).is_dir():
        offline()


def model_card(repository: str, revision: str | None) -> str:
    """The text of a model's README; empty where it cannot be had."""
    offline()
    try:
        return Path(hf_hub_download(repository, "README.md", revision=revision)).read_text(encoding="utf-8", errors="replace")
    except Exception:  # noqa: BLE001 - as above, and a repository without one
        return ""


def push(folder: Path, repository: str) -> str:
    """Upload a model folder, to a private repository where there is none yet, and return its address. Raises `OutputError`."""
    try:
        hub = HfApi()
        address = hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Model distilled with opd")
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OutputError(f"--push {repository}: {reason}; log in with `hf auth login`. The model is in {folder}") from error
    return str(address)
