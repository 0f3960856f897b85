"""The base class of the generators, which records their arguments so that a folder can rebuild the network."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from fastgan._checks import InputError, check_tensor
from fastgan.models._hub import HubMixin, download, offline

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
_REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
RUN_FOLDER = "generator"
"""Folder of the generator in a training run."""

SMALLEST_MAP = 4
"""Least width of the smallest maps in the networks; they are less than twice as wide."""

G = TypeVar("G", bound="Generator")


class Generator(nn.Module, HubMixin):
    """Base class of the generators.

    Subclasses are called as ``generator(z, labels)``, or as ``generator(sketches, labels)`` if ``sketch_channels``
    is not 0, and return images in [-1, 1]. If huggingface_hub is installed, a generator is one of its
    ``PyTorchModelHubMixin``.

    Attributes:
        n_classes: of the labels; 0 for a generator that takes none.
        dim_z: length of the noise; 0 for a generator from sketches.
        sketch_channels: channels of the sketches; 0 for a generator from noise.
        resolution: height and width of the images.
        image_channels: 1 for gray, 3 for RGB.
        config: the arguments of ``__init__``.
        class_names: names of the classes in the order of their labels, or none.

    Example:
        >>> DCGANGenerator(10, resolution=32, width=8).save_pretrained("generator")
        >>> generator = Generator.from_pretrained("generator")
        >>> generator(torch.randn(2, generator.dim_z), torch.tensor([3, 5])).shape
        torch.Size([2, 3, 32, 32])
    """

    n_classes: int
    dim_z: int
    resolution: int
    image_channels: int
    config: dict[str, Any]
    sketch_channels: int = 0
    class_names: tuple[str, ...] = ()
    _classes: ClassVar[dict[str, type[Generator]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Generator._classes[cls.__name__] = cls

    def record(self, arguments: dict[str, Any]) -> None:
        """Keep the arguments of ``__init__`` in :attr:`config`, and those that all generators have as attributes."""
        self.config = arguments
        for name in ("n_classes", "dim_z", "sketch_channels", "resolution", "image_channels"):
            if name in arguments:
                setattr(self, name, arguments[name])

    @property
    def description(self) -> dict[str, Any]:
        """Class, arguments and class names: :meth:`from_description` builds the network from them, with new weights."""
        return {"class": type(self).__name__, "arguments": self.config, "class_names": [*self.class_names]}

    def label_of(self, name: str) -> int:
        """Return the label of the class with this name or number.

        Raises:
            ValueError: there is no such class; the message lists the classes.
        """
        if name in self.class_names:
            return self.class_names.index(name)
        if name.isdecimal() and int(name) < self.n_classes:
            return int(name)
        names = f"one of {', '.join(self.class_names)}, or " if self.class_names else ""
        raise ValueError(f"class must be {names}in [0, {self.n_classes}), got {name}")

    @classmethod
    def from_description(cls: type[G], description: dict[str, Any]) -> G:
        """Build the network that ``description`` describes.

        Raises:
            ValueError: the class is unknown, or not the one that this is called on, or the arguments do not fit it.
        """
        name = description["class"]
        found = Generator._classes.get(name)
        if found is None or not issubclass(found, cls):
            known = ", ".join(n for n, c in Generator._classes.items() if issubclass(c, cls))
            raise ValueError(f"class must be one of {known}, got {name!r}")
        try:
            generator = found(**description["arguments"])
            generator.class_names = tuple(description.get("class_names", ()))
            return generator
        except (TypeError, ValueError) as error:
            raise ValueError(f"arguments do not make a {name}: {error}") from error

    def save_pretrained(self, folder: str | Path, **options: Any) -> str | None:
        """Write ``model.safetensors`` and ``config.json`` into ``folder``, which is created if missing.

        Args:
            folder: also written to if it has such files already.
            options: those of huggingface_hub's ``save_pretrained``, such as ``push_to_hub=True`` with ``repo_id``. It
                also writes a model card, and returns the address of the commit if it uploads.

        Raises:
            InputError: there are options, and huggingface_hub is not installed.
        """
        if options:
            return super().save_pretrained(folder, **options)
        self._save_pretrained(Path(folder))
        return None

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the two files; huggingface_hub calls this too."""
        from safetensors.torch import save

        from fastgan import __version__
        from fastgan._files import write_bytes, write_text

        state = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
        content = {**self.description, "fastgan": __version__}
        write_bytes(save_directory / WEIGHTS_FILE, save(state))
        write_text(save_directory / CONFIG_FILE, json.dumps(content, indent=2) + "\n")

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the files of :meth:`save_pretrained` and a model card to the Hugging Face Hub.

        Args:
            repo_id: "user/repo", created if it does not exist.
            options: those of huggingface_hub's ``push_to_hub``: ``private``, ``token`` (by default that of ``hf auth
                login``), ``commit_message``, ``branch``, ``create_pr`` and others.

        Returns:
            The address of the commit.

        Raises:
            InputError: huggingface_hub is not installed, or ``FASTGAN_OFFLINE`` is set.
        """
        if offline():
            raise InputError(f"push_to_hub({repo_id!r}) needs the network, and FASTGAN_OFFLINE is set")
        card = {"repo_id": repo_id, **(options.pop("model_card_kwargs", None) or {})}
        return super().push_to_hub(repo_id, model_card_kwargs=card, **options)

    @classmethod
    def from_pretrained(
        cls: type[G],
        folder: str | Path,
        *,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> G:
        """Rebuild the generator that :meth:`save_pretrained` wrote, in eval mode.

        Call it on :class:`Generator` or on the class that was saved.

        Args:
            folder: also that of a training run, which keeps the moving average of its generator in ``generator``; or
                "user/repo" on the Hugging Face Hub, as a string, if there is no such folder.
            device: of the weights.
            revision: branch, tag or commit of a repository on the Hub.
            token: for a private repository, by default that of ``hf auth login``.
            cache_dir: by default huggingface_hub's.
            force_download: also if the cache has the files.
            local_files_only: read the cache of huggingface_hub, not the network; ``FASTGAN_OFFLINE`` sets it.

        Raises:
            InputError: a file is missing or damaged, the class is unknown or another one, the weights do not fit, or
                a repository cannot be read.
        """
        if isinstance(folder, str) and _REPOSITORY.fullmatch(folder) and not Path(folder).exists():
            folder = download(
                folder,
                [CONFIG_FILE, WEIGHTS_FILE],
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
            )
        folder = Path(folder)
        if not (folder / CONFIG_FILE).exists() and (folder / RUN_FOLDER / CONFIG_FILE).exists():
            folder = folder / RUN_FOLDER
        try:
            generator = cls.from_description(_read_config(folder / CONFIG_FILE))
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"{folder / CONFIG_FILE}: {error}") from error
        _load_weights(generator, folder / WEIGHTS_FILE)
        return generator.to(device).eval()


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = [str(name) for name in content.get("class_names", ())]
        return {"class": content["class"], "arguments": dict(content["arguments"]), "class_names": names}
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: a folder written by save_pretrained is needed") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} must hold JSON with 'class' and 'arguments': {error}") from error


def _load_weights(network: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        network.load_state_dict(load_file(path))
    except (FileNotFoundError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    except RuntimeError as error:
        details = " ".join(str(error).split())
        raise InputError(f"{path} does not fit {type(network).__name__}: {details[:200]}") from error


def recorded(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an ``__init__``, from its ``locals()`` at the first line."""
    return {key: value for key, value in arguments.items() if key not in ("self", "__class__")}


def check_noise(z: Tensor, dim_z: int) -> None:
    """Raise ``ValueError`` unless ``z`` is floating-point (n, dim_z)."""
    check_tensor("z", z, ndim=2)
    if z.shape[1] != dim_z:
        raise ValueError(f"z must have shape (n, {dim_z}), got {tuple(z.shape)}")


def check_images(images: Tensor, channels: int, resolution: int, name: str = "images") -> None:
    """Raise ``ValueError`` unless ``images`` is floating-point (n, channels, resolution, resolution)."""
    check_tensor(name, images, ndim=4)
    if tuple(images.shape[1:]) != (channels, resolution, resolution):
        raise ValueError(
            f"{name} must have shape (n, {channels}, {resolution}, {resolution}), got {tuple(images.shape)}"
        )


def check_label_shape(labels: Tensor | None, n: int, n_classes: int) -> None:
    """Raise ``ValueError`` unless ``labels`` is int64 (n,).

    Eagerly on a CPU each must be in [0, n_classes) too; elsewhere that would wait for the device, or end a graph.
    """
    if labels is None:
        raise ValueError("labels must be given to a conditional network, got None")
    check_tensor("labels", labels, ndim=1, dtypes=(torch.int64,))
    if labels.shape[0] != n:
        raise ValueError(f"labels must have shape ({n},), one for each sample, got {tuple(labels.shape)}")
    traced = (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
    if labels.device.type == "cpu" and type(labels) is Tensor and not traced:
        check_labels(labels, n_classes)


def check_labels(labels: Tensor, n_classes: int) -> None:
    """Raise ``ValueError`` unless ``labels`` is int64 (n,), each in [0, n_classes). Waits for the device.

    Example:
        >>> check_labels(torch.tensor([0, 3]), n_classes=4)
    """
    check_tensor("labels", labels, ndim=1, dtypes=(torch.int64,))
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < n_classes:
        raise ValueError(f"labels must be in [0, {n_classes}), got {int(labels.min())} to {int(labels.max())}")


def check_architecture(
    *,
    n_classes: int,
    resolution: int,
    image_channels: int,
    width: int,
    max_multiplier: int,
    attention_resolution: int | None = None,
    dim_z: int = 1,
) -> None:
    """Raise ``ValueError`` for an argument that no network of this package can be made with."""
    if n_classes < 0:
        raise ValueError(f"n_classes must be at least 0 (0: unconditional), got {n_classes}")
    base = smallest_map(resolution)
    if resolution < 16 or base >= 2 * SMALLEST_MAP:
        raise ValueError(f"resolution must be 4, 5, 6 or 7 times a power of two, at least 16, got {resolution}")
    if image_channels < 1:
        raise ValueError(f"image_channels must be at least 1, got {image_channels}")
    if width < 8 or width % 8:
        raise ValueError(f"width must be a positive multiple of 8, got {width}")
    if max_multiplier < 1:
        raise ValueError(f"max_multiplier must be at least 1, got {max_multiplier}")
    if dim_z < 1:
        raise ValueError(f"dim_z must be at least 1, got {dim_z}")
    if attention_resolution is None:
        return
    maps = [base * 2**level for level in range(1, log2(resolution // base))]
    if attention_resolution not in maps:
        allowed = ", ".join(map(str, maps))
        raise ValueError(
            f"attention_resolution must be one of {allowed} at resolution {resolution}, got {attention_resolution}"
        )


def channel_levels(largest: int, smallest: int, width: int, max_multiplier: int) -> list[int]:
    """Channels of maps ``largest`` wide, half as wide, and so on down to ``smallest``: ``width`` first, then doubled up
    to ``width * max_multiplier``."""
    levels = log2(largest // smallest) + 1
    return [width * min(2**level, max_multiplier) for level in range(levels)]


def attention_index(start: int, attention_resolution: int | None) -> int:
    """Index of the block whose output attention works on; -1 for none.

    Each block halves or doubles maps that are ``start`` wide before the first.
    """
    if attention_resolution is None:
        return -1
    return log2(max(start, attention_resolution) // min(start, attention_resolution)) - 1


def smallest_map(resolution: int, least: int = SMALLEST_MAP) -> int:
    """Width of the smallest map: ``resolution`` halved as often as it stays whole and at least ``least``.

    >>> smallest_map(64), smallest_map(28), smallest_map(96, least=8)
    (4, 7, 12)
    """
    while resolution % 2 == 0 and resolution // 2 >= least:
        resolution //= 2
    return resolution


def log2(n: int) -> int:
    """Logarithm of a power of two."""
    return n.bit_length() - 1
