"""The JSON Schema of config files, for editors and other checkers."""

from dataclasses import fields
from typing import Any

from refract.pipeline.config.config import Config, described
from refract.pipeline.config.renamed import RENAMED, RENAMED_VALUES

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """Return the schema (draft 2020-12) of a config file: keys, types, defaults and meanings.

    Former keys are marked as deprecated; former values are accepted. Ranges and keys that exclude each other are not part of it:
    `refract train` checks them.
    """
    from pydantic import TypeAdapter

    schema = TypeAdapter(Config).json_schema()
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
