"""Reading multiple-choice answers out of free text, as the published evaluations of these benchmarks do.

The rule is MMMU's, which LongVideoBench and the reference use too, with one difference: where it finds no option, those
draw a random letter; here there is no answer, which counts as wrong and as unparsed.

Training's reward is stricter (`timesearch.rewards.choice_letter`), as the reference's is: what stands in ``<answer>``
must be the letter, or begin with it as an option does. Rewarded for a letter anywhere, a policy could name several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from timesearch.samples import LETTERS

_PUNCTUATION = (",", ".", "!", "?", ";", ":", "'")
_WITHOUT_OPTIONS = 7  # where a file does not list its options, letters A to G are looked for


def parse_choice(response: str | None, options: Sequence[str]) -> str | None:
    """The option letter that a response names.

    The first of these that finds anything decides; where it finds several options, the one named last wins (by rule 3:
    the first in order of the alphabet).

    1. a letter in brackets, ``(B)``;
    2. a letter before a space or the end, ``B``;
    3. a letter before a full stop, ``B.``;
    4. in a response of six words or more, the text of an option, in any case.

    Rule 2 asks for no space *before* the letter, so the last letter of a word in capitals counts (``USA is`` names A);
    this is kept for comparison with published numbers.

    Args:
        response: the answer's text; None for none.
        options: texts of the options, in order; where empty, letters A to G.

    Returns:
        A capital letter, or None if the response names no option.
    """
    if response is None:
        return None
    for mark in _PUNCTUATION:
        response = response.strip(mark)
    padded = f" {response} "
    letters = LETTERS[: len(options) or _WITHOUT_OPTIONS]
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
            return max(named, key=lambda letter: spoken.rfind(options[LETTERS.index(letter)].lower()))
    return None
