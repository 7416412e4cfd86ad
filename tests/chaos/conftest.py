from tests.support.dev_cluster import cluster, pytest_runtest_makereport, ready, trained_on, up

__all__ = ["cluster", "pytest_runtest_makereport", "ready", "trained_on", "up"]
