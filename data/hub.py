"""A model from the Hugging Face hub: `hf:OWNER/NAME`, or `hf:OWNER/NAME@REVISION` with a branch, a tag or a commit."""

import re
from pathlib import Path

PREFIX = "hf:"
# The files that are read here, and no others: a model's folder may hold its weights in five formats.
FILES = ["config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json", "tokenizer.json",
         "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"]


def fetch(name: str) -> Path:
    """The folder of a model, in the hub's own cache (HF_HOME says where), fetched where it is not there yet.

    HF_ENDPOINT names another hub, HF_TOKEN opens gated models, HF_HUB_OFFLINE=1 asks the cache alone, and so does a hub
    that cannot be reached. Raises ValueError, saying what to do, for a model that cannot be had.
    """
    match = re.fullmatch(PREFIX + r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
    if not match:
        raise ValueError(f"{name}: a model of the hub is hf:OWNER/NAME or hf:OWNER/NAME@REVISION")
    from huggingface_hub import constants, errors, snapshot_download

    hub, (repo, revision) = _without_password(constants.ENDPOINT), match.groups()
    try:
        folder = Path(snapshot_download(repo, revision=revision, endpoint=constants.ENDPOINT,
                                        allow_patterns=FILES))
    except errors.GatedRepoError:
        raise ValueError(f"{name}: this model is given to those only who agreed to its terms: agree on {hub}/{repo}, "
                         "and set HF_TOKEN to a token of that account") from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{name}: {hub}/{repo} has no branch, tag or commit {revision}") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(f"{name}: there is no such model on {hub}, or it is a private one, for which HF_TOKEN must be "
                         "set to a token of its owner") from None
    except errors.HFValidationError as error:
        raise ValueError(f"{name}: {error}") from None
    except Exception as error:  # of whichever client for HTTP the library has; its text may hold a password
        is_offline = isinstance(error, errors.LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE
        if is_offline:
            raise ValueError(f"{name}: it is not in the cache, {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set; "
                             "unset it to fetch the model") from None
        of_the_network = type(error).__module__.startswith(("httpx", "requests", "huggingface_hub"))
        if not of_the_network:
            raise
        cause = type(error.__cause__ or error).__name__
        raise ValueError(f"{name}: {hub} cannot be reached ({cause}), and the whole model is not in "
                         f"the cache, {constants.HF_HUB_CACHE}; try again, set HF_ENDPOINT to another hub, or name a "
                         "folder with the model's files") from None
    if not (folder / "config.json").is_file():
        raise ValueError(f"{name}: {hub}/{repo} has no config.json, so it is not a model that is read here")
    return folder


def origin(folder: Path) -> str | None:
    """`hf:OWNER/NAME@COMMIT` of a folder in the hub's cache; None of others."""
    owner = re.fullmatch(r"models--(.+?)--(.+)", folder.parent.parent.name)
    return f"{PREFIX}{owner[1]}/{owner[2]}@{folder.name}" if owner and folder.parent.name == "snapshots" else None


def _without_password(address: str) -> str:
    return re.sub(r"//[^/@]*@", "//", address)
