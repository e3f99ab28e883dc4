"""What this box offers a model version: processor, memory and installed runtimes, without importing any."""

from __future__ import annotations

import importlib.metadata
import platform

import psutil

from models.manifest import BoxFacts

RUNTIMES = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "litert": ("ai-edge-litert", "tflite-runtime"),
    # Folders of onnxruntime-genai's layout are run by a loop of our own on the same runtime.
    "genai": ("onnxruntime", "onnxruntime-gpu"),
}
ARCHITECTURES = {"arm64": "aarch64", "amd64": "x86_64"}


def box_facts() -> BoxFacts:
    """Return what `pick_variant` asks of a box."""
    machine = platform.machine().lower()
    backends = {name: version for name, packages in RUNTIMES.items() if (version := _version(packages))}
    memory_mb = psutil.virtual_memory().total >> 20
    return BoxFacts(architecture=ARCHITECTURES.get(machine, machine), backends=backends, memory_mb=memory_mb)


def _version(packages: tuple[str, ...]) -> str:
    """Return the version of the first package that is installed, or nothing."""
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""
