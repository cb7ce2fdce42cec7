"""A model from the Hugging Face hub at one commit, through huggingface_hub and its cache.

Honours what huggingface_hub honours: ``HF_TOKEN``, ``HF_HOME``, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``.
"""

from __future__ import annotations

import glob
from pathlib import Path

from enginesmith.checkpoints.locate import ModelLocation, model_among
from enginesmith.errors import EnginesmithError, OperatorError, SourceError


def download_from_hub(repository: str, revision: str, *, member: str | None) -> tuple[ModelLocation, Path]:
    """Only the model's own files of ``repository`` at commit ``revision``: what it is, and its path on disk.

    The path lies in huggingface_hub's cache; what is there already is not downloaded again and needs no network.

    Raises:
        SourceError: no such repository or commit, no access to it, or no single model in it.
        OperatorError: the hub cannot be reached and the cache does not have the files.
    """
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, OfflineModeIsEnabled

    try:
        paths = _paths_in_repository(repository, revision)
        location = model_among(paths, member=member, origin=f"{repository} on the hub")
        patterns = [glob.escape(path) for path in location.files(paths)]
        snapshot = snapshot_download(repository, revision=revision, allow_patterns=patterns)
    except (httpx.HTTPError, EntryNotFoundError, OfflineModeIsEnabled, HFValidationError) as error:
        raise _explained(error, repository, revision) from error
    return location, Path(snapshot, location.path)


def _paths_in_repository(repository: str, revision: str) -> set[str]:
    """The paths of all files at a commit; remembered by huggingface_hub, since a commit does not change."""
    from huggingface_hub import HfApi, get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return {file.path for file in get_cached_repo_tree(repository, revision=revision)}
    except CachedRepoTreeNotFoundError:
        return set(HfApi().list_repo_files(repository, revision=revision))


def _explained(error: Exception, repository: str, revision: str) -> EnginesmithError:
    from huggingface_hub import errors

    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    match error:
        case errors.GatedRepoError():
            return SourceError(
                f"{repository} is gated and this account has no access to it",
                hint=f"accept its conditions on the hub's page of {repository}, then run `hf auth login` or set HF_TOKEN",
            )
        case errors.RepositoryNotFoundError():
            return SourceError(
                f"the hub knows no repository {repository}, or it is private and the token does not open it",
                hint="check source.hub (organisation/name); for a private one run `hf auth login` or set HF_TOKEN",
            )
        case errors.RevisionNotFoundError():
            return SourceError(
                f"{repository} has no commit {revision}",
                hint="copy the 40 digits of the commit from the repository's history into source.revision",
            )
        case errors.HFValidationError():
            return SourceError(
                f"{repository!r} is not the name of a hub repository: {first_line}",
                hint="write organisation/name",
            )
        case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
            return SourceError(
                f"the hub refuses access to {repository} (HTTP {error.response.status_code}): {first_line}",
                hint="run `hf auth login` or set HF_TOKEN to a token that may read it",
            )
        case errors.HfHubHTTPError():
            return OperatorError(
                f"the hub answered HTTP {error.response.status_code} for {repository}: {first_line}",
                hint="try again later",
            )
        case errors.OfflineModeIsEnabled():
            return OperatorError(
                f"{repository} at {revision} is not in the hub cache, and HF_HUB_OFFLINE forbids to fetch it",
                hint="unset HF_HUB_OFFLINE, or run the build once where there is a network",
            )
        case _:
            return OperatorError(
                f"the hub cannot be reached for {repository} at {revision}: {first_line}",
                hint="check the network and HF_ENDPOINT, or download the model elsewhere and give it as source.path",
            )
