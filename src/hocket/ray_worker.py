"""What runs in an actor of a Ray cluster: one warm setting, and jobs done with it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import hocket
from hocket.client import Result, Setting
from hocket.errors import RunError
from hocket.executors import Task, perform
from hocket.ray_objects import Flat, flat, whole
from hocket.tree import Tree


def versions() -> dict[str, str]:
    """What must be the same everywhere for the same bits."""
    return {"hocket": hocket.__version__, "torch": torch.__version__.partition("+")[0]}


class Worker:
    """What runs in an actor. Building is apart from being placed, so that waiting for room can be told from loading."""

    def __init__(self, gpus: float) -> None:
        self._gpus = gpus
        if not gpus:  # Ray hides a machine's GPUs only from actors that ask for some
            os.environ["CUDA_VISIBLE_DEVICES"] = ""

    def placed(self) -> tuple[str, int]:
        """Host and process id."""
        return socket.gethostname(), os.getpid()

    def build(
        self, factory: Callable[..., Setting], args: tuple[Any, ...], threads: int, folder: str, want: dict[str, str]
    ) -> None:
        """Make the setting, in the folder in which the run was started, if this machine has it."""
        if (have := versions()) != want:
            raise RunError(f"it has {have}, the run was started with {want}; install the same on all machines")
        if self._gpus and not torch.cuda.is_available():
            raise RunError("Ray gave it a GPU that torch cannot use; install a torch with CUDA there")
        if os.path.isdir(folder):
            os.chdir(folder)
        torch.set_num_threads(threads)
        self._setting = factory(*args)

    def perform(
        self, task: Task, where: Mapping[str, tuple[int, int]], memory: Mapping[str, Flat] | None, *bundles: list[Flat]
    ) -> tuple[Exception | None, tuple[Result, Any, dict[str, Flat]] | None]:
        """Do the job; `where` says in which bundle, and at which place there, each tensor of its view is.

        Returns:
            Its error or None, small and always fetched; and what it found, which stays where it is until asked for.
        """
        view = {name: whole(bundles[b][i], own=False) for name, (b, i) in where.items()}
        kept: Tree | None = None if memory is None else {k: whole(x) for k, x in memory.items()}  # jobs may write there
        try:  # a tree does for the packet it came in: both are read by name
            done = perform(self._setting, replace(task, view=view, memory=kept))  # type: ignore[arg-type]
        except Exception as error:
            return error, None
        blob = np.frombuffer(done.blob, np.uint8)
        return None, (replace(done, blob=b"", memory={}), blob, {k: flat(x) for k, x in done.memory.items()})
