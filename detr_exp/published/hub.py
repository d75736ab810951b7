"""A file from the Hugging Face hub, by its own client: `HF_TOKEN`, `HF_ENDPOINT` and its cache are respected."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from detr_exp.published.download import LIMIT, UNTRUSTED, DownloadError
from detr_exp.published.source import Source

CONFIG = "config.json"  # has the names of the classes


def is_offline() -> bool:
    """Whether the user keeps the client from the network."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def hub_address() -> str:
    """Where the hub is."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def in_words(error: BaseException) -> str:
    """What the client of the hub says, on one line, and what to do about a certificate that is not trusted."""
    said = " ".join(str(error).split())[:300] or type(error).__name__
    return said + (f"; {UNTRUSTED}" if "CERTIFICATE_VERIFY_FAILED" in said else "")


def from_hub(source: Source) -> Path:
    """The file in the hub's cache, fetched if it is not there; the client checks it, and one process fetches it.

    Raises:
        DownloadError: it cannot be had.
    """
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url

    for file in source.files:
        try:
            size = get_hf_file_metadata(hf_hub_url(source.repo, file, revision=source.revision)).size
            if size is not None and size > LIMIT:
                raise DownloadError(f"it has {size} bytes, and at most {LIMIT >> 30} GiB are fetched")
            path = hf_hub_download(source.repo, file, revision=source.revision)
            with suppress(errors.EntryNotFoundError):
                hf_hub_download(source.repo, CONFIG, revision=source.revision)
            return Path(path)
        except errors.LocalEntryNotFoundError as error:  # which is an EntryNotFoundError too
            raise DownloadError(f"the hub does not answer ({' '.join(str(error).split())[:200]})") from None
        except errors.EntryNotFoundError:
            continue
        except errors.GatedRepoError:
            raise DownloadError("its terms must be accepted on its page, and HF_TOKEN set") from None
        except errors.RevisionNotFoundError:
            raise DownloadError(f"it has no revision {source.revision}") from None
        except errors.RepositoryNotFoundError:
            raise DownloadError("there is no such repository, or it is private and HF_TOKEN is not set") from None
        except DownloadError:
            raise
        except Exception as error:  # of its HTTP client, of the disk, of names that it does not take
            raise DownloadError(in_words(error)) from None
    raise DownloadError(f"it holds no {' or '.join(source.files)}")
