"""Prompts of wanted lengths, without a tokenizer: made of common English words, measured by asking the model. Pure.

Each of the words is one token in the vocabularies of SmolLM2 (BPE) and MiniLM (WordPiece), with and without a space
before it, so that the length of a prompt hardly depends on which words are in it; a model that reports how many tokens
it read corrects the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_TEXT = """
able about above active actual after allow along also always among amount animal another answer area
around average away bank base basic bear because before below best better black blue board body book
both branch break bright brother brown build built call came camp card care case catch cause central
century chair change charge child church circle city class clean clear close cloud collect color
come company compare control corn cost course court cover cross culture current daughter deal deep
depend describe develop direct done draw dream drive drop during each early earth edge effect engine
equal even exact exercise fact fair fall family famous father fight figure fill final find fine
finger fire first five flat floor flow follow food foot force foreign forest found front full game
girl give gold gone good grand grass green guide hair happy hard have heart heat held here high
history hole home horse house human idea include inside instead interest iron join jump keep kind
king know lake land language last learn leave left less level lift limit line list live look main
major make mark mass master material matter mean measure meat member metal middle might milk million
mind minute model money month more most mother motion mouth much must near need never night nine
noise nose nothing noun number offer office open order over oxygen page pair paper parent part party
pass path pattern perhaps period person piece plain plane plural poor popular port possible pound
power practice prepare present press pretty print problem public pull push question quite radio
raise range rate rather ready real remember require rest rich ride rise river road room rose rule
safe salt save scale school science score season seat section self sell sent sentence share sharp
sheet shop shore short should show side sight sign simple single size skill skin slow small social
soft solution some song soon sound source south space speed spot spread stand start stay stone store
strong student study subject success suggest system table take talk tall tell term test than thank
that there thick thin thing third those thought three through thus time tiny together total train
travel tree true tube type under unit until value vary visit wait walk want watch water wave wear
weather weight what wheel whether which whose wide wife wild will wind wing winter with wood word
world would write wrong yellow young
"""
WORDS = tuple(_TEXT.split())


@dataclass(frozen=True)
class TokenFit:
    """How many tokens a model makes of words: ``fixed`` of every prompt, and so many of each word."""

    fixed: float = 0.0
    per_word: float = 1.0
    measured: bool = False
    """Whether the model was asked; else it is assumed."""

    def words(self, tokens: int) -> int:
        """How many words come closest to ``tokens``; at least 1."""
        return max(1, round((tokens - self.fixed) / self.per_word))

    def tokens(self, words: int) -> int:
        """What so many words should be."""
        return round(self.fixed + self.per_word * words)


ASSUMED = TokenFit()
_PLAUSIBLE_PER_WORD = (0.2, 10.0)


def fit_from_counts(short: tuple[int, int], long: tuple[int, int]) -> TokenFit | None:
    """The line through two prompts, each (words, tokens as the model counted); None: its counts do not follow the prompt."""
    per_word = (long[1] - short[1]) / (long[0] - short[0])
    if not _PLAUSIBLE_PER_WORD[0] <= per_word <= _PLAUSIBLE_PER_WORD[1]:
        return None
    return TokenFit(long[1] - per_word * long[0], per_word, measured=True)


def made_prompts(
    words: Sequence[int], *, shared_words: int, rng: np.random.Generator, first: int = 0
) -> list[str]:
    """A prompt for each number of words, no two alike from the first word after the ``shared_words`` on.

    The first ``shared_words`` are the same in all, whatever ``rng``; at least one word of each prompt is its own. More
    prompts than there are words differ from the second word on. ``first`` is the number of the first prompt, for those
    that are made later.
    """
    shared = [WORDS[index] for index in np.random.default_rng(0).integers(len(WORDS), size=shared_words)]
    return [_prompt(first + number, count, shared, rng) for number, count in enumerate(words)]


def _prompt(number: int, count: int, shared: Sequence[str], rng: np.random.Generator) -> str:
    prefix = shared[: count - 1]
    # A server that keeps the KV cache of prompts finds them by how they begin.
    own = [WORDS[number % len(WORDS)], WORDS[(7 * number + number // len(WORDS) + 1) % len(WORDS)]]
    rest = rng.integers(len(WORDS), size=max(0, count - len(prefix) - 2))
    return " ".join([*prefix, *own[: count - len(prefix)], *(WORDS[index] for index in rest)])
