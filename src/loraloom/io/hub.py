"""Publishing a folder on the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path

from loraloom.errors import RunFailedError

# What a run leaves beside its result: states to resume from, and reports that are for the reader of the terminal.
IGNORED = ("checkpoints/*", ".*")


def push_folder(folder: Path, repository: str, private: bool = False, ignored: Sequence[str] = IGNORED) -> str:
    """Uploads a folder as a model repository, which is made if it is not there.

    Args:
        folder: what to upload; it stays as it is.
        repository: `name` or `owner/name`.
        private: of a repository that is made now.
        ignored: patterns of files to leave out.

    Returns:
        The repository's address.

    Raises:
        RunFailedError: the hub cannot be reached, refuses, or there is no token. The folder is whole, so that it can be
            pushed again.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id,
            folder_path=folder,
            ignore_patterns=list(ignored),
            commit_message="Upload with loraloom",
        )
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise RunFailedError(
            f"{folder} is saved, but pushing it to {repository} failed: {reason}; log in with `hf auth login`, then "
            f"`hf upload {repository} {folder}`",
            code="not-pushed",
        ) from None
    return str(address)
