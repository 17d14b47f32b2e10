"""The proposal of `refract init`: `take_survey` inspects the data, `propose` chooses values, `config_text` writes them as YAML."""

from refract.pipeline.suggest.config_text import choice_table, config_text
from refract.pipeline.suggest.proposal import Choice, Proposal, propose
from refract.pipeline.suggest.start import Start, check_start
from refract.pipeline.suggest.survey import Survey, take_survey

__all__ = [
    "Choice",
    "Proposal",
    "Start",
    "Survey",
    "check_start",
    "choice_table",
    "config_text",
    "propose",
    "take_survey",
]
