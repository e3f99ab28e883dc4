"""The agent's own process imports no runtime, no object store and no trust library (DESIGN 2)."""

from __future__ import annotations

import subprocess
import sys

HEAVY = {
    "PIL",
    "ai_edge_litert",
    "boto3",
    "botocore",
    "httpx",
    "numpy",
    "onnxruntime",
    "onnxruntime_genai",
    "securesystemslib",
    "tflite_runtime",
    "tokenizers",
    "tuf",
}


def test_a_fresh_interpreter_that_imports_the_daemon_holds_nothing_heavy() -> None:
    program = "import agent.cli, agent.daemon, agent.http, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "agent" in loaded
    assert loaded & HEAVY == set()


def test_a_box_without_bindings_does_not_load_them() -> None:
    program = "import agent.cli, agent.running, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert not {"agent.bindings", "agent.binding_source", "agent.binding_store", "agent.probes"} & {
        *done.stdout.split()
    }
