"""A finding of the doctor: what is wrong, by what evidence, and cures that the run's config accepts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from refract.pipeline.config.config import Config, ConfigError, config_from_dict


@dataclass(frozen=True)
class Setting:
    """A key of the config, as `optim.lr`, and the value to give it."""

    key: str
    value: Any

    def __str__(self) -> str:
        import yaml

        text = yaml.safe_dump(self.value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
        return f"{self.key}: {text}"


Cure = tuple[Setting, ...]
"""Settings that belong together."""


def cure(key: str, value: Any) -> Cure:
    """A cure of one setting."""
    return (Setting(key, value),)


@dataclass(frozen=True)
class Finding:
    """name: short, for a tag; evidence: the numbers; advice: what no setting can say; cures: alternatives, the likeliest first."""

    name: str
    evidence: str
    advice: str
    cures: tuple[Cure, ...] = ()

    @property
    def cure(self) -> str:
        """The cures and the advice in words."""
        settings = " or ".join(" with ".join(map(str, settings)) for settings in self.cures)
        return "; ".join(part for part in (f"set {settings}" if settings else "", self.advice) if part)

    def __str__(self) -> str:
        return f"{self.name}: {self.evidence}; {self.cure}"

    def to_dict(self) -> dict[str, Any]:
        """JSON values: name, evidence, cure in words, and cures as lists of {key, value}."""
        cures = [[{"key": setting.key, "value": setting.value} for setting in settings] for settings in self.cures]
        return {"name": self.name, "evidence": self.evidence, "cure": self.cure, "advice": self.advice, "cures": cures}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Finding":
        """The finding that `to_dict` wrote, or an older version without `cures`. KeyError, TypeError."""
        cures = tuple(tuple(Setting(**setting) for setting in settings) for settings in values.get("cures", ()))
        return cls(values["name"], values["evidence"], values.get("advice", values["cure"]), cures)


def treatable(finding: Finding, config: Config) -> Finding:
    """The finding with the cures alone that change something in the config and that it accepts."""
    return replace(finding, cures=tuple(_accepted(finding.cures, config)))


def _accepted(cures: tuple[Cure, ...], config: Config) -> Iterator[Cure]:
    from refract.pipeline.training.build import specs

    seen: list[Cure] = []
    for settings in cures:
        values = config.to_dict()
        before = config.to_dict()
        for setting in settings:
            section, _, key = setting.key.partition(".")
            values[section][key] = setting.value
        if values == before or settings in seen:
            continue
        try:
            specs(config_from_dict(values))
        except ConfigError:
            continue
        seen.append(settings)
        yield settings
