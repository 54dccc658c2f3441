"""Builds a teacher's module from its spec: an import path or a transformers checkpoint, and safetensors weights."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from schoolhouse_wire.errors import ConfigError
from torch import nn

from schoolhouse_server.pool.config import TeacherSpec

_MAX_TEXT = 500  # characters quoted of an error of other code


def load_teacher(spec: TeacherSpec, folder: Path) -> nn.Module:
    """Build the model that `spec` describes, on its device and in its dtype; paths are relative to `folder`.

    Raises:
        ConfigError: the spec names something that does not exist, or is not a model.
    """
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    module = _build(spec, folder) if spec.build is not None else _from_checkpoint(spec, folder)
    if spec.weights is not None:
        _load_weights(module, folder / spec.weights)
    return module.to(device=spec.device, dtype=getattr(torch, spec.dtype) if spec.dtype else None)


def load_example(spec: TeacherSpec, folder: Path) -> Callable[[], Any] | None:
    """The callable that `spec` names as `example`, or None; raises ConfigError if it cannot be imported."""
    return _import(spec.example, folder, "example") if spec.example is not None else None


def _build(spec: TeacherSpec, folder: Path) -> nn.Module:
    assert spec.build is not None
    built = _import(spec.build, folder, "build")(**spec.kwargs)
    if not isinstance(built, nn.Module):
        raise ConfigError(f"build: {spec.build!r} returned a {type(built).__name__}; expected an nn.Module")
    return built


def _import(path: str, folder: Path, setting: str) -> Callable[..., Any]:
    module_name, _, attribute = path.partition(":")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as err:
        raise ConfigError(f"{setting}: cannot import {path!r}: {err}") from err
    return found


def _from_checkpoint(spec: TeacherSpec, folder: Path) -> nn.Module:
    assert spec.transformers is not None
    path = folder / spec.transformers
    if not (path / "config.json").is_file():
        raise ConfigError(f"transformers: there is no checkpoint (config.json) in {spec.transformers}")
    try:
        import transformers
    except ImportError as err:
        raise ConfigError("transformers: the package is not installed here; pip install transformers") from err
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        named = (config.architectures or ["AutoModel"])[0]
        kind = getattr(transformers, named, transformers.AutoModel)
        model: nn.Module = kind.from_pretrained(path, local_files_only=True)
    except Exception as err:  # for a damaged checkpoint, transformers may raise anything
        raise ConfigError(f"transformers: {spec.transformers} cannot be loaded: {_told(err)}") from err
    model.config.use_cache = False  # type: ignore[union-attr]  # caches cannot be sent as features
    return model


def _load_weights(module: nn.Module, path: Path) -> None:
    try:
        load_model(module, path)
    except FileNotFoundError as err:
        raise ConfigError(f"weights: there is no file {path.name} beside the pool file") from err
    except RuntimeError as err:
        raise ConfigError(f"weights: {path.name} does not fit the model: {_told(err)}") from err
    except Exception as err:  # from safetensors, or the file system
        raise ConfigError(f"weights: {path.name} cannot be read as safetensors: {_told(err)}") from err


def _told(err: Exception) -> str:
    """An error's type and text, in one line."""
    return " ".join(f"{type(err).__name__}: {err}".split())[:_MAX_TEXT]
