"""Workers of a real fork server, torch and megatron imported once: they form, train, save, fail and start again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

from starcoder_trainer.contract import exits
from starcoder_trainer.contract.assignment import CheckpointRef, Layout
from starcoder_trainer.contract.config import TrainingConfig
from starcoder_trainer.contract.worker import Exited, Message, Ready, Saved, Start, Started, Step, Stop, Stopped
from tests.support.forkserver import IMPORTED, Agent, broken_at, connect, fork_server
from tests.support.trainer import commit, listen, make_config, store_uri

pytestmark = pytest.mark.slow

LAYOUT = Layout(2, 1, 2)
ENDLESS = 100_000


@dataclass(frozen=True)
class Server:
    pid: int
    ready: Ready
    agent: Agent
    log: Path

    def start(
        self,
        config: TrainingConfig,
        folder: Path,
        layout: Layout = LAYOUT,
        attempt: int = 1,
        checkpoint: CheckpointRef | None = None,
    ) -> None:
        """Ranks of the whole gang, as one Pod."""
        with listen() as listener:
            address, port = listener.getsockname()
            ranks = tuple(range(layout.world_size))
            start = Start(attempt, ranks, layout, address, port, checkpoint, config.to_dict(), str(folder), address)
            self.agent.send(start, listener)

    def until_all_exited(self, ranks: int) -> tuple[list[Message], dict[int, Exited]]:
        """All that was said until then, and how each rank ended."""
        said: list[Message] = []
        ended: dict[int, Exited] = {}
        while len(ended) < ranks:
            message = self.agent.receive()
            if isinstance(message, Exited):
                ended[message.rank] = message
            else:
                said.append(message)
        return said, ended

    def stop(self, attempt: int) -> None:
        self.agent.send(Stop(attempt))
        self.agent.until(Stopped)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    path, log = folder / "worker.sock", folder / "log"
    with fork_server(path, log) as process, contextlib.closing(connect(path, process)) as agent:
        ready = agent.receive()
        assert isinstance(ready, Ready)
        yield Server(process.pid, ready, agent, log)


def config(folder: Path, layout: Layout = LAYOUT, iterations: int = 6) -> TrainingConfig:
    return make_config(
        layout, iterations=iterations, global_batch=4, every_iterations=3, dropout=0.1, checkpoint_uri=store_uri(folder)
    )


@pytest.fixture(scope="module")
def trained(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Message], dict[int, Exited]]:
    folder = tmp_path_factory.mktemp("run")
    server.start(config(folder), folder)
    return (folder, *server.until_all_exited(LAYOUT.world_size))


def losses(said: list[Message]) -> list[tuple[int, float]]:
    return [(m.iteration, m.loss) for m in said if isinstance(m, Step)]


def test_all_ranks_start_train_save_and_end_well(
    trained: tuple[Path, list[Message], dict[int, Exited]],
) -> None:
    _, said, ended = trained
    ranks = range(LAYOUT.world_size)
    assert ended == {r: Exited(1, r, exits.OK) for r in ranks}
    assert sorted(m.rank for m in said if isinstance(m, Started)) == list(ranks)
    assert {(m.iteration, m.attention) for m in said if isinstance(m, Started)} == {(0, "sdpa")}
    assert sorted((m.step, m.rank) for m in said if isinstance(m, Saved)) == [(s, r) for s in (3, 6) for r in ranks]
    for saved in (m for m in said if isinstance(m, Saved)):
        written = sum(p.stat().st_size for p in Path(saved.directory).glob(f"rank-{saved.rank:05d}.*"))
        assert saved.size_bytes == written > 0
        assert saved.seconds > 0


def test_the_lowest_rank_tells_what_each_iteration_came_to(
    trained: tuple[Path, list[Message], dict[int, Exited]],
) -> None:
    steps = [m for m in trained[1] if isinstance(m, Step)]
    assert [(s.rank, s.iteration) for s in steps] == [(0, i) for i in range(1, 7)]
    assert [s.consumed_samples for s in steps] == [4 * i for i in range(1, 7)]
    assert [s.consumed_tokens for s in steps] == [4 * 48 * i for i in range(1, 7)]
    for step in steps:
        assert step.loss > 0
        assert step.grad_norm > 0
        assert step.tokens_per_second == pytest.approx(4 * 48 / step.seconds["total"])
        assert step.model_flops_utilisation is None, "the peak of a CPU is not known"
    assert [s.learning_rate for s in steps[:2]] == pytest.approx([5e-4, 1e-3])


def test_seconds_of_all_iterations_are_told_with_each_that_is_logged(
    trained: tuple[Path, list[Message], dict[int, Exited]],
) -> None:
    said = trained[1]
    steps = {m.iteration: m for m in said if isinstance(m, Step)}
    assert steps[6].data_seconds == pytest.approx(sum(s.seconds["data"] for s in steps.values()))
    saved = next(m for m in said if isinstance(m, Saved) and (m.step, m.rank) == (3, 0))
    assert [steps[i].checkpoint_seconds for i in range(1, 7)] == [0.0] * 3 + [saved.seconds] * 3
    assert all(m.loading_seconds > 0 for m in said if isinstance(m, Started))


def test_workers_are_forks_that_import_nothing(
    server: Server, trained: tuple[Path, list[Message], dict[int, Exited]]
) -> None:
    assert trained
    assert server.ready.pid == server.pid
    assert psutil.Process(server.pid).num_threads() == 1, "a fork of a process with threads is not safe"
    assert b"spawned" not in server.log.read_bytes()


def test_a_second_attempt_resumes_bitwise_from_what_the_first_saved(
    server: Server, trained: tuple[Path, list[Message], dict[int, Exited]]
) -> None:
    folder, said, _ = trained
    checkpoint = commit(folder, 1, 3, LAYOUT.world_size)
    server.start(config(folder), folder, attempt=2, checkpoint=checkpoint)
    again, ended = server.until_all_exited(LAYOUT.world_size)
    assert {e.exit_code for e in ended.values()} == {exits.OK}
    assert {m.iteration for m in again if isinstance(m, Started)} == {3}
    assert losses(again) == losses(said)[3:]


def test_the_first_iteration_of_an_attempt_is_logged_however_seldom_the_others_are(
    server: Server, trained: tuple[Path, list[Message], dict[int, Exited]]
) -> None:
    folder = trained[0]
    seldom = config(folder)
    seldom = replace(seldom, training=replace(seldom.training, log_every_iterations=5))
    server.start(seldom, folder, attempt=4, checkpoint=commit(folder, 1, 3, LAYOUT.world_size))
    said, _ = server.until_all_exited(LAYOUT.world_size)
    assert [m.iteration for m in said if isinstance(m, Step)] == [4, 5, 6]


def test_when_one_rank_is_killed_the_others_say_that_a_peer_went(server: Server, tmp_path: Path) -> None:
    server.start(config(tmp_path, iterations=ENDLESS), tmp_path)
    while server.agent.until(Step).iteration < 3:
        pass
    workers = sorted(psutil.Process(server.pid).children(), key=lambda p: p.create_time())
    workers[2].kill()
    _, ended = server.until_all_exited(LAYOUT.world_size)
    killed = ended.pop(2)
    assert (killed.exit_code, killed.failure and killed.failure.cause) == (-9, "Crash")
    assert {(e.exit_code, e.failure and e.failure.cause) for e in ended.values()} == {(exits.PEER_LOST, "Peer")}


@pytest.mark.parametrize(
    ("error", "cause", "code", "message"),
    [
        ("configuration", "UserError", exits.USER_ERROR, "ConfigurationError: sample is bad"),
        ("arithmetic", "Crash", exits.CRASH, "ZeroDivisionError: division by zero"),
    ],
)
def test_an_exception_is_told_with_its_cause_rank_and_iteration(
    server: Server, tmp_path: Path, error: str, cause: str, code: int, message: str
) -> None:
    layout = Layout(1, 1, 2)
    # Samples 8 to 11 are the third iteration; 11 is of rank 1.
    server.start(broken_at(config(tmp_path, layout, iterations=ENDLESS), 11, error), tmp_path, layout)
    _, ended = server.until_all_exited(2)
    failure = ended[1].failure
    assert failure is not None
    assert (failure.cause, failure.exit_code, failure.message) == (cause, code, message)
    assert (failure.rank, failure.iteration) == (1, 2)
    assert ended[0].exit_code == exits.PEER_LOST, "its neighbour only lost a peer"
    assert b"Traceback" in server.log.read_bytes()


def test_stop_ends_workers_in_the_middle_of_training_and_the_server_can_start_others(
    server: Server, tmp_path: Path
) -> None:
    server.start(config(tmp_path, iterations=ENDLESS), tmp_path)
    server.agent.until(Step)
    workers = psutil.Process(server.pid).children()
    assert len(workers) == LAYOUT.world_size
    server.stop(1)
    assert not any(w.is_running() for w in workers)
    alone = Layout(1, 1, 1)
    server.start(config(tmp_path, alone, iterations=1), tmp_path, alone, attempt=2)
    _, ended = server.until_all_exited(1)
    assert ended == {0: Exited(2, 0, exits.OK)}


def test_a_gang_that_does_not_meet_in_time_says_who_waited_where(server: Server, tmp_path: Path) -> None:
    # Only rank 1 of 2 is started, and nobody listens where it was told to go.
    layout = Layout(1, 1, 2)
    with listen() as listener:
        port = listener.getsockname()[1]
    start = Start(
        1, (1,), layout, "127.0.0.1", port, None, config(tmp_path, layout).to_dict(), str(tmp_path), "127.0.0.1"
    )
    server.agent.send(start)
    ended = server.agent.until(Exited)
    assert ended.exit_code == exits.FORMATION
    assert ended.failure.cause == "FormationTimeout"
    assert f"rank 1 of 2 did not join at 127.0.0.1:{port}" in ended.failure.message


def test_an_address_that_the_pod_does_not_have_is_named(server: Server, tmp_path: Path) -> None:
    start = Start(
        1, (0,), Layout(1, 1, 1), "127.0.0.1", 1, None, config(tmp_path).to_dict(), str(tmp_path), "203.0.113.9"
    )
    server.agent.send(start)
    failure = server.agent.until(Exited).failure
    assert failure.cause == "FormationTimeout"
    assert "no network interface has 203.0.113.9, found 127.0.0.1" in failure.message


def test_what_a_worker_imports_is_there_before_it_is_forked(server: Server, tmp_path: Path) -> None:
    """Each restart would import it anew. Also what only a worker needs that resumes."""
    first = config(tmp_path, iterations=3)
    server.start(first, tmp_path)
    server.until_all_exited(LAYOUT.world_size)
    newest = commit(tmp_path, 1, 3, LAYOUT.world_size)
    server.start(config(tmp_path), tmp_path, attempt=2, checkpoint=newest)
    server.until_all_exited(LAYOUT.world_size)
    told = [line.partition(IMPORTED)[2].strip() for line in server.log.read_text().splitlines() if IMPORTED in line]
    assert len(told) >= 2 * LAYOUT.world_size
    assert set(told[-LAYOUT.world_size :]) == {"[]"}
    assert set(told[-2 * LAYOUT.world_size : -LAYOUT.world_size]) == {"[]"}


def test_a_layout_that_the_model_does_not_divide_by_is_the_users_to_mend(server: Server, tmp_path: Path) -> None:
    layout = Layout(1, 3, 1)
    server.start(config(tmp_path, layout), tmp_path, layout)
    _, ended = server.until_all_exited(3)
    assert {e.exit_code for e in ended.values()} == {exits.USER_ERROR}
    failure = ended[0].failure
    assert failure is not None
    assert failure.message == ("ConfigurationError: model.layers is 2, expected a multiple of parallelism.pipeline (3)")


def test_asked_to_end_while_it_imports_it_goes_at_once(tmp_path: Path) -> None:
    path, log = tmp_path / "worker.sock", tmp_path / "log"
    with fork_server(path, log) as process, contextlib.closing(connect(path, process)):
        process.terminate()  # it listens, so it has begun to import
        assert process.wait(60) == 0
    assert b"asked to end" in log.read_bytes()
    assert b"preloaded in" not in log.read_bytes()
