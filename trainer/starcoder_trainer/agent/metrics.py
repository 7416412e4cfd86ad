"""`/metrics` of a Pod of a run. Few labels: scraping adds Pod and namespace, and a series a rank would help nobody."""

from __future__ import annotations

import threading
import typing
from collections.abc import Callable
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Info, start_http_server

from starcoder_trainer.agent.heartbeats import Standing
from starcoder_trainer.contract.report import Report, State
from starcoder_trainer.contract.worker import Saved, Started, Step

STATES: tuple[State, ...] = typing.get_args(State)


class Metrics:
    """Rates are of the whole gang where not said otherwise, as the workers report them. What is not known yet is absent
    rather than 0."""

    def __init__(self, run: str, version: str) -> None:
        self.registry = registry = CollectorRegistry()

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"starcoder_{name}", text, registry=None)

        def labelled(name: str, text: str, label: str) -> Gauge:
            return Gauge(f"starcoder_{name}", text, (label,), registry=registry)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"starcoder_{name}", text, registry=registry)

        Info("starcoder_build", "Version of the trainer and the run it serves.", registry=registry).info(
            {"version": version, "run": run}
        )
        self._iteration = gauge("iteration", "Iterations done.")
        self._loss = gauge("loss", "Mean loss over unmasked tokens of the last logged iteration.")
        self._rate = gauge("tokens_per_second", "Tokens per second of the whole gang.")
        self._rate_gpu = gauge("tokens_per_second_per_gpu", "Tokens per second, per GPU.")
        self._learning_rate = gauge("learning_rate", "Learning rate of the last logged iteration.")
        self._grad_norm = gauge("gradient_norm", "Global norm of the gradient before clipping.")
        self._tokens = gauge("consumed_tokens", "Tokens trained on since iteration 0.")
        self._mfu = gauge("model_flops_utilisation_ratio", "Model FLOPs as a share of the device's peak, where known.")
        self._seconds = labelled("step_seconds", "Seconds of the last logged iteration by phase.", "phase")
        self._attention = labelled("attention_backend", "1 for the attention kernel in use.", "backend")
        self._attempt = gauge("attempt", "Attempt that this Pod's state is about.")
        self._state = labelled("state", "1 for the state that this Pod is in.", "state")
        self._save_seconds = gauge("checkpoint_save_seconds", "Slowest local rank writing the newest step to disk.")
        self._save_bytes = gauge("checkpoint_save_bytes", "Bytes of the newest step that local ranks wrote to disk.")
        self._upload_seconds = gauge("checkpoint_upload_seconds", "Uploading this Pod's shard of the newest step.")
        self._uploaded = counter("checkpoint_uploaded_bytes", "Bytes of checkpoints uploaded by this Pod.")
        self._verified = gauge("checkpoint_verified_iteration", "Newest iteration in HEAD, on the leader.")
        self._suspects = gauge("heartbeat_suspects", "Members that missed several heartbeats in a row.")
        self._silence = gauge("heartbeat_silence_seconds", "Since the quietest that this agent listens to was heard.")
        self._relayed = gauge("heartbeat_relayed", "1 while a relay speaks for this agent.")
        self._known: set[Gauge] = set()
        self._saves: tuple[int, dict[int, Saved]] = (-1, {})

    def _set(self, gauge: Gauge, value: float) -> None:
        gauge.set(value)
        if gauge not in self._known:
            self._known.add(gauge)
            self.registry.register(gauge)

    def started(self, started: Started) -> None:
        self._attention.clear()
        self._attention.labels(started.attention).set(1)

    def stepped(self, step: Step, world_size: int) -> None:
        self._set(self._iteration, step.iteration)
        self._set(self._loss, step.loss)
        self._set(self._rate, step.tokens_per_second)
        self._set(self._rate_gpu, step.tokens_per_second / world_size)
        self._set(self._learning_rate, step.learning_rate)
        self._set(self._grad_norm, step.grad_norm)
        self._set(self._tokens, step.consumed_tokens)
        for phase, seconds in step.seconds.items():
            self._seconds.labels(phase).set(seconds)
        if step.model_flops_utilisation is not None:
            self._set(self._mfu, step.model_flops_utilisation)

    def saved(self, saved: Saved) -> None:
        step, ranks = self._saves
        ranks = {**ranks, saved.rank: saved} if step == saved.step else {saved.rank: saved}
        self._saves = (saved.step, ranks)
        self._set(self._save_seconds, max(s.seconds for s in ranks.values()))
        self._set(self._save_bytes, sum(s.size_bytes for s in ranks.values()))

    def uploaded(self, seconds: float, size_bytes: int) -> None:
        self._set(self._upload_seconds, seconds)
        self._uploaded.inc(size_bytes)

    def reported(self, report: Report) -> None:
        self._set(self._attempt, report.attempt)
        for state in STATES:
            self._state.labels(state).set(state == report.state)
        if report.verified:
            self._set(self._verified, report.verified.checkpoint.step)

    def stands(self, standing: Standing) -> None:
        self._set(self._suspects, len(standing.suspects))
        self._set(self._relayed, bool(standing.relayed_by))

    def heard(self, longest_silence: float) -> None:
        self._set(self._silence, longest_silence)

    def serve(self, port: int, address: str = "") -> Callable[[], None]:
        """Serves from a thread; returns what stops it. Raises OSError where the port is taken."""
        server: WSGIServer
        thread: threading.Thread
        server, thread = start_http_server(port, addr=address or "0.0.0.0", registry=self.registry)  # noqa: S104

        def stop() -> None:
            server.shutdown()
            thread.join()
            server.server_close()

        return stop
