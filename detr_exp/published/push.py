"""Files to a repository of the Hugging Face hub, by its own client: `HF_TOKEN` and `HF_ENDPOINT` are respected."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from detr_exp.published.download import UnreachableError, refuse_unreachable
from detr_exp.published.fetch import OFFLINE, is_kept_offline
from detr_exp.published.hub import hub_address, in_words, is_offline
from detr_exp.published.source import is_repo

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
QUICK = 10.0  # seconds in which the hub answers a question
PATIENCE = 120.0  # seconds of silence while it receives files or checks them
REFUSED = {  # answers of the hub to a request that no repetition would mend
    400: "the hub does not take it",
    401: "HF_TOKEN is not valid; make one at {hub}/settings/tokens",
    402: "the hub wants to be paid for it",
    403: "HF_TOKEN may not write there; use a token with write access, and a repository of your own: push=owner/name",
    404: "there is no such owner, or HF_TOKEN may not see the repository; push=owner/name",
    409: "somebody else changes the repository at this moment, or has; look at it, and push again",
    413: "it is too large for the hub",
}

logger = logging.getLogger(__name__)


class PushError(RuntimeError):
    """The hub does not answer, or cannot now; the same command may succeed later."""


def refuse_push(repo: str, files: Sequence[str], *, replace: bool) -> None:
    """Find out within a second, or with one answer of the hub, that files cannot be pushed; nothing is sent.

    Args:
        repo: `owner/name`.
        files: names in the repository.
        replace: whether the repository may have such files already.

    Raises:
        ValueError: the name is none, there is no network or no token, or there are such files.
        PushError: the hub does not answer.
    """
    _refuse_name(repo)
    if offline := OFFLINE if is_kept_offline() else "HF_HUB_OFFLINE" if is_offline() else "":
        raise ValueError(f"push={repo} needs the network, and {offline} is set; unset it, or leave push out")
    from huggingface_hub import HfApi, errors, get_token  # slow to import

    if get_token() is None:
        raise ValueError(
            f"push={repo} needs a token of the hub with write access; make one at {hub_address()}/settings/tokens, and "
            "set HF_TOKEN, or log in: hf auth login"
        )
    try:
        refuse_unreachable(hub_address())
    except UnreachableError as error:
        raise ValueError(f"push={repo} needs the network: {error}; leave push out") from None
    held: set[str] = set()
    with _meaning(repo), suppress(errors.RepositoryNotFoundError):
        held = {sibling.rfilename for sibling in HfApi().model_info(repo, timeout=QUICK).siblings or ()}
    if (there := sorted(held.intersection(files))) and not replace:
        raise ValueError(
            f"{hub_address()}/{repo} has {', '.join(there)} already; push to another repository, or replace them (its "
            "history keeps the earlier ones): replace=true"
        )


def _refuse_name(repo: str) -> None:
    """Raises: ValueError: the hub does not take this as the name of a repository."""
    if not is_repo(str(repo)):
        raise ValueError(
            f"push={repo} names no repository; write push=owner/name, with letters, digits and single - _ . in them"
        )


def signed(card: str) -> str:
    """A model card with a comment by which it is known later whether somebody has edited it."""
    return f"{card}\n<!-- {hashlib.sha256(card.encode()).hexdigest()} -->\n"


def push(folder: Path, repo: str, files: Sequence[str], *, private: bool) -> str:
    """Send files in one commit. A model card in the repository that somebody has edited stays.

    Args:
        folder: that has them.
        repo: `owner/name`; created if it is not there.
        files: names in the folder and in the repository.
        private: whether a repository that is created is seen by its owner alone.

    Returns:
        the address of the repository.

    Raises:
        ValueError: the hub refuses them.
        PushError: it does not answer, or cannot take them now.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import get_session

    get_session().timeout = PATIENCE  # the client itself would wait for ever
    api = HfApi()
    with _meaning(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        if CARD in files and _has_edited_card(api, repo):
            files = [name for name in files if name != CARD]
            logger.warning("%s of %s has been edited, and stays as it is; the new one is in %s", CARD, repo, folder)
        added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in files]
        api.create_commit(repo, added, commit_message="Upload weights, configuration and model card")
    return f"{hub_address()}/{repo}"


def _has_edited_card(api: HfApi, repo: str) -> bool:
    from huggingface_hub.errors import EntryNotFoundError

    with TemporaryDirectory() as folder, suppress(EntryNotFoundError):
        text = Path(api.hf_hub_download(repo, CARD, local_dir=folder)).read_text(encoding="utf-8", errors="replace")
        return text != signed(text.rpartition("\n<!-- ")[0])
    return False


@contextmanager
def _meaning(repo: str) -> Iterator[None]:
    """Raise what the client raises as what it means for the user."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except Exception as error:  # of its HTTP client, of Xet, of the disk
        answer: BaseException | None = error
        while answer is not None and not isinstance(answer, HfHubHTTPError):
            answer = answer.__cause__
        said = in_words(answer or error)
        if answer is None and isinstance(error, ValueError):  # it has asked the hub about the card
            raise ValueError(f"push={repo}: {said}; name another licence, licence=other, or leave push out") from None
        status = 0 if answer is None else answer.response.status_code
        if status in REFUSED:
            advice = REFUSED[status].format(hub=hub_address())
            raise ValueError(f"push={repo}: the hub answers {status}: {advice} ({said})") from None
        raise PushError(f"push={repo}: the hub cannot be used ({said}); the same command may succeed later") from None
