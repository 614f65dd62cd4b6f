"""The manifest of a packed data set, read and checked: what its readers take from it is there, and of its kind."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any, NotRequired

from annotated_types import Ge, Gt, Lt, MinLen
from pydantic import AfterValidator, StringConstraints, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from ao.manifest import read_manifest

SCHEMA = 1
"""Version of the manifest and of the shards."""

_REMEDY = "rerun ao-pack with this version of ao"

_Count = Annotated[int, Ge(0), Lt(2**53)]
_ByName = dict[str, _Count]
_Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_TokenId = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,10}$")]


class _Model(TypedDict):
    model: str
    weights: str
    num_layers: Annotated[int, Gt(0), Lt(2**15)]
    tokenizer: str
    template: str
    placeholder: str
    placeholder_id: _TokenId
    end_of_turn_id: _TokenId


class _Targets(TypedDict):
    __pydantic_config__ = {"extra": "forbid"}  # pyright: ignore[reportGeneralTypeIssues]  # noqa: RUF012

    base: _Model


class _Config(TypedDict):
    seed: int
    layers_per_example: str
    examples_per_shard: _Count
    max_input_tokens: _Count
    max_context_tokens: _Count
    read_depths: list[int | float]
    sources: list[dict[str, Any]]


class _Shard(TypedDict):
    file: Annotated[str, StringConstraints(pattern=r"^shard-[0-9]{5,}\.safetensors$")]
    bytes: _Count
    sha256: _Digest
    examples: _Count
    datapoints: _Count


class _Offered(TypedDict):
    offered: _Count
    examples: _Count
    datapoints: _Count
    input_tokens: _Count
    answer_tokens: _Count
    context_tokens_read: _Count
    # Data sets of older versions lack these counts.
    unanswerable: NotRequired[_Count]
    without_donor: NotRequired[_Count]


class _Counts(_Offered):
    contexts: _Count
    context_tokens: _Count
    placeholders: _Count
    duplicates: NotRequired[_Count]


class _Source(_Offered):
    drops: _ByName
    errors: _ByName
    answers: dict[str, Annotated[int, Gt(0), Lt(2**53)]]


class _Lengths(TypedDict):
    edges: list[_Count]
    input: list[_Count]
    context: list[_Count]


def _have_buckets(lengths: _Lengths) -> _Lengths:
    expected = len(lengths["edges"]) + 1
    for name in ("input", "context"):
        if (found := len(lengths[name])) != expected:
            raise ValueError(f"expected {expected} buckets in {name!r}, one more than edges, got {found}")
    return lengths


class _Manifest(TypedDict):
    build: _Digest
    framer: dict[str, str]
    oracle: _Model
    targets: _Targets
    config: _Config
    inputs: list[dict[str, Any]]
    shards: Annotated[list[_Shard], MinLen(1)]
    counts: _Counts
    drops: _ByName
    errors: _ByName
    lengths: Annotated[_Lengths, AfterValidator(_have_buckets)]
    sources: dict[str, _Source]
    rules: NotRequired[int]


@cache
def _adapter() -> TypeAdapter[_Manifest]:
    return TypeAdapter(_Manifest)


def data_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a packed data set, as it stands there.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is of something else or of another schema, or lacks what it must have; names the first keys.
    """
    path = folder / "manifest.json"
    manifest = read_manifest(path)
    if (kind := manifest.get("kind"), schema := manifest.get("schema")) != ("packed", SCHEMA):
        raise ValueError(
            f"{folder}: expected a packed data set of schema {SCHEMA}, got kind {kind!r}, schema {schema!r}; {_REMEDY}"
        )
    try:
        _adapter().validate_python(manifest, strict=True)
    except ValidationError as error:
        raise ValueError(f"{path} {_problem(error)}; it is damaged or of another version: {_REMEDY}") from None
    return manifest


def _problem(error: ValidationError) -> str:
    """What a manifest lacks, or else the first thing in it that is wrong."""
    found = [(".".join(map(str, each["loc"])), each) for each in error.errors(include_url=False)]
    if lacking := [where for where, each in found if each["type"] == "missing"]:
        return f"lacks {', '.join(lacking)}"
    where, first = found[0]
    got = repr(first["input"])
    return f"has at {where}: {first['msg']}, got {got if len(got) <= 80 else got[:77] + '...'}"
