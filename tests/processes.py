"""Processes that are forked from one that has imported what they run: the imports take longer than most of it."""

import multiprocessing
import os
import runpy
import socket
import sys
import time
from pathlib import Path

import torch

from learnpruner_commands import main

# Windows has no fork: there each process imports for itself.
FORKS = "forkserver" in multiprocessing.get_all_start_methods()
CONTEXT = multiprocessing.get_context("forkserver" if FORKS else "spawn")
IMPORTED = ["learnpruner_commands", "learnpruner.compare", "learnpruner.training.command", "torch.distributed.fsdp"]


def start(arguments, script=None, environment=None, threads=1, log=os.devnull):
    """Starts `learnpruner` with these arguments, or a script.

    Args:
        environment (`dict[str, str]`, *optional*): Added to this process's own.
        threads (`int`): Of PyTorch; what it is given in the environment it reads once, when it is imported.
        log (`str` or `Path`): A file for what it prints.

    Returns:
        The process, as [`multiprocessing.Process`], started.
    """
    if FORKS:
        CONTEXT.set_forkserver_preload(IMPORTED)
    given = (arguments, script, {**os.environ, **(environment or {})}, threads, log)
    process = CONTEXT.Process(target=_run, args=given)
    process.start()
    return process


def _run(arguments, script, environment, threads, log):
    where = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(where, stream)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)
    if script is None:
        sys.exit(main(arguments))
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def answer_of(model, inputs):
    """What a process that is handed a model makes of it."""
    torch.set_num_threads(1)
    with torch.no_grad():
        return model(**inputs)


def run_group(count, arguments, folder, script=None, environment=None, timeout=300):
    """Runs processes that find each other as those of `torchrun` do; where one fails, the others are ended.

    Returns:
        `tuple[bool, str]`: Whether all went well, and what they printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [Path(folder) / f"process-{rank}.log" for rank in range(count)]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **(environment or {})}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    group = [
        start(arguments, script, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, log=log)
        for rank, log in enumerate(logs)
    ]
    end = time.monotonic() + timeout
    while any(process.is_alive() for process in group):
        if any(process.exitcode for process in group) or time.monotonic() > end:
            for process in group:
                process.kill()
        time.sleep(0.02)
    for process in group:
        process.join()
    return all(process.exitcode == 0 for process in group), "\n".join(log.read_text() for log in logs)
