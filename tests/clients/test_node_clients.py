"""Clients in Node; they and Node itself are npm packages in the venv's folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "clients.mjs"


def test_openai_and_the_ai_sdk(url: str) -> None:
    folder = Path(sys.prefix)
    script = shutil.copy(SCRIPT, folder)  # a module finds packages beside itself alone
    node = folder / "node_modules" / ".bin" / "node"
    done = subprocess.run([node, script, url], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["whole"] == found["streamed"] == found["parts"] == found["generated"][0]
    assert found["generated"][1:] == ["length", 12]
    assert found["helper"].endswith(".")
    (call,) = found["calls"]
    assert call["name"] == "weather"
    assert json.loads(call["arguments"])["city"] in ("Oslo", "Rome")
    assert found["width"] == 576
    assert found["error"] == ["NotFoundError", 404, "model_not_found", "model", True]
    assert found["object"]["city"] in ("Oslo", "Rome")
    assert found["results"]
    assert set(found["results"]) <= {"Rain in Oslo", "Rain in Rome"}
