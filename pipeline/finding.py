"""A finding of the doctor: a problem, its evidence, and the cures that the run's config accepts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from refract.models.fields import NotAccepted
from refract.pipeline.config.config import Config, ConfigError, check


@dataclass(frozen=True)
class Setting:
    """A config key, such as `optim.lr`, and its proposed value."""

    key: str
    value: Any

    def __str__(self) -> str:
        import yaml

        text = yaml.safe_dump(self.value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
        return f"{self.key}: {text}"


Cure = tuple[Setting, ...]
"""Settings to change together."""


def cure(key: str, value: Any) -> Cure:
    """Return a cure that changes one setting."""
    return (Setting(key, value),)


@dataclass(frozen=True)
class Finding:
    """A problem that the doctor detected.

    name: short, also an MLflow tag; evidence: the measured numbers; advice: steps that no setting expresses; cures: alternatives, the
    likeliest first.
    """

    name: str
    evidence: str
    advice: str
    cures: tuple[Cure, ...] = ()

    @property
    def cure(self) -> str:
        """The cures and the advice as a sentence."""
        settings = " or ".join(" with ".join(map(str, settings)) for settings in self.cures)
        return "; ".join(part for part in (f"set {settings}" if settings else "", self.advice) if part)

    def __str__(self) -> str:
        return f"{self.name}: {self.evidence}; {self.cure}"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values: name, evidence, cure as a sentence, advice, and cures as lists of {key, value}."""
        cures = [[{"key": setting.key, "value": setting.value} for setting in settings] for settings in self.cures]
        return {"name": self.name, "evidence": self.evidence, "cure": self.cure, "advice": self.advice, "cures": cures}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Finding":
        """Read the output of `to_dict`, also that of older versions, which lacks `cures`. Raises KeyError or TypeError."""
        cures = tuple(tuple(Setting(**setting) for setting in settings) for settings in values.get("cures", ()))
        return cls(values["name"], values["evidence"], values.get("advice", values["cure"]), cures)


def treatable(finding: Finding, config: Config) -> Finding:
    """Keep only the cures that change the config and that pass its validation."""
    return replace(finding, cures=tuple(_accepted(finding.cures, config)))


def _accepted(cures: tuple[Cure, ...], config: Config) -> Iterator[Cure]:
    seen: list[Cure] = []
    for settings in cures:
        try:
            changed = config.changed({setting.key: setting.value for setting in settings})
            check(changed, "the config")
        except (ConfigError, NotAccepted):
            continue
        if changed.to_dict() == config.to_dict() or settings in seen:
            continue
        seen.append(settings)
        yield settings
