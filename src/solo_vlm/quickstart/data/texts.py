"""Generated English text: the LLM's corpus, and text-only questions with answers."""

from collections.abc import Callable, Collection

import numpy as np

from .scenes import TALLEST_BAR, Thing, chart_caption, is_reserved, pair_caption
from .vocabulary import (
    ANIMALS,
    COLOR_OF,
    COLORS,
    CORNERS,
    LETTERS,
    NAMES,
    NUMBERS,
    OPPOSITES,
    SHAPE_OF,
    SHAPES,
    SIZES,
    THINGS,
    WORDS,
    plural,
    with_article,
)

_COLOR_NAMES = tuple(COLORS)

Question = tuple[str, str]


def document(rng: np.random.Generator) -> str:
    """Generate a text of one to three passages on unrelated topics, each of one to three sentences."""
    passages = (_PASSAGES[rng.integers(len(_PASSAGES))] for _ in range(rng.integers(1, 4)))
    return " ".join(passage(rng) for passage in passages)


def question(rng: np.random.Generator) -> Question:
    """Generate a question that needs no image, and an answer as short as those of the scenes."""
    return _QUESTIONS[rng.integers(len(_QUESTIONS))](rng)


# Passages.


def _objects(rng: np.random.Generator) -> str:
    color, shape = _one(rng, _COLOR_NAMES), _one(rng, SHAPES)
    thing = with_article(f"{color} {shape}")
    return _one(
        rng,
        (
            f"{thing}.",
            f"There is {thing} here. What colour is it? {color}. What shape is it? {shape}.",
            f"{_one(rng, NAMES)} draws {thing}. The {shape} is {color}.",
            f"{thing}. How many shapes are there? one.",
        ),
    )


def _pair(rng: np.random.Generator) -> str:
    first, second, side_by_side, caption = _allowed_pair(rng)
    one, other = " ".join(first), " ".join(second)
    places = _places(side_by_side)
    inverse = "right of" if side_by_side else "below"
    return _one(
        rng,
        (
            f"{caption}.",
            f"{caption}. The {other} is {inverse} the {one}.",
            f"{caption}. What is {places[0]}? {with_article(one)}.",
            f"{caption}. What is {places[1]}? {with_article(other)}.",
            f"{caption}. Where is the {one}? {places[0]}. Where is the {other}? {places[1]}.",
            f"The {one} is {places[0]} and the {other} is {places[1]}. There are two shapes.",
        ),
    )


def _count(rng: np.random.Generator) -> str:
    number = NUMBERS[rng.integers(2, 6)]
    color, shapes = _one(rng, _COLOR_NAMES), plural(_one(rng, SHAPES))
    return _one(
        rng,
        (
            f"{number} {color} {shapes}.",
            f"There are {number} {color} {shapes}. How many {shapes} are there? {number}.",
            f"{_one(rng, NAMES)} sees {number} {shapes}. What colour are they? {color}.",
            f"{number} {color} {shapes}. What shape are they? {shapes}.",
        ),
    )


def _spelling(rng: np.random.Generator) -> str:
    word = _one(rng, WORDS)
    spelled = " ".join(word)
    return _one(
        rng,
        (
            f"the word {word}. What does it say? {word}.",
            f"{word} is spelled {spelled}.",
            f"The letters {spelled} say {word}.",
            f"the word {word}. What is the first letter? {word[0]}. What is the last letter? {word[-1]}.",
        ),
    )


def _alphabet(rng: np.random.Generator) -> str:
    index = int(rng.integers(len(LETTERS) - 1))
    letter, following = LETTERS[index], LETTERS[index + 1]
    return _one(
        rng,
        (
            f"the letter {letter}. Which letter is this? {letter}.",
            f"After the letter {letter} comes {following}.",
        ),
    )


def _chart(rng: np.random.Generator) -> str:
    colors, heights, caption = _bars(rng)
    bar = int(rng.integers(3))
    endings = [
        "",
        f" How high is the {colors[bar]} bar? {NUMBERS[heights[bar]]}.",
        f" The bar on the left is {colors[0]} and the bar on the right is {colors[2]}.",
    ]
    for word, height in (("tallest", max(heights)), ("shortest", min(heights))):
        if heights.count(height) == 1:
            endings.append(f" Which bar is the {word}? {colors[heights.index(height)]}.")
    return f"{caption}.{_one(rng, endings)}"


def _arithmetic(rng: np.random.Generator) -> str:
    total = int(rng.integers(len(NUMBERS)))
    part = int(rng.integers(total + 1))
    whole, some, rest = NUMBERS[total], NUMBERS[part], NUMBERS[total - part]
    name, things = _one(rng, NAMES), plural(_one(rng, THINGS))
    return _one(
        rng,
        (
            f"{some} plus {rest} is {whole}.",
            f"{whole} minus {some} is {rest}.",
            f"{name} has {whole} {things} and gives {some} away. Now {name} has {rest}.",
            f"{name} has {some} {things} and gets {rest} more. Now {name} has {whole}.",
        ),
    )


def _numbers(rng: np.random.Generator) -> str:
    low, high = sorted(rng.permutation(len(NUMBERS))[:2].tolist())
    return _one(
        rng,
        (
            f"{NUMBERS[high]} is more than {NUMBERS[low]}.",
            f"{NUMBERS[low]} is less than {NUMBERS[high]}.",
            f"After {NUMBERS[low]} comes {NUMBERS[low + 1]}.",
            f"the digit {NUMBERS[low]}. Which digit is this? {NUMBERS[low]}.",
            f"the digit {NUMBERS[low]}. Is the digit odd or even? {_parity(low)}.",
            f"{NUMBERS[high % 10]} is {_parity(high % 10)}.",
        ),
    )


def _world(rng: np.random.Generator) -> str:
    noun, other, word = _one(rng, COLOR_OF), _one(rng, SHAPE_OF), _one(rng, OPPOSITES)
    small, large = _two_sizes(rng)
    shape = _one(rng, CORNERS)
    return _one(
        rng,
        (
            f"The colour of {noun} is {COLOR_OF[noun]}.",
            f"The shape of {other} is a {SHAPE_OF[other]}.",
            f"The opposite of {word} is {OPPOSITES[word]}.",
            f"A {large} is bigger than {with_article(small)}.",
            f"{with_article(small).capitalize()} is smaller than a {large}.",
            f"A {shape} has {NUMBERS[CORNERS[shape]]} corners.",
        ),
    )


def _animal(rng: np.random.Generator) -> str:
    animal = _one(rng, ANIMALS)
    legs, sound, home = ANIMALS[animal]
    subject = with_article(animal).capitalize()
    return _one(
        rng,
        (
            f"{subject} has {NUMBERS[legs]} legs.",
            f"{subject} {sound}.",
            f"{subject} lives in a {home}.",
            f"{_one(rng, NAMES)} sees {with_article(animal)} in a {home}. It {sound}.",
        ),
    )


_PASSAGES: tuple[Callable[[np.random.Generator], str], ...] = (
    *(_objects, _pair, _pair, _count, _spelling, _alphabet),
    *(_chart, _arithmetic, _numbers, _world, _animal),
)


# Questions.


def _ask_sum(rng: np.random.Generator) -> Question:
    total = int(rng.integers(len(NUMBERS)))
    part = int(rng.integers(total + 1))
    if rng.random() < 0.5:
        return f"What is {NUMBERS[part]} plus {NUMBERS[total - part]}?", NUMBERS[total]
    return f"What is {NUMBERS[total]} minus {NUMBERS[part]}?", NUMBERS[total - part]


def _ask_order(rng: np.random.Generator) -> Question:
    one, other = rng.permutation(len(NUMBERS))[:2].tolist()
    return f"Which is more, {NUMBERS[one]} or {NUMBERS[other]}?", NUMBERS[max(one, other)]


def _ask_spelling(rng: np.random.Generator) -> Question:
    word = _one(rng, WORDS)
    return f"How is {word} spelled?", " ".join(word)


def _ask_world(rng: np.random.Generator) -> Question:
    noun, other, word = _one(rng, COLOR_OF), _one(rng, SHAPE_OF), _one(rng, OPPOSITES)
    animal, shape = _one(rng, ANIMALS), _one(rng, CORNERS)
    legs, _, home = ANIMALS[animal]
    questions: tuple[Question, ...] = (
        (f"What colour is {noun}?", COLOR_OF[noun]),
        (f"What shape is {other}?", SHAPE_OF[other]),
        (f"What is the opposite of {word}?", OPPOSITES[word]),
        (f"How many legs has {with_article(animal)}?", NUMBERS[legs]),
        (f"Where does {with_article(animal)} live?", f"in a {home}"),
        (f"How many corners has a {shape}?", NUMBERS[CORNERS[shape]]),
    )
    return questions[rng.integers(len(questions))]


def _ask_pair(rng: np.random.Generator) -> Question:
    first, second, side_by_side, caption = _allowed_pair(rng)
    thing, place = list(zip((first, second), _places(side_by_side), strict=True))[rng.integers(2)]
    return f"{caption}. What is {place}?", with_article(" ".join(thing))


def _ask_chart(rng: np.random.Generator) -> Question:
    colors, heights, caption = _bars(rng)
    bar = int(rng.integers(3))
    return f"{caption}. How high is the {colors[bar]} bar?", NUMBERS[heights[bar]]


_QUESTIONS: tuple[Callable[[np.random.Generator], Question], ...] = (
    *(_ask_sum, _ask_order, _ask_spelling, _ask_world, _ask_pair, _ask_chart),
)


# Parts of sentences.


def _one(rng: np.random.Generator, choices: Collection[str]) -> str:
    return tuple(choices)[rng.integers(len(choices))]


def _allowed_pair(rng: np.random.Generator) -> tuple[Thing, Thing, bool, str]:
    """Return two different objects, whether they are side by side, and their caption; none is reserved."""
    while True:
        first, second = (
            (_one(rng, _COLOR_NAMES), _one(rng, SHAPES)),
            (_one(rng, _COLOR_NAMES), _one(rng, SHAPES)),
        )
        side_by_side = bool(rng.random() < 0.5)
        caption = pair_caption(first, second, side_by_side)
        if first != second and not is_reserved(caption):
            return first, second, side_by_side, caption


def _places(side_by_side: bool) -> tuple[str, str]:
    return ("on the left", "on the right") if side_by_side else ("at the top", "at the bottom")


def _bars(rng: np.random.Generator) -> tuple[list[str], list[int], str]:
    colors = [_COLOR_NAMES[index] for index in rng.permutation(len(_COLOR_NAMES))[:3]]
    heights = rng.integers(1, TALLEST_BAR + 1, size=3).tolist()
    return colors, heights, chart_caption(colors, heights)


def _parity(number: int) -> str:
    return "odd" if number % 2 else "even"


def _two_sizes(rng: np.random.Generator) -> tuple[str, str]:
    """Return two names, the smaller object's first."""
    low, high = sorted(rng.permutation(len(SIZES))[:2].tolist())
    return SIZES[low], SIZES[high]
