"""The Hugging Face hub, or its absence."""

from functools import cache
from pathlib import Path

import datasets
from huggingface_hub import constants, get_session


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
