"""The Ray edge: addresses that do not answer, waits with a deadline and a name, and user errors that cross processes whole."""

import os
import socket
import time

import pytest
import ray

from bregman.engines import cluster
from bregman.engines.config import ClusterConfig
from bregman.errors import ClusterError, DataError


@pytest.fixture
def closed_port():
    """A port of this machine on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "no-such-host.invalid:{port}"])
def test_an_address_without_a_cluster_is_named_at_once(address, closed_port):
    address = address.format(port=closed_port)
    started = time.monotonic()
    with pytest.raises(ClusterError, match=r"cluster.address \(.*no Ray cluster could be started or joined.*use `local`"):
        cluster.start(ClusterConfig(address=address))
    assert time.monotonic() - started < 15


@pytest.fixture(scope="module")
def actor():
    cluster.start(ClusterConfig())

    class Worker:
        def ok(self):
            return os.environ["OMP_NUM_THREADS"]

        def user_error(self):
            raise DataError("row 7", "is empty", "drop it")

        def bug(self):
            raise KeyError("bug")

        def sleep(self):
            time.sleep(30)

        def die(self):
            os._exit(1)

    yield ray.remote(Worker)
    cluster.stop()


class TestWait:
    def test_results_come_in_order_and_workers_have_one_thread(self, actor):
        worker = actor.remote()
        assert cluster.wait([worker.ok.remote(), worker.ok.remote()], what="w", timeout=60) == ["1", "1"]

    def test_user_errors_arrive_as_they_were_raised(self, actor):
        with pytest.raises(DataError) as error:
            cluster.wait([actor.remote().user_error.remote()], what="w", timeout=60)
        assert type(error.value) is DataError
        assert str(error.value) == "row 7: is empty; drop it"

    def test_bugs_keep_their_type_and_the_workers_traceback(self, actor):
        with pytest.raises(KeyError, match="bug") as error:
            cluster.wait([actor.remote().bug.remote()], what="w", timeout=60)
        assert "def bug" in str(error.value) or "in bug" in str(error.value)

    def test_a_missed_deadline_names_the_wait(self, actor):
        with pytest.raises(ClusterError, match=r"rollout worker 3: no answer after \d s; raise cluster.step_timeout"):
            cluster.wait([actor.remote().sleep.remote()], what="rollout worker 3", timeout=0.5)

    def test_a_dead_worker_is_named(self, actor):
        with pytest.raises(ClusterError, match="learner rank 0: the worker died"):
            cluster.wait([actor.remote().die.remote()], what="learner rank 0", timeout=60)

    def test_servers_listen_on_loopback_only(self, actor):
        assert ray.util.get_node_ip_address() == "127.0.0.1"


class TestRunAlone:
    """A function in a process of its own. `actor` stands for the cluster."""

    def test_results_come_back_and_every_call_has_a_new_process(self, actor):
        calls = [cluster.run_alone(lambda a, *, b: (a + b, os.getpid()), 1, b=2, what="w", timeout=60) for _ in range(2)]
        assert [result for result, _ in calls] == [3, 3]
        assert len({os.getpid(), *(process for _, process in calls)}) == 3

    def test_user_errors_arrive_as_they_were_raised(self, actor):
        def fails():
            raise DataError("row 7", "is empty", "drop it")

        with pytest.raises(DataError, match="row 7: is empty; drop it"):
            cluster.run_alone(fails, what="w", timeout=60)

    def test_a_process_that_dies_is_named(self, actor):
        with pytest.raises(ClusterError, match="stage dpo: its process died"):
            cluster.run_alone(lambda: os._exit(1), what="stage dpo", timeout=60)

    def test_a_missed_deadline_ends_the_process(self, actor, tmp_path):
        def sleeps(path):
            path.write_text(str(os.getpid()))
            time.sleep(60)

        with pytest.raises(ClusterError, match="stage dpo: no answer after .* raise the stage's timeout"):
            cluster.run_alone(sleeps, tmp_path / "pid", what="stage dpo", timeout=5)
        until = time.monotonic() + 20
        while os.path.exists(f"/proc/{(tmp_path / 'pid').read_text()}") and time.monotonic() < until:
            time.sleep(0.1)
        assert time.monotonic() < until
