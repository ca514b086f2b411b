"""Downloads models from the Hugging Face hub: configuration, tokenizer and safetensors, never code or pickles."""

from pathlib import Path

from models.safetensors_reader import INDEX

_TEXT = ["config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt",
         "added_tokens.json", "chat_template*", "additional_chat_templates/*"]  # fmt: skip


def download(repo: str, *, revision: str | None = None, weights: bool = True) -> Path:
    """The local copy of hub repository `repo` ("owner/name"); what is in the hub's cache already is not fetched again,
    and is enough when offline.

    Raises:
      ValueError: there is no such repository or revision, it needs a login, or it cannot be reached and is not cached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = [*_TEXT, *(["*.safetensors", INDEX] if weights else [])]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise ValueError(f"model {repo!r} is neither a file or directory here nor a hub id like owner/name") from error
    except GatedRepoError as error:
        raise ValueError(
            f"model {repo} is gated: accept its terms on huggingface.co, then run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"there is no model {repo} on the hub, or it is private: then run `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"model {repo} has no revision {revision!r}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"model {repo} is not in the local cache and the hub cannot be reached: go online, or give a directory "
            f"or .gguf file ({type(error).__name__}: {error})"
        ) from error
