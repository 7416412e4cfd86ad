"""Strategic merge of `spec.workers.podPatch` into a Pod, as the API server does it to a Pod.

Lists that the Pod API merges by a key are merged (docs.kubernetes.io, PodSpec's `patchMergeKey`), all others replaced;
null deletes. `$patch` and `$retainKeys` are understood. One difference: new items of a list go to its end, so that the
order of init containers stays what it says.
"""

from __future__ import annotations

import copy
from typing import Any

from .owner import Manifest

_CONTAINER = {
    "ports": "containerPort",
    "env": "name",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
}
MERGE_KEYS: dict[str, str] = {
    "spec.containers": "name",
    "spec.initContainers": "name",
    "spec.volumes": "name",
    "spec.imagePullSecrets": "name",
    "spec.hostAliases": "ip",
    "spec.topologySpreadConstraints": "topologyKey",
    "spec.resourceClaims": "name",
    "spec.schedulingGates": "name",
    **{f"spec.{kind}.{field}": key for kind in ("containers", "initContainers") for field, key in _CONTAINER.items()},
}
"""Path of a list -> the field that tells its items apart. Items add nothing to a path."""

DIRECTIVE, RETAIN = "$patch", "$retainKeys"


class PatchError(ValueError):
    """The patch can't be applied; says where and what was expected."""

    def __init__(self, path: str, found: str, expected: str) -> None:
        super().__init__(f"spec.workers.podPatch{'.' if path else ''}{path}: found {found}, expected {expected}")


def strategic_merge(pod: Manifest, patch: Manifest) -> Manifest:
    """A new object; both arguments stay as they are.

    Raises:
        PatchError: a part has another type than the Pod's, an item lacks its key, or a directive is unknown.
    """
    return _merge_map(pod, patch, "")


def _merge_map(there: Manifest, patch: Manifest, path: str) -> Manifest:
    wanted = dict(patch)
    directive = wanted.pop(DIRECTIVE, "merge")
    if directive == "replace":
        return _merge_map({}, wanted, path)
    if directive == "delete":
        return {}
    if directive != "merge":
        raise PatchError(path, f"{DIRECTIVE}: {directive}", "merge, replace or delete")
    retained = wanted.pop(RETAIN, None)
    merged = copy.deepcopy(there)
    if retained is not None:
        merged = {k: v for k, v in merged.items() if k in retained}
    for key, value in wanted.items():
        at = f"{path}.{key}" if path else key
        if key.startswith("$"):
            raise PatchError(at, "a directive that is not understood", f"{DIRECTIVE} or {RETAIN}")
        before = merged.get(key)
        if value is None:
            merged.pop(key, None)
        elif at in MERGE_KEYS:
            merged[key] = _merge_list(before or [], value, at)
        elif before is not None and isinstance(before, dict) != isinstance(value, dict):
            raise PatchError(at, _kind(value), _kind(before))
        elif isinstance(value, dict):
            merged[key] = _merge_map(before or {}, value, at)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _merge_list(there: list[Manifest], patch: Any, path: str) -> list[Manifest]:
    key = MERGE_KEYS[path]
    if not isinstance(patch, list) or not all(isinstance(item, dict) for item in patch):
        raise PatchError(path, _kind(patch), "a list of objects")
    if any(item.get(DIRECTIVE) == "replace" for item in patch):
        # This one item only says that the others stand for the whole list.
        there, patch = [], [item for item in patch if item.get(DIRECTIVE) != "replace"]
    merged = {item[key]: copy.deepcopy(item) for item in there}
    for item in patch:
        if key not in item:
            raise PatchError(path, "an item without it", f"{key} in every item, by which items are told apart")
        name = item[key]
        if item.get(DIRECTIVE) == "delete":
            merged.pop(name, None)
        else:
            merged[name] = _merge_map(merged.get(name, {}), item, path)
    return list(merged.values())


def _kind(value: Any) -> str:
    names = {dict: "object", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), type(value).__name__)
