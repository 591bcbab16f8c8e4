"""Tables of everyday knowledge that the sentence templates draw on."""

# noun -> colour
COLOUR_OF: dict[str, str] = {
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

# from the smallest to the largest
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

# how many corners a shape has
CORNERS: dict[str, int] = {"circle": 0, "triangle": 3, "square": 4, "ring": 0}

NAMES: tuple[str, ...] = ("Ann", "Ben", "Eva", "Sam", "Tom", "Zoe")

THINGS: tuple[str, ...] = ("apple", "book", "cup", "hat", "key", "nut", "pen", "toy")
