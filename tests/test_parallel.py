"""Two processes on a CPU: together they do what one does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from routesae_cache import launch as launch_module
from routesae_cache.checkpoint import RunError, checkpoint_step, read_config
from routesae_cache.devices import cores, own_cores
from routesae_cache.launch import PEER_LOST, Ended, _cause, check_processes, launch
from routesae_cache.loggers import read_metrics
from routesae_cache.parallel import ALONE, World, environment
from routesae_cache.runs import Asked, run_names
from routesae_cache.saes.registry import build_sae
from routesae_cache.train import train
from routesae_cache.train_plan import TrainConfig
from stores.reader import StoreReader
from tests.command_helpers import refused, routesae
from tests.parallel_helpers import BATCH_TOKENS, FAILING, SAES, STEPS, STOP_AT, F, go, pair, work
from tests.pipeline_helpers import config, run, topk
from tests.store_helpers import chunk_file

NAMES = run_names([Asked(sae, 3) for sae in (*SAES, FAILING)])


@pytest.fixture(scope="module")
def store(tiny_model_dir: Path, tiny_corpus: Path, tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("parallel") / "s.zarr"
    run(config(tiny_model_dir, tiny_corpus, path, tokens=2000))
    return path


@pytest.fixture(scope="module")
def folder(store: Path, tmp_path_factory: Any) -> Path:
    """What two processes left, and in `one` what a single one did, while a harvest went on."""
    path: Path = tmp_path_factory.mktemp("two")
    growing = path / "s.zarr"
    shutil.copytree(store, growing)
    chunk_file(growing, "committed", StoreReader(growing).committed[-3]).unlink()
    go(ALONE, growing, path / "one", streams=2)
    assert launch(work, 2, (growing, path)) == Ended(1, -9)
    return path


def loaded(folder: Path, name: str) -> list[Any]:
    return [torch.load(folder / f"{name}{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", NAMES[:-1])
def test_two_processes_train_as_one_does(name: str, folder: Path) -> None:
    """Although they were interrupted."""
    one, two = (load_file(folder / which / name / "sae.safetensors") for which in ("one", "two"))
    for key, expected in one.items():
        torch.testing.assert_close(two[key], expected, rtol=1e-3, atol=1e-4)
    kept = read_config(folder / "one" / name)
    start = build_sae(kept.sae, kept.width, kept.seed).coder.encoder
    assert (one["coder.encoder"] - start).abs().max() > 0.01


@pytest.mark.parametrize("name", NAMES[:-1])
def test_weights_are_the_same_in_all_processes(name: str, folder: Path) -> None:
    written = load_file(folder / "two" / name / "sae.safetensors")
    for rank in range(2):
        kept = load_file(folder / f"{name}.{rank}")
        assert all(torch.equal(kept[key], written[key]) for key in written)


def test_some_latents_died_and_were_revived(folder: Path) -> None:
    """Or the window and AuxK would not have been looked at."""
    revived = [NAMES[0], NAMES[2]]
    for name in revived:
        assert load_file(folder / "one" / name / "sae.safetensors")["dead_F"].any()


def test_metrics_are_of_the_whole_batch_and_written_once(folder: Path) -> None:
    for name in NAMES[:-1]:
        one, two = (read_metrics(folder / which / name) for which in ("one", "two"))
        assert [line["step"] for line in two] == list(range(5, STEPS + 1, 5))
        for a, b in zip(one, two, strict=True):
            assert a.keys() == b.keys()
            for key in a.keys() - {"seconds", "terms"}:
                assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-4), key
            assert b["terms"] == pytest.approx(a["terms"], rel=1e-3, abs=1e-4)


def test_one_processs_word_stops_all_and_its_loss_fails_the_run(folder: Path) -> None:
    for first, second, statuses in loaded(folder, "results"):
        assert first == STOP_AT * BATCH_TOKENS
        assert second == (STEPS - STOP_AT) * BATCH_TOKENS
        assert statuses == ["done"] * len(SAES) + ["failed"]
    failed = folder / "two" / NAMES[-1]
    assert json.loads((failed / "failed.json").read_text())["step"] == STEPS
    assert checkpoint_step(failed) == STOP_AT


def test_gradients_are_summed_in_the_smaller_form(folder: Path) -> None:
    """Rows that are 0 in both processes are not sent."""
    (sparse0, dense0, value0), (sparse1, dense1, value1) = pair(0), pair(1)
    rows = int(((sparse0 != 0) | (sparse1 != 0)).any(1).sum())
    assert 0 < rows < F
    for found in loaded(folder, "primitives"):
        assert found["loss"] == 0.5
        sums = (sparse0 + sparse1, dense0 + dense1, value0[0] + value1[0])
        for gradient, expected in zip(found["gradients"], sums, strict=True):
            torch.testing.assert_close(gradient, expected / 2)
        assert found["sizes"] == [1 + F, rows * 8, F * 8]


@pytest.mark.parametrize("values", ["top", "top of ties", "top of nan"])
def test_the_largest_of_all_processes(values: str, folder: Path) -> None:
    change = {
        "top": lambda v_MF: v_MF,
        "top of ties": torch.round,
        "top of nan": lambda v_MF: torch.where(v_MF > 1.5, float("inf"), v_MF),
    }[values]
    count = {"top of nan": 100}.get(values, 20)
    everything = [change(pair(rank)[2]).flatten() for rank in range(2)]
    expected = torch.cat(everything).topk(2 * count).values
    positions = [found[values] for found in loaded(folder, "primitives")]
    chosen = [flat[position_P] for flat, position_P in zip(everything, positions, strict=True)]
    assert torch.equal(torch.cat(chosen).sort(descending=True).values, expected)
    assert len(chosen[0]) != count  # or each could have chosen by itself
    assert all(torch.equal(p.unique(), p) for p in positions)


def test_processes_share_the_machine(folder: Path) -> None:
    assert own_cores() == cores()  # of this one, which is alone
    assert [each["cores"] for each in loaded(folder, "primitives")] == [max(1, cores() // 2)] * 2


def test_what_one_process_says_to_the_others(folder: Path) -> None:
    for found in loaded(folder, "primitives"):
        assert found["first"] == "of 0"
        assert found["any"] == [False, True, True]
    peer = "PeerError: process {} of 0 to 1 gave the training up"
    mistake = "ValueError: mistake of {}"
    assert loaded(folder, "refusals") == [
        [mistake.format(0), peer.format(1), mistake.format(0)],
        [peer.format(0), mistake.format(1), peer.format(0)],
    ]


def test_a_process_that_is_killed_ends_the_others(folder: Path) -> None:
    words = ("another of the 2 processes has ended", "--resume")
    assert all(word in (folder / "lost.txt").read_text() for word in words)


@pytest.mark.parametrize(
    ("codes", "cause"),
    [
        ([0, 0], (0, 0)),
        ([PEER_LOST, 2], (1, 2)),
        ([2, PEER_LOST, -15], (0, 2)),
        ([-15, PEER_LOST], (0, -15)),
        ([PEER_LOST, -15, -9], (2, -9)),
        ([1, 0], (0, 1)),
    ],
)
def test_which_process_failed_first(codes: list[int], cause: tuple[int, int]) -> None:
    assert min((Ended(*each) for each in enumerate(codes)), key=_cause) == Ended(*cause)


class Two(World):
    """The first of two processes, for what is refused before the other is asked anything."""

    size = 2


def test_what_cannot_be_shared_out(store: Path, tmp_path: Path) -> None:
    reader = StoreReader(store)

    def go(world: World = ALONE, **options: Any) -> Any:
        settings = TrainConfig(out=tmp_path, **{"batch_tokens": 128, "tokens": 512} | options)
        return train(reader, [(topk(), 3)], settings, world=world)

    with pytest.raises(ValueError, match=r"batches of 129 tokens .* ask for --batch-tokens 128"):
        go(Two(), batch_tokens=129)
    with pytest.raises(ValueError, match=r"\(chunks for 999 streams\) do not fill one batch"):
        go(streams=999, batch_tokens=999)
    assert not list(tmp_path.iterdir())
    go()
    with pytest.raises(RunError, match=r"begun with --nproc 1; .* divisor of it, found 2"):
        go(Two(), resume=True)
    assert go(resume=True).runs[0].status == "done"


def test_more_processes_than_the_machine_has_room_for() -> None:
    check_processes(cores(), "cpu")
    with pytest.raises(ValueError, match=f"expected at most {cores()}, a core here"):
        check_processes(cores() + 1, "cpu")
    with pytest.raises(ValueError, match="1000 processes: expected at most"):
        check_processes(1000, "cuda")
    with pytest.raises(ValueError, match=r"--device cuda:1: .* give cuda"):
        check_processes(2, "cuda:1")


@pytest.mark.parametrize(
    ("ended", "code", "words"),
    [
        (Ended(0, 0), 0, []),
        (Ended(1, 2), 2, []),  # it has said why
        (Ended(0, 143, 2), 130, []),
        (Ended(1, -9), 1, ["process 1 of 0 to 1 was killed by SIGKILL", "--resume"]),
        (Ended(0, -15), 143, ["Stopped.", "--resume"]),
        (Ended(0, -15, 2), 130, ["Stopped.", "--resume"]),
    ],
)
def test_how_the_command_ends(
    ended: Ended,
    code: int,
    words: list[str],
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[Any] = []

    def launched(*arguments: Any) -> Ended:
        started.append(arguments)
        return ended

    monkeypatch.setattr(launch_module, "cores", lambda: 2)
    monkeypatch.setattr(launch_module, "launch", launched)
    command = ["train", store, "--sae", "topk", "--k", 4, "--device", "cpu", "--out", tmp_path]
    result = routesae(*command, "--nproc", 2)
    assert result.exit_code == code, result.output
    assert all(word in result.stderr for word in words)
    assert bool(result.stderr) == bool(words)
    assert [count for _, count, _ in started] == [2]
    refused(routesae(*command, "--nproc", 3), "3 processes", "at most 2")
    for name, value in environment(0, 2, 1).items():
        monkeypatch.setenv(name, value)
    refused(routesae(*command, "--nproc", 2), "torchrun did already")
