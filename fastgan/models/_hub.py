"""The Hugging Face Hub: the base class of the generators is huggingface_hub's mixin if that package is installed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgan._checks import InputError

MODEL_CARD = """---
{{ card_data }}
---

A generator of [fastgan](https://pypi.org/project/fastgan).

```python
from fastgan.models import Generator

generator = Generator.from_pretrained("{{ repo_id | default("user/repo", true) }}")
```
"""


def hub(wanted: str) -> Any:
    """Return the module huggingface_hub.

    Raises:
        InputError: it is not installed; the message starts with ``wanted``.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(f"{wanted} needs huggingface_hub: pip install huggingface_hub") from None
    return huggingface_hub


def offline() -> bool:
    """Return whether ``FASTGAN_OFFLINE`` is set."""
    return bool(os.environ.get("FASTGAN_OFFLINE"))


def download(repo_id: str, files: list[str], **options: Any) -> str:
    """Return the local folder with ``files`` of a repository on the Hub, from the cache alone if fastgan is offline.

    Raises:
        InputError: huggingface_hub is not installed, or the repository cannot be read.
    """
    library = hub(f"folder {repo_id!r} does not exist; to read it from the Hugging Face Hub")
    if offline():
        options["local_files_only"] = True
    try:
        return str(library.snapshot_download(repo_id, allow_patterns=files, **options))
    except (OSError, ValueError) as error:
        searched = "in the Hub's cache (FASTGAN_OFFLINE is set)" if offline() else "on the Hugging Face Hub"
        raise InputError(f"no folder and no repository {searched}: {repo_id!r}: {error}") from error


class _NoHub:
    """Stands in for huggingface_hub's mixin if that package is missing, too old or broken."""

    def save_pretrained(self, folder: str | Path, **options: Any) -> str | None:
        raise _unusable(f"save_pretrained with {', '.join(options)}")

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        raise _unusable(f"push_to_hub({repo_id!r})")


def _unusable(wanted: str) -> InputError:
    """Return the error for a huggingface_hub that is missing, too old or broken."""
    hub(wanted)
    return InputError(f"{wanted} needs a newer huggingface_hub; the mixin of the installed one fails: {_failure}")


_failure = ""
if TYPE_CHECKING:
    HubMixin = _NoHub
else:
    try:
        from huggingface_hub import PyTorchModelHubMixin

        class HubMixin(
            PyTorchModelHubMixin,
            library_name="fastgan",
            pipeline_tag="unconditional-image-generation",
            tags=["gan"],
            model_card_template=MODEL_CARD,
        ):
            """huggingface_hub's mixin with fastgan's model card."""

    except Exception as error:  # a broken installation must not take the generators with it
        HubMixin, _failure = _NoHub, f"{type(error).__name__}: {error}"
