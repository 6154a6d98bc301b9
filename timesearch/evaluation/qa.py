"""Reading multiple-choice answers out of free text, as the published evaluations of these benchmarks do.

Letters have one reading, with one difference in strictness. Training rewards what `timesearch.rewards.choice_letter`
reads: the letter, or a text that begins with it as an option does; rewarded for a letter anywhere, a policy could name
several. Evaluation reads that first, so that what training rewards is right here too, and goes on by the rule of MMMU,
which LongVideoBench and the reference use, where there is no such letter. Where that finds no option either, those draw
a random letter; here there is no answer, which counts as wrong and as unparsed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from timesearch.data.samples import LETTERS
from timesearch.rewards import choice_letter

_PUNCTUATION = (",", ".", "!", "?", ";", ":", "'")
_WITHOUT_OPTIONS = 7  # where a file does not list its options, letters A to G are looked for


def parse_choice(response: str | None, options: Sequence[str]) -> str | None:
    """The option letter that a response names.

    The first of these that finds anything decides; where it finds several options, the one named last wins (by rule 4:
    the first in order of the alphabet).

    1. what training would reward, ``B``, ``(B)``, ``B) a dog``;
    2. a letter in brackets, ``(B)``;
    3. a letter before a space or the end, ``B``;
    4. a letter before a full stop, ``B.``;
    5. in a response of six words or more, the text of an option, in any case.

    Rule 3 asks for no space *before* the letter, so the last letter of a word in capitals counts (``USA is`` names A);
    this is kept for comparison with published numbers.

    Args:
        response: the answer's text; None for none.
        options: texts of the options, in order; where empty, letters A to G.

    Returns:
        A capital letter, or None if the response names no option.
    """
    if response is None:
        return None
    letters = LETTERS[: len(options) or _WITHOUT_OPTIONS]
    letter = choice_letter(response)
    if letter is not None and letter in letters:
        return letter
    for mark in _PUNCTUATION:
        response = response.strip(mark)
    padded = f" {response} "
    ways: list[tuple[Callable[[str], bool], Callable[[str], int]]] = [
        (lambda letter: f"({letter})" in padded, lambda letter: padded.rfind(f"({letter})")),
        (lambda letter: f"{letter} " in padded, lambda letter: padded.rfind(f" {letter} ")),
        (lambda letter: f"{letter}." in padded, lambda letter: 0),
    ]
    for names, position in ways:
        named = [letter for letter in letters if names(letter)]
        if named:
            return max(named, key=position)
    if len(padded.split()) > 5:
        spoken = padded.lower()
        named = [letter for letter, option in zip(letters, options, strict=False) if option.lower() in spoken]
        if named:
            return max(named, key=lambda letter: _last(spoken, options[LETTERS.index(letter)].lower()))
    return None


def _last(text: str, part: str) -> int:
    """Where `part`, which `text` holds, stands there last; unlike ``rfind`` in linear time, also where both repeat."""
    return len(text) - len(part) - text[::-1].find(part[::-1])
