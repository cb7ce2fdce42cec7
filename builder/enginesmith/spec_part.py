"""The base of everything that a spec is made of."""

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """A part of the spec: immutable, and every key is known."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)
