"""The ledger against a real S3 server: races, lost answers, older attempts, another run's HEAD."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from starcoder_trainer.agent.ledger import Claimed, Committed, Fenced, Foreign, Ledger
from starcoder_trainer.agent.verify import Corrupt
from starcoder_trainer.contract.config import StorageConfig
from starcoder_trainer.contract.ledger import HEAD_KEY, Head, checkpoint_prefix
from starcoder_trainer.storage.open import open_store
from tests.support.checkpoints import RUN, save_shard

pytestmark = pytest.mark.integration

RACERS = 32


class Relay:
    """A TCP relay that hands a request on whole and, where told to, cuts the line before the answer comes back."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.cut_next_put_of = b""
        """End of a path; empty: none."""
        self.cuts = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        server = socket.create_connection(self._target)
        cut = threading.Event()
        threading.Thread(target=self._answers, args=(server, client, cut), daemon=True).start()
        try:
            while data := client.recv(65536):
                line = data.partition(b"\r\n")[0].split()
                if self.cut_next_put_of and line[0] == b"PUT" and line[1].endswith(self.cut_next_put_of):
                    self.cut_next_put_of = b""
                    cut.set()
                server.sendall(data)
        except OSError:
            pass
        finally:
            server.close()

    def _answers(self, server: socket.socket, client: socket.socket, cut: threading.Event) -> None:
        try:
            while data := server.recv(65536):
                # "100 Continue" is no answer yet: the body is still to come.
                if cut.is_set() and not data.startswith(b"HTTP/1.1 100"):
                    self.cuts += 1
                    client.shutdown(socket.SHUT_RDWR)
                    return
                client.sendall(data)
        except OSError:
            pass
        finally:
            client.close()


@pytest.fixture
def credentials(s3_server, tmp_path):
    folder = tmp_path / "credentials"
    folder.mkdir()
    (folder / "AWS_ACCESS_KEY_ID").write_text(s3_server.access_key)
    (folder / "AWS_SECRET_ACCESS_KEY").write_text(s3_server.secret_key)
    return folder


@pytest.fixture
def opened(s3_server, bucket, credentials):
    def opened(endpoint=s3_server.endpoint):
        return open_store(f"s3://{bucket}/run", StorageConfig(endpoint=endpoint, path_style=True), credentials)

    return opened


@pytest.fixture
def relay(s3_server):
    host, port = s3_server.endpoint.removeprefix("http://").split(":")
    relay = Relay(host, int(port))
    yield relay
    relay.close()


def claim_together(ledgers: list[Ledger], attempt: int) -> list[Claimed | Fenced | Foreign]:
    barrier = threading.Barrier(len(ledgers))

    def race(ledger: Ledger) -> Claimed | Fenced | Foreign:
        barrier.wait()
        return ledger.claim(attempt, "Own")

    with ThreadPoolExecutor(len(ledgers)) as pool:
        return list(pool.map(race, ledgers))


def test_of_32_racers_for_a_new_head_and_for_each_next_attempt_exactly_one_wins(opened):
    ledgers = [Ledger(opened(), RUN, f"boot-{i}", keep_last=3) for i in range(RACERS)]
    for attempt in (1, 2, 3):
        outcomes = claim_together(ledgers, attempt)
        winners = [i for i, outcome in enumerate(outcomes) if isinstance(outcome, Claimed)]
        assert len(winners) == 1
        assert all(outcome == Fenced(attempt) for i, outcome in enumerate(outcomes) if i not in winners)
        assert Head.from_json(opened().get(HEAD_KEY).data).holder == f"boot-{winners[0]}"


@pytest.mark.parametrize("there_already", [False, True])
def test_a_lost_response_to_the_winning_put_is_not_taken_for_a_defeat(opened, relay, there_already):
    if there_already:
        Ledger(opened(), RUN, "before", keep_last=3).claim(1, "Own")
    mine = Ledger(opened(f"http://127.0.0.1:{relay.port}"), RUN, "mine", keep_last=3)
    relay.cut_next_put_of = b"/HEAD.json"
    outcome = mine.claim(2, "Own")
    assert relay.cuts == 1, "the answer was not lost, so nothing was tested"
    assert isinstance(outcome, Claimed)
    head = Head.from_json(opened().get(HEAD_KEY).data)
    assert head == outcome.head
    assert outcome.previous_attempt == (1 if there_already else 0)


def test_a_commit_whose_response_is_lost_lists_the_step_once(opened, relay):
    store = opened(f"http://127.0.0.1:{relay.port}")
    mine = Ledger(store, RUN, "mine", keep_last=3)
    claimed = mine.claim(1, "Own")
    assert isinstance(claimed, Claimed)
    mine.choose(claimed.head)
    save_shard(store, 1, 10)
    mine.commit(1, 10)
    save_shard(store, 1, 20)
    relay.cut_next_put_of = b"/HEAD.json"
    assert isinstance(mine.commit(1, 20), Committed)
    assert relay.cuts == 1
    assert [e.step for e in Head.from_json(store.get(HEAD_KEY).data).entries] == [10, 20]


def test_an_older_attempt_cannot_commit_what_it_finished_uploading(opened):
    old, new = (Ledger(opened(), RUN, holder, keep_last=3) for holder in ("old", "new"))
    old.claim(1, "Own")
    save_shard(opened(), 1, 10)
    new.claim(2, "Own")
    assert old.commit(1, 10) == Fenced(2)
    assert Head.from_json(opened().get(HEAD_KEY).data).entries == ()


def test_a_run_deleted_and_applied_again_is_refused_unless_it_adopts(opened):
    first = Ledger(opened(), RUN, "first", keep_last=3)
    claimed = first.claim(1, "Own")
    assert isinstance(claimed, Claimed)
    first.choose(claimed.head)
    save_shard(opened(), 1, 10)
    first.commit(1, 10)
    again = Ledger(opened(), replace(RUN, uid="uid-2"), "again", keep_last=3)
    assert isinstance(again.claim(2, "Own"), Foreign)
    assert again.claim(1, "Adopt") == Fenced(1)
    adopted = again.claim(2, "Adopt")
    assert isinstance(adopted, Claimed)
    chosen = again.choose(adopted.head)
    assert chosen.entry is not None
    assert chosen.entry.step == 10


def test_a_file_in_parts_is_verified_by_the_checksum_that_the_server_keeps(opened, tmp_path):
    store = opened()
    path = tmp_path / "big.bin"
    path.write_bytes(bytes(range(256)) * (4096 * 40) + b"odd")
    done = store.upload_file("big.bin", path)
    assert done.checksum.endswith("-3")
    assert store.stat("big.bin").checksum == done.checksum
    assert store.stat("big.bin").size == path.stat().st_size == done.size


def test_an_object_replaced_by_another_of_the_same_size_is_refused(opened):
    mine = Ledger(opened(), RUN, "mine", keep_last=3)
    mine.claim(1, "Own")
    save_shard(opened(), 1, 10)
    key = f"{checkpoint_prefix(1, 10)}/rank-00000.bin"
    opened().put(key, b"x" * opened().stat(key).size)
    with pytest.raises(Corrupt, match="SHA-256"):
        mine.commit(1, 10)
