"""Which models callers see: names of OpenAI's API to models of Triton."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from enginesmith.openai_front._errors import ApiError, model_not_found, unavailable
from enginesmith.openai_front._responses import Document, model_card
from enginesmith_client import AsyncClient, ModelMetadata, ModelNotReady, ModelStatus, TritonClientError

_TEXT_SUFFIX = "-text"
"""``<model>-text`` takes texts for ``<model>``, which takes tokens; callers ask for ``<model>``."""
_LOOKUP_TIMEOUT_S = 2.0


class Catalog:
    """The models of a server that generate or embed, and the aliases of the front."""

    def __init__(self, client: AsyncClient, aliases: Mapping[str, str]) -> None:
        self._client = client
        self._aliases = aliases
        self._started_s = int(time.time())
        self._speaks: dict[tuple[str, tuple[str, ...]], bool] = {}
        """By name and versions that are ready, so that a new version is looked at anew."""

    def served_name(self, name: str) -> str:
        """The name of Triton's model that callers call ``name``."""
        return self._aliases.get(name, name)

    async def cards(self) -> list[Document]:
        """All models, by name; an alias is there if its model is."""
        names = await self._names()
        aliases = [alias for alias, name in self._aliases.items() if name in names]
        return [model_card(name, created_s=self._started_s) for name in sorted({*names, *aliases})]

    async def card(self, name: str) -> Document:
        """One model.

        Raises:
            ApiError: 404, there is no such model.
        """
        cards = {str(card["id"]): card for card in await self.cards()}
        if name not in cards:
            raise model_not_found(name, known=list(cards)[:20])
        return cards[name]

    async def error_for_missing(self, name: str, error: ModelNotReady) -> ApiError:
        """The error for a model that took no request: 503 while it is being loaded, 404 if it is not there."""
        served = self.served_name(name)
        try:
            statuses = await self._client.models(timeout_s=_LOOKUP_TIMEOUT_S)
        except TritonClientError:
            return unavailable(error.message, code="model_not_ready")
        if any(status.name == served and status.state in ("LOADING", "UNLOADING") for status in statuses):
            return unavailable(f"The model {name!r} is being loaded.", code="model_not_ready")
        return model_not_found(name)

    async def _names(self) -> set[str]:
        ready = _ready_versions(await self._client.models())
        names = set()
        for name, versions in ready.items():
            if (name, versions) not in self._speaks:
                try:
                    metadata = await self._client.metadata(name)
                except ModelNotReady:
                    continue  # Unloaded since the list was read.
                self._speaks[name, versions] = generates(metadata) or embeds(metadata)
            if self._speaks[name, versions]:
                base = name.removesuffix(_TEXT_SUFFIX)
                names.add(base if base in ready else name)
        return names


def generates(metadata: ModelMetadata) -> bool:
    """Whether the model takes prompts and gives text."""
    return metadata.input("text_input") is not None and metadata.output("text_output") is not None


def embeds(metadata: ModelMetadata) -> bool:
    """Whether the model takes texts and gives vectors."""
    return metadata.input("TEXT") is not None and metadata.output("embedding") is not None


def _ready_versions(statuses: Sequence[ModelStatus]) -> dict[str, tuple[str, ...]]:
    ready: dict[str, tuple[str, ...]] = {}
    for status in statuses:
        if status.state == "READY":
            ready[status.name] = (*ready.get(status.name, ()), status.version)
    return ready
