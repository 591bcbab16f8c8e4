"""The words shared by the drawn scenes and by the generated text."""

COLOURS: dict[str, tuple[int, int, int]] = {
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
    """The plural of a regular noun: "circles", "crosses", "boxes"."""
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


def with_article(phrase: str) -> str:
    """The phrase after its indefinite article: "a red ring", "an orange ring"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
