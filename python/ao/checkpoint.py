"""`ao_config.json`: what an adapter must be used with, written by training and believed by everyone else.

The top level has the keys of schema 1 that published adapters carry, so that other tools load ours; what no published
schema records stands under `ao`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from ao.injection import RULES
from ao.manifest import read_manifest

SCHEMA = 1
FILE = "ao_config.json"
PLACEHOLDER = " ?"
PREFIX_TEMPLATE = "Layer: {layer}\n{special_token} * {num_positions} \n"
"""The one prompt prefix that this package writes and reads, in the published notation."""


@dataclass(frozen=True, kw_only=True)
class OracleConfig:
    """The contract of an adapter."""

    model: str
    """Checkpoint of the base."""
    injection: str
    """Rule by which vectors enter: see `ao.injection`."""
    injection_layer: int
    """Block at whose output they enter."""
    injection_scale: float = 1.0
    """Coefficient c."""
    rescale: float = 2.0
    """Final norm s of `rescaled_add`."""
    placeholder: str = PLACEHOLDER
    """Placeholder text, one token."""
    layer_combinations: tuple[tuple[int, ...], ...]
    """Layers that one prompt showed in training, as absolute indices."""
    num_layers: int
    """Blocks of the base."""
    framing: Mapping[str, str] = field(default_factory=dict)
    """Fingerprint of tokenizer, template and placeholder; empty for an adapter that records none."""
    trained: Mapping[str, Any] = field(default_factory=dict)
    """What it was trained on: steps, examples, LoRA settings, precision, versions."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Every layer that training showed, in order."""
        return tuple(sorted({layer for combination in self.layer_combinations for layer in combination}))

    @property
    def default_layer(self) -> int:
        """The trained layer nearest to half the depth, where an ask names none."""
        return min(self.layers, key=lambda layer: abs(layer - self.num_layers // 2))

    def to_json(self) -> dict[str, Any]:
        """The contents of `ao_config.json`."""
        lora = self.trained.get("lora", {})
        return {
            "schema_version": SCHEMA,
            "model_name": self.model,
            "hook_onto_layer": self.injection_layer,
            "layer_combinations": [
                # Rounded up, so that int(num_layers * percent / 100) is the layer again.
                [-(-100 * layer // self.num_layers) for layer in combination]
                for combination in self.layer_combinations
            ],
            "act_layer_combinations": [list(combination) for combination in self.layer_combinations],
            "special_token": self.placeholder,
            "prefix_template": PREFIX_TEMPLATE,
            "steering_coefficient": self.injection_scale,
            **{f"lora_{key}": value for key, value in lora.items()},
            "ao": {
                "injection": self.injection,
                "rescale": self.rescale,
                "num_layers": self.num_layers,
                "framing": dict(self.framing),
                "trained": dict(self.trained),
            },
        }

    @classmethod
    def from_json(
        cls, values: Mapping[str, Any], *, num_layers: int, injection: str | None = None, origin: str = FILE
    ) -> OracleConfig:
        """Read the contract of an adapter, ours or a published one.

        Args:
            values: the contents of the file.
            num_layers: blocks of the loaded base.
            injection: overrides the rule, for an adapter that does not record it.
            origin: named in errors.

        Raises:
            ValueError: another schema, another prompt prefix, a layer outside the base, or no injection rule.
        """
        values = _checked(values, origin)
        if values.get("schema_version") != SCHEMA:
            raise ValueError(f"{origin}: schema_version: expected {SCHEMA}, got {values.get('schema_version')!r}")
        prefix = values.get("prefix_template", PREFIX_TEMPLATE).replace("\\n", "\n")
        if prefix != PREFIX_TEMPLATE:
            raise ValueError(
                f"{origin}: prefix_template: expected {PREFIX_TEMPLATE!r}, got {prefix!r}; such prompts are not supported"
            )
        placeholder = values.get("special_token", PLACEHOLDER)
        if placeholder != PLACEHOLDER:
            raise ValueError(
                f"{origin}: special_token: expected {PLACEHOLDER!r}, got {placeholder!r}; other placeholders are not supported"
            )
        for key in ("model_name", "hook_onto_layer", "layer_combinations"):
            if key not in values:
                raise ValueError(f"{origin} lacks {key!r}; without it the adapter cannot be asked as it was trained")
        ours = values.get("ao", {})
        if injection is None:
            # Schema 1 has a steering coefficient only in the code base whose rule is this one.
            injection = ours.get("injection") or ("norm_matched_add" if "steering_coefficient" in values else None)
        if injection is None:
            raise ValueError(f'{origin}: records no injection rule; say injection="norm_matched_add" or "replace"')
        if injection not in RULES:
            raise ValueError(f"{origin}: injection: expected one of {', '.join(RULES)}, got {injection!r}")
        combinations = values.get("act_layer_combinations") or [
            [int(num_layers * percent / 100) for percent in combination] for combination in values["layer_combinations"]
        ]
        if not combinations or not all(combinations):
            raise ValueError(f"{origin}: layer_combinations: expected at least one, of layers each, got {combinations}")
        config = cls(
            model=values["model_name"],
            injection=injection,
            injection_layer=values["hook_onto_layer"],
            injection_scale=values.get("steering_coefficient", 1.0),
            rescale=ours.get("rescale", 2.0),
            placeholder=placeholder,
            layer_combinations=tuple(tuple(combination) for combination in combinations),
            num_layers=num_layers,
            framing=ours.get("framing", {}),
            trained=ours.get("trained", {}),
        )
        outside = [layer for layer in (*config.layers, config.injection_layer) if not 0 <= layer < num_layers]
        if outside or ours.get("num_layers", num_layers) != num_layers:
            raise ValueError(
                f"{origin}: made for {ours.get('num_layers', 'another number of')} layers with {config.layers} read and "
                f"{config.injection_layer} written, but the loaded base has {num_layers}; load the base {config.model!r}"
            )
        return config


class _Published(TypedDict, total=False):
    """The keys of the file that are read, and their types; others may stand beside them."""

    schema_version: int
    model_name: str
    hook_onto_layer: int
    layer_combinations: list[list[float]]
    act_layer_combinations: list[list[int]]
    special_token: str
    prefix_template: str
    steering_coefficient: float
    ao: dict[str, Any]


def _checked(values: Mapping[str, Any], origin: str) -> Mapping[str, Any]:
    from pydantic import TypeAdapter, ValidationError

    try:
        TypeAdapter(_Published).validate_python(values, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{origin}: {where}: {first['msg']}, got {first['input']!r}; mend the file") from None
    return values


def read_config(folder: str | Path, *, num_layers: int, injection: str | None = None) -> OracleConfig:
    """The contract beside an adapter.

    Raises:
        FileNotFoundError: the adapter has none; its settings would be guesses.
        ValueError: see `OracleConfig.from_json`.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: the adapter does not say how it wants to be asked; add an {FILE} (docs/design.md, Adapter)"
        )
    return OracleConfig.from_json(read_manifest(path), num_layers=num_layers, injection=injection, origin=str(path))
