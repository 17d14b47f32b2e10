"""The JSON Schema of config files, for editors and other checkers."""

from dataclasses import fields
from typing import Any

from refract.pipeline.config.config import Config, described
from refract.pipeline.config.renamed import RENAMED, RENAMED_VALUES

DRAFT = "https://json-schema.org/draft/2020-12/schema"

EXPONENT = r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"
"""Numbers such as 1e-3, which YAML 1.1 reads as strings and the config as numbers."""


def json_schema() -> dict[str, Any]:
    """Return the schema (draft 2020-12) of a config file: keys, types, defaults and meanings.

    Former keys are marked as deprecated; former values are accepted. Keys that exclude each other are not part of it:
    `refract train` checks them.
    """
    from pydantic import TypeAdapter

    schema = _with_exponents(TypeAdapter(Config).json_schema())
    sections = schema.pop("$defs")
    schema["properties"]["plugins"]["description"] = described(Config)[1]["plugins"]
    for section in fields(Config):
        if section.name == "plugins":
            continue
        kind = type(getattr(Config(), section.name))
        summary, meanings = described(kind)
        properties = sections[kind.__name__]["properties"]
        for key, meaning in meanings.items():
            properties[key] = {**properties[key], "description": meaning}
        for item in fields(kind):
            if "names" in item.metadata:
                known = {"enum": list(item.metadata["names"]())}
                properties[item.name] |= (
                    {"anyOf": [known, {"type": "string"}]} if item.metadata["extensible"] else known
                )
        for old, new in RENAMED.items():
            if old.startswith(f"{section.name}."):
                current = properties[new.partition(".")[2]]
                properties[old.partition(".")[2]] = {
                    **current,
                    "deprecated": True,
                    "description": f"Former name of {new}.",
                }
        for option, values in RENAMED_VALUES.items():
            if option.startswith(f"{section.name}."):
                properties[option.partition(".")[2]]["enum"] += list(values)
        sections[kind.__name__] = {**sections[kind.__name__], "description": summary, "additionalProperties": False}
    return {"$schema": DRAFT, **schema, "title": "Refract config", "additionalProperties": False, "$defs": sections}


def _with_exponents(schema: Any) -> Any:
    """Return the schema with strings that match EXPONENT accepted as numbers. A pattern restricts only strings."""
    if isinstance(schema, list):
        return [_with_exponents(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    accepts = {"type": ["number", "string"], "pattern": EXPONENT} if schema.get("type") == "number" else {}
    return {key: _with_exponents(value) for key, value in schema.items()} | accepts
