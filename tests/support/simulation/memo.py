"""Pure functions that the same schedule calls hundreds of times with the same arguments, remembered between calls.

Nothing that decides is in here: parsing of documents and building of manifests only.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

from starcoder_operator import act, observe
from starcoder_operator.api.v1alpha1 import StarCoderRunSpec
from starcoder_operator.build import pod as build
from starcoder_operator.domain import planner, validation
from starcoder_trainer.contract.codec import Document
from starcoder_trainer.contract.config import TrainingConfig

MOST = 4096


def by_identity(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """For arguments that are never changed in place, as objects of the simulated API server."""
    known: dict[int, tuple[Any, Any]] = {}

    def remembered(value: Any) -> Any:
        found = known.get(id(value))
        if found is None or found[0] is not value:
            if len(known) > MOST:
                known.clear()
            found = known[id(value)] = (value, function(value))
        return found[1]

    return remembered


@functools.lru_cache(MOST)
def _from_json(cls: type[Any], text: str | bytes) -> Any:
    return cls.from_dict(json.loads(text))


_plain_from_json = Document.__dict__["from_json"].__func__


def _document(cls: type[Any], text: str | bytes) -> Any:
    try:
        return _from_json(cls, text)
    except ValueError:
        return _plain_from_json(cls, text)  # says what is wrong


_config = by_identity(functools.partial(Document.__dict__["from_dict"].__func__, TrainingConfig))
_spec = by_identity(StarCoderRunSpec.model_validate)
_digest = by_identity(lambda spec: json.dumps(spec.workers.to_dict(), sort_keys=True))
_to_json = by_identity(Document.to_json)
_problems = by_identity(validation.problems)
_pods: dict[Any, Any] = {}


def _pod(owner: Any, spec: Any, image: Any, **options: Any) -> Any:
    """A fresh copy as deep as the callers change it."""
    key = (owner, _digest(spec), str(spec.scheduling), image, json.dumps(options, sort_keys=True, default=str))
    if key not in _pods:
        if len(_pods) > MOST:
            _pods.clear()
        _pods[key] = build.pod(owner, spec, image, **options)
    made = _pods[key]
    return made | {"metadata": dict(made["metadata"]), "spec": dict(made["spec"])}


def _said(document: Any) -> Any:
    return _to_json(document)


@contextmanager
def remembering() -> Iterator[None]:
    with ExitStack() as patches:
        for module, name, value in (
            (observe, "StarCoderRunSpec", SimpleNamespace(model_validate=_spec)),
            (act, "pod", _pod),
            (planner, "problems", _problems),
            (Document, "to_json", _said),
            (Document, "from_json", classmethod(_document)),
            (TrainingConfig, "from_dict", classmethod(lambda cls, value: _config(value))),
        ):
            patches.enter_context(mock.patch.object(module, name, value))
        yield
