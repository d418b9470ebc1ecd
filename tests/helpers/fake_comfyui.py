"""A small ComfyUI: the modules that nodes import, and a prompt runner that caches as ComfyUI does.

What it keeps of ComfyUI's contract, as of version 0.29: ``folder_paths`` lists and resolves names,
``load_lora_for_models`` patches copies, an output is reused while its inputs and ``IS_CHANGED`` are the
same, hidden inputs are filled in, inputs whose names ``INPUT_TYPES`` contains only by ``__contains__``
are handed over when they are links.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
NODE_PACK = "custom_nodes_x_loramerge"


class InterruptProcessingException(Exception):
    pass


class Patcher:
    """A model whose weights are known by the kohya names of their LoRA layers."""

    def __init__(self, layers: set[str]) -> None:
        self.layers = layers
        self.patches: dict[str, list[tuple[float, torch.Tensor]]] = {}

    def clone(self) -> Patcher:
        copy = Patcher(self.layers)
        copy.patches = {key: list(patches) for key, patches in self.patches.items()}
        return copy

    def delta(self) -> dict[str, torch.Tensor]:
        """What all patches add to each weight, (out, in) float64."""
        return {
            key: torch.stack([strength * delta for strength, delta in patches]).sum(0)
            for key, patches in self.patches.items()
        }


class Clip:
    def __init__(self, layers: set[str]) -> None:
        self.patcher = Patcher(layers)

    def clone(self) -> Clip:
        copy = Clip(self.patcher.layers)
        copy.patcher = self.patcher.clone()
        return copy


def _load_lora_for_models(
    model: Patcher | None,
    clip: Clip | None,
    lora: Mapping[str, torch.Tensor],
    strength: float,
    clip_strength: float,
) -> tuple[Patcher | None, Clip | None]:
    model = None if model is None else model.clone()
    clip = None if clip is None else clip.clone()
    for patcher, by in ((model, strength), (clip and clip.patcher, clip_strength)):
        if patcher is None:
            continue
        for layer in sorted(patcher.layers):
            up, down = lora.get(f"{layer}.lora_up.weight"), lora.get(f"{layer}.lora_down.weight")
            if up is None or down is None:
                continue
            scale = float(lora[f"{layer}.alpha"]) / down.shape[0] if f"{layer}.alpha" in lora else 1.0
            delta = scale * (up.double().flatten(1) @ down.double().flatten(1))
            patcher.patches.setdefault(layer, []).append((by, delta))
    return model, clip


class FakeComfyUI:
    """The host with one folder of LoRAs and one of checkpoints.

    Attributes:
        progress: Every ``(value, total)`` that a progress bar was given.
        interrupted: Set it to interrupt what runs.
    """

    def __init__(self, folder: Path) -> None:
        self.loras = folder / "models" / "loras"
        self.temp = folder / "temp"
        self.loras.mkdir(parents=True)
        self.checkpoints = folder / "models" / "checkpoints"
        self.checkpoints.mkdir()
        self.diffusion_models = folder / "models" / "diffusion_models"
        self.diffusion_models.mkdir()
        self.progress: list[tuple[int, int]] = []
        self.interrupted = False
        self.args = argparse.Namespace(disable_metadata=False)
        self.nodes: dict[str, Any] = {}
        self.ran: list[str] = []
        self._cache: dict[Any, tuple[Any, ...]] = {}

    def modules(self) -> dict[str, ModuleType]:
        host = self

        class ProgressBar:
            def __init__(self, total: int, node_id: object = None) -> None:
                self.total = total

            def update_absolute(self, value: int, total: int | None = None, preview: object = None) -> None:
                host.progress.append((value, total or self.total))

        def throw() -> None:
            if host.interrupted:
                host.interrupted = False
                raise InterruptProcessingException

        def folder_of(kind: str) -> Path:
            return {
                "loras": host.loras,
                "checkpoints": host.checkpoints,
                "diffusion_models": host.diffusion_models,
            }[kind]

        def full_path(kind: str, name: str) -> str | None:
            path = folder_of(kind) / name
            return str(path) if path.is_file() else None

        def names(kind: str) -> list[str]:
            folder = folder_of(kind)
            return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors"))

        contents: dict[str, dict[str, Any]] = {
            "folder_paths": {
                "get_filename_list": names,
                "get_full_path": full_path,
                "get_full_path_or_raise": full_path,
                "get_folder_paths": lambda kind: [str(folder_of(kind))],
                "get_temp_directory": lambda: str(self.temp),
            },
            "comfy": {},
            "comfy.sd": {"load_lora_for_models": _load_lora_for_models},
            "comfy.utils": {
                "ProgressBar": ProgressBar,
                "load_torch_file": lambda path, safe_load=False: load_file(path),
            },
            "comfy.model_management": {
                "get_torch_device": lambda: torch.device("cpu"),
                "processing_interrupted": lambda: host.interrupted,
                "throw_exception_if_processing_interrupted": throw,
                "InterruptProcessingException": InterruptProcessingException,
            },
            "comfy.cli_args": {"args": self.args},
        }
        made = {}
        for name, content in contents.items():
            made[name] = ModuleType(name)
            made[name].__dict__.update(content)
        for name in made:
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(made[parent], child, made[name])
        return made

    def run(self, prompt: Mapping[str, Mapping[str, Any]], *, workflow: object = None) -> dict[str, Any]:
        """Run a prompt in ComfyUI's API format; the outputs of every node.

        Links are ``[node, output]``. ``ran`` holds the nodes that were not cached.
        """
        self.ran = []
        fresh: dict[Any, tuple[Any, ...]] = {}
        results: dict[str, tuple[Any, ...]] = {}
        signatures: dict[str, Any] = {}

        def result(name: str) -> tuple[Any, ...]:
            if name in results:
                return results[name]
            node = prompt[name]
            kind = self.nodes[node["class_type"]]
            accepted = kind.INPUT_TYPES()
            inputs, parts = {}, []
            for key, value in node["inputs"].items():
                if isinstance(value, list):
                    inputs[key] = result(value[0])[value[1]]
                    parts.append((key, signatures[value[0]], value[1]))
                elif any(key in accepted.get(group, {}) for group in ("required", "optional")):
                    inputs[key] = value
                    parts.append((key, repr(value)))
            widgets = {
                key: value for key, value in inputs.items() if not isinstance(node["inputs"][key], list)
            }
            changed = kind.IS_CHANGED(**widgets) if hasattr(kind, "IS_CHANGED") else None
            signatures[name] = (node["class_type"], tuple(sorted(parts, key=repr)), changed)
            output = self._cache.get(signatures[name])
            if output is None:
                hidden = {"PROMPT": prompt, "EXTRA_PNGINFO": {"workflow": workflow} if workflow else None}
                asked = {key: hidden[what] for key, what in accepted.get("hidden", {}).items()}
                made = getattr(kind(), kind.FUNCTION)(**inputs, **asked)
                output = made["result"] if isinstance(made, dict) else made
                self.ran.append(name)
            fresh[signatures[name]] = results[name] = output
            return output

        for name in prompt:
            result(name)
        self._cache = fresh
        return results


@contextlib.contextmanager
def running(folder: Path) -> Iterator[FakeComfyUI]:
    """The host with our node pack loaded as ComfyUI loads one, by its path."""
    host = FakeComfyUI(folder)
    before = dict(sys.modules)
    sys.modules.update(host.modules())
    try:
        spec = importlib.util.spec_from_file_location(NODE_PACK, ROOT / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        pack = importlib.util.module_from_spec(spec)
        sys.modules[NODE_PACK] = pack
        spec.loader.exec_module(pack)
        host.nodes = {**pack.NODE_CLASS_MAPPINGS}
        yield host
    finally:
        for name in set(sys.modules) - set(before):
            if name.startswith(("comfy", "folder_paths", "lib_loramerge.comfyui", NODE_PACK)):
                del sys.modules[name]
        sys.modules.update({name: module for name, module in before.items() if name.startswith("comfy")})
