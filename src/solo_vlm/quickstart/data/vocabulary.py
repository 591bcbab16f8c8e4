"""Words and facts shared by scenes and generated text."""

from __future__ import annotations

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "green": (40, 155, 60),
    "blue": (40, 80, 215),
    "yellow": (240, 210, 30),
    "purple": (140, 45, 165),
    "orange": (240, 125, 20),
}

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross", "ring")

NUMBERS: tuple[str, ...] = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"

WORDS: tuple[str, ...] = (
    *("cat", "dog", "sun", "cup", "hat", "pen", "bus", "car", "box", "map"),
    *("bed", "key", "egg", "fox", "cow", "pig", "hen", "bee", "ant", "owl"),
    *("jar", "jam", "pie", "tea", "nut", "fig", "toy", "net", "web", "sky"),
    *("sea", "ice", "log", "fan", "van", "wig", "zip", "mud", "rug", "rat"),
)


def plural(noun: str) -> str:
    """Return the plural of a regular noun: "circles", "crosses", "boxes"."""
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


def with_article(phrase: str) -> str:
    """Return a phrase with its indefinite article: "a red ring", "an orange ring"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


# noun -> color
COLOR_OF: dict[str, str] = {
    "grass": "green",
    "the sun": "yellow",
    "the sea": "blue",
    "the sky": "blue",
    "a banana": "yellow",
    "a tomato": "red",
    "a frog": "green",
    "a carrot": "orange",
    "a plum": "purple",
    "a lemon": "yellow",
    "blood": "red",
    "a leaf": "green",
}

# noun -> shape
SHAPE_OF: dict[str, str] = {
    "a coin": "circle",
    "the moon": "circle",
    "a plate": "circle",
    "a box": "square",
    "a tile": "square",
    "a tent": "triangle",
    "a slice of pie": "triangle",
    "a plus sign": "cross",
    "a tyre": "ring",
    "a donut": "ring",
}

# animal -> (legs, sound verb, home)
ANIMALS: dict[str, tuple[int, str, str]] = {
    "cat": (4, "purrs", "house"),
    "dog": (4, "barks", "house"),
    "cow": (4, "moos", "barn"),
    "pig": (4, "grunts", "barn"),
    "hen": (2, "clucks", "barn"),
    "owl": (2, "hoots", "tree"),
    "bee": (6, "buzzes", "hive"),
    "ant": (6, "is silent", "nest"),
    "fox": (4, "yelps", "den"),
    "rat": (4, "squeaks", "nest"),
}

# smallest first
SIZES: tuple[str, ...] = ("ant", "bee", "rat", "hen", "cat", "fox", "dog", "pig", "cow", "van")

OPPOSITES: dict[str, str] = {
    "hot": "cold",
    "big": "small",
    "left": "right",
    "high": "low",
    "tall": "short",
    "first": "last",
    "above": "below",
    "yes": "no",
    "odd": "even",
    "day": "night",
}

# shape -> number of corners
CORNERS: dict[str, int] = {"circle": 0, "triangle": 3, "square": 4, "ring": 0}

NAMES: tuple[str, ...] = ("Ann", "Ben", "Eva", "Sam", "Tom", "Zoe")

THINGS: tuple[str, ...] = ("apple", "book", "cup", "hat", "key", "nut", "pen", "toy")
