"""A copy of a model for each rank. In 4 bits, the first rank of a machine quantizes it once, and the others read that."""

from __future__ import annotations

import gc
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from transformers import AutoConfig, PreTrainedModel

from ao.config import ModelConfig
from ao.distributed import Ranks
from ao.manifest import fingerprint, sync_folder
from ao.models.load import FOUR_BIT, load_model, named
from ao.models.split import SPLIT
from ao.prompt import model_folder
from ao.user_cache import user_cache

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

FORMAT = 2
"""Of the folder that is kept; one of another format is not read."""


def load_replica(config: ModelConfig, here: Ranks, *, which: str = "base") -> PreTrainedModel:
    """Load this rank's copy of a model, as `load_model` does.

    Several ranks of a model in 4 bits read its original once a machine: the first to come quantizes it and leaves the result
    in the user's cache, under a name that changes with the checkpoint's files, and the others, and later runs, read a
    quarter of the bytes there. A checkpoint that is quantized already is read by each.

    Args:
        config: names the checkpoint, precision and kind of device; it goes to this rank's own.
        here: this process among its fellows.
        which: "base" or "target".

    Raises:
        OSError: the user's cache cannot be written.
        ValueError: several ranks are to split the model, each over all GPUs.
    """
    if config.device == SPLIT and here.world > 1:
        raise ValueError(
            f'model.device: "split" spreads one replica over all GPUs, and {here.world} ranks were started, each with a '
            'replica; start one process, or take "cuda"'
        )
    if config.device != SPLIT:
        config = replace(config, device=str(here.device))
    if here.world == 1 or config.precision not in FOUR_BIT:
        return load_model(config, which=which)
    name, revision = named(config, which)
    if getattr(AutoConfig.from_pretrained(model_folder(name, revision)), "quantization_config", None) is not None:
        return load_model(config, which=which)
    folder = user_cache() / "quantized" / _key(name, revision)
    with _alone(folder.parent):
        if not folder.is_dir():
            return _keep(config, which, folder)
    return _read(config, folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process of a machine at a time; whoever comes first, as a rank that has nothing to collect never comes."""
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _key(name: str, revision: str | None) -> str:
    """Of what is quantized and of what does it, the same in every rank."""
    folder = model_folder(name, revision).resolve()
    stamps = []
    # A Hub's snapshot is named by its commit, and its weights may not be there yet.
    if name == "demo" or Path(name).is_dir():
        for file in sorted(folder.glob("*.safetensors")):
            about = file.stat()
            stamps.append(f"{file.name} {about.st_size} {about.st_mtime_ns}")
    libraries = [f"{library} {version(library)}" for library in ("bitsandbytes", "transformers")]
    return fingerprint(FORMAT, str(folder), stamps, libraries)[:32]


def _keep(config: ModelConfig, which: str, folder: Path) -> PreTrainedModel:
    """Quantize, write, and read it back, so that what no rank could read never gets the folder's name."""
    model = load_model(replace(config, precision="nf4"), which=which)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        # Among ranks the library lets only the first of all write, and here whoever came first holds the model.
        model.should_save_on_this_rank = lambda is_main_process: is_main_process  # type: ignore[method-assign]
        # The original's names would be those of a multimodal checkpoint, beside the configuration of its text tower.
        model.save_pretrained(partial, save_original_format=False)
        for file in partial.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        del model
        gc.collect()  # 4-bit layers and their weights refer to each other
        model = _read(config, partial)
        partial.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # or another machine's first rank was quicker, where both share the folder
            raise OSError(
                f"{folder}: the quantized model cannot be kept for the other ranks ({error}); free some space, or name "
                "another folder in AO_CACHE"
            ) from error
        return _read(config, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sync_folder(folder)
    log.info("the quantized model is kept in %s", folder)
    return model


def _read(config: ModelConfig, folder: Path) -> PreTrainedModel:
    return load_model(replace(config, name=str(folder), revision=None))
