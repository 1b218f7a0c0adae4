"""Shared fixtures: one torch thread, and the small real model where it is to be had."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background: what tests start would not hear it
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
STORIES = Path(os.environ.get("HOCKET_STORIES", ROOT.parent / "shared" / "models" / "stories260K-hf"))


@pytest.fixture(scope="session")
def stories() -> Path:
    """Folder of the 260 K parameter model (set HOCKET_STORIES to use another copy)."""
    if not (STORIES / "model.safetensors").exists():
        pytest.skip(f"no stories260K model at {STORIES}; set HOCKET_STORIES to a folder that holds it")
    return STORIES
