"""The base of everything that is read from a YAML file."""

from pydantic import BaseModel, ConfigDict


class Checked(BaseModel):
    """Unknown keys are errors, and nothing changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
