"""Reading multiple-choice answers out of free text, as the published evaluations of these benchmarks do.

Letters have one reading, with one difference in strictness. Training rewards what `timesearch.rewards.choice_letter`
reads: the letter, or a text that begins with it as an option does; rewarded for a letter anywhere, a policy could name
several. Evaluation reads that first, so that what training rewards is right here too, and goes on by the rule of MMMU,
which LongVideoBench and the reference use, where there is no such letter. Where that finds no option either, those draw
a random letter; here there is no answer, which counts as wrong and as unparsed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from timesearch.data.messages import Message, text_of
from timesearch.data.samples import LETTERS
from timesearch.dialects.qwen import tagged_answers
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


def published_choice(messages: Sequence[Message], answer: str | None, options: Sequence[str]) -> str | None:
    """The letter that the benchmark's own script reads; None where it would draw one at random.

    It takes the last ``<answer>`` of any turn, else the whole of the last turn, and of that the first character, or
    else the first word, if it is an option's letter.

    Args:
        messages: of the episode.
        answer: what was answered, where there are no messages.
        options: texts of the options; where empty, letters A to G.
    """
    turns = [text_of(message) for message in messages if message["role"] == "assistant"]
    tagged = [said for turn in turns for said in tagged_answers(turn)]
    text = (tagged or turns or [answer or ""])[-1].strip()
    letters = LETTERS[: len(options) or _WITHOUT_OPTIONS]
    word = text.partition(" ")[0].strip("()[].,:;!?'\"*\n")
    return next((each for each in (text[:1], word) if len(each) == 1 and each in letters), None)


def published_score(letter: str | None, gold: str, options: Sequence[str]) -> float:
    """1.0 or 0.0, and for a letter drawn at random the chance that it is right."""
    return 1 / (len(options) or _WITHOUT_OPTIONS) if letter is None else float(letter == gold)


def _last(text: str, part: str) -> int:
    """Where `part`, which `text` holds, stands there last; unlike ``rfind`` in linear time, also where both repeat."""
    return len(text) - len(part) - text[::-1].find(part[::-1])
