"""Parallel dimensions, and checks that all processes agree."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from solo_vlm.train.parallel.context import ParallelDims, init_distributed, launched_as, store_of_attempt
from solo_vlm.train.recipe import Recipe
from solo_vlm.utils.errors import SoloError


def recipe(*overrides: str) -> Recipe:
    settings = {"model": "m", "out": "o", "steps": 1, "data": {"sources": [{"path": "x"}]}}
    return Recipe.parse(settings).override(overrides)


def test_paper_recipe_accumulates_32_sequences():
    """Tensor parallel 2 x data parallel 4, 128 sequences per step."""
    assert ParallelDims.from_recipe(recipe("parallel.tensor=2"), 8) == ParallelDims(4, 2, 32)


def test_parameters_are_sharded_over_slices_and_within_copies():
    settings = recipe("parallel.tensor=2", "parallel.context=2", "parallel.replicate=4")
    dims = ParallelDims.from_recipe(settings, 64)
    assert dims == ParallelDims(16, 2, 8, cp=2, replicate=4)
    assert dims.shards == 8


@pytest.mark.parametrize(
    ("overrides", "processes", "message"),
    [
        (["parallel.tensor=2"], 3, "a multiple of 2, or set parallel.tensor to 1 or 3$"),
        (["parallel.tensor=2"], 1, "or set parallel.tensor to 1$"),
        (
            ["global_batch=10"],
            4,
            "global_batch = 10 is not divisible by 4 .*: set it to 8 or 12, or start 1 or 2 ",
        ),
        (["global_batch=10", "parallel.tensor=2"], 8, "set it to 8 or 12, or start 2 or 4 processes"),
        (
            ["global_batch=2"],
            3,
            "set it to 3, or start 1 or 2 processes; beyond global_batch, only parallel.context",
        ),
        (
            ["data.workers=3", "global_batch=8"],
            8,
            "64 is not divisible by 8 .* x 3 workers: set it to 48 or 72",
        ),
        (["parallel.tensor=2", "parallel.context=2"], 6, "groups of parallel.tensor x parallel.context = 4"),
        (["parallel.replicate=3"], 4, "3 does not divide 4 data-parallel groups: set it to 1, 2 or 4$"),
        (["parallel.context=3"], 3, "sequence_length = 32768 is not divisible .*: set it to 32766 or 32769"),
        (["data.streams=10", "data.workers=3"], 2, "2 data-parallel groups x 3 workers: set it to 6 or 12"),
    ],
)
def test_indivisible_batch_is_rejected_with_suggestions(overrides, processes, message):
    with pytest.raises(SoloError, match=message):
        ParallelDims.from_recipe(recipe(*overrides), processes)


@pytest.mark.parametrize("batch", [1, 3, 16, 128, 512])
def test_default_streams_allow_every_number_of_ranks_with_four_workers(batch):
    for dp in [dp for dp in range(1, batch + 1) if batch % dp == 0]:
        for workers in (1, 2, 4):
            defaults = recipe(f"global_batch={batch}", f"data.workers={workers}")
            assert ParallelDims.from_recipe(defaults, dp).dp == dp
    assert recipe(f"global_batch={batch}").mixture.data.streams == max(64 if batch != 3 else 72, 4 * batch)
    assert recipe(f"global_batch={batch}", "data.streams=8").mixture.data.streams == 8


def join(port, ranks, seconds):
    """Join processes, here threads, of a run of three; return their parts of the store, or errors."""

    def start(rank):
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        try:
            return store_of_attempt(store, rank, 3, timedelta(seconds=seconds))
        except SoloError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(start, ranks))


def test_attempts_share_no_keys_whichever_processes_were_in_earlier_ones():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True)
    for attempt, ranks_of_last in enumerate([[0, 1, 2], [1, 2], [0, 2], [0], []]):
        join(server.port, ranks_of_last, 0.3)
        stores = join(server.port, range(3), 30)
        assert not any(store.check(["failure"]) for store in stores)
        stores[0].set("failure", "")
        for rank, store in enumerate(stores):
            store.set(f"rank {rank}", str(attempt))
        assert all(
            store.get(f"rank {rank}") == str(attempt).encode() for store in stores for rank in range(3)
        )


def test_process_that_starts_again_counts_once():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(join, server.port, [0], 10)
        for _ in range(2):
            join(server.port, [1], 10)
        (last,) = join(server.port, [2], 10)
        last.set("key", "")
        assert first.result()[0].check(["key"])


def test_missing_process_is_reported():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True)
    assert join(server.port, [0, 2], 1)[0] == "only 2 of 3 processes joined the run within 0:00:01"
    assert join(server.port, [1], 1) == ["process 0 of 3 did not join the run within 0:00:01"]


TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}


def without(*names):
    return {name: value for name, value in TORCHRUN.items() if name not in names}


@pytest.mark.parametrize(
    ("environment", "devices", "place"),
    [
        ({}, 0, (0, 1, 0)),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, 1, (0, 1, 0)),
        (
            {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4", "PMI_SIZE": "1"},
            1,
            (0, 1, 0),
        ),  # srun --pty bash
        (TORCHRUN, 2, (5, 8, 1)),
        (TORCHRUN, 0, (5, 8, 1)),
        (TORCHRUN | {"SLURM_STEP_NUM_TASKS": "4"}, 2, (5, 8, 1)),  # srun torchrun
        (without("LOCAL_RANK"), 1, (5, 8, 0)),  # one device per container
    ],
)
def test_process_learns_its_place_from_torchrun(environment, devices, place):
    assert launched_as(environment, devices) == place


@pytest.mark.parametrize(
    ("environment", "devices", "message"),
    [
        ({"SLURM_STEP_NUM_TASKS": "8"}, 1, "srun started 8 processes that do not know each other"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 0, "mpirun started 2 processes"),
        ({"PMI_SIZE": "2"}, 0, "mpiexec started 2 processes"),
        (
            without("RANK", "MASTER_PORT"),
            0,
            r"WORLD_SIZE is set \(8\), but RANK and MASTER_PORT not: start the processes with torchrun",
        ),
        (without("LOCAL_RANK"), 8, "LOCAL_RANK not: start the processes with torchrun"),
        ({"WORLD_SIZE": "two"}, 0, "WORLD_SIZE = two is not a number: unset it, or start"),
        ({**TORCHRUN, "RANK": "8"}, 8, "RANK = 8 is not below WORLD_SIZE = 8: start the processes with"),
        (TORCHRUN, 1, "process 1 of this machine has no device, because it sees 1: start at most 1"),
    ],
)
def test_process_without_a_place_of_its_own_is_rejected(environment, devices, message):
    with pytest.raises(SoloError, match=message):
        launched_as(environment, devices)


@pytest.mark.parametrize(
    ("rank", "port", "message"),
    [
        (0, "taken", "EADDRINUSE"),
        (0, "0", "Timed out .* 1/2 clients joined"),
        (1, "1", "The client socket has timed out"),
        (1, "http", "invalid literal"),
    ],
)
def test_processes_that_do_not_meet_are_rejected(monkeypatch, rank, port, message):
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1]) if port == "taken" else port
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        for name, value in place.items():
            monkeypatch.setenv(name, value)
        joined = init_distributed(recipe("global_batch=2", "timeouts.start=1"))
        with (
            pytest.raises(SoloError, match=f"2 processes did not meet at localhost:{port} .*{message}"),
            joined,
        ):
            pass


def test_unused_devices_are_reported(caplog):
    assert launched_as({}, 8) == (0, 1, 0)
    assert "training on one of 8 devices; on all: torchrun --nproc-per-node 8" in caplog.text
