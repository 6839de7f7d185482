"""A tiny world in sentences: what can be asked, what is answered, and what is held out for the test.

Sixteen families of questions over some 350 words, each a small grammar: tables (sums, differences,
comparisons, counting), facts (days, months, capitals, opposites, colors, animals) and questions that hold
their own answer (names, places, word problems, repeating a sentence). An answer is a full sentence, so that
it is easily recognized as speech.

    plus     How much is three plus four?                        Three plus four is seven.
    capitals Which city is the capital of Peru?                  The capital of Peru is Lima.
    sum      Tom has six coins and loses two. How many now?      Tom has four coins.

Splits, decided by a hash of the text alone, so that no seed and no size moves a sentence to another:

train    what may be trained on, as audio or as text.
heldout  combinations that are in no training example in ANY wording, neither as speech nor as text; a tenth
         of all.
         In the families of BY_ANSWER a combination is the answer sentence, such as "Three plus four is
         seven.": if it is held out, no question with that answer and no statement with that text is in train.
         Families of facts would become unanswerable that way: the capital of Peru cannot be guessed. There a
         combination is one wording of a fact, and its other wordings are in train, with the same answer.

Statements, for ASR and TTS without a question, are held out sentence by sentence by the same hash.
"""

from hashlib import blake2b
from itertools import combinations, count, pairwise, product

HELD_OUT = 0.1
BY_ANSWER = {"plus", "minus", "compare", "count", "place", "sum", "echo"}

NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "England": "London",
    "Germany": "Berlin",
    "Greece": "Athens",
    "Japan": "Tokyo",
    "China": "Beijing",
    "Russia": "Moscow",
    "Egypt": "Cairo",
    "Poland": "Warsaw",
    "Austria": "Vienna",
    "Ireland": "Dublin",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Canada": "Ottawa",
    "Cuba": "Havana",
    "Portugal": "Lisbon",
    "Turkey": "Ankara",
    "Peru": "Lima",
}
OPPOSITES = (
    "hot cold, big small, fast slow, happy sad, old young, high low, long short, light dark, open closed,"
    " full empty, rich poor, deep shallow, early late, easy hard, clean dirty, wet dry, loud quiet, good "
    "bad, thick thin, left right, wide narrow, sweet bitter, up down, first last"
)
COLORS = {
    "the grass": "green",
    "the sky": "blue",
    "the snow": "white",
    "a lemon": "yellow",
    "the night": "black",
    "a tomato": "red",
    "an orange": "orange",
    "chocolate": "brown",
    "a frog": "green",
    "milk": "white",
    "the sun": "yellow",
    "a strawberry": "red",
    "a pig": "pink",
    "the ocean": "blue",
    "a carrot": "orange",
    "a banana": "yellow",
}
ANIMALS = {  # legs, where it lives, its sound (if that is a word that a recognizer knows)
    "dog": ("four", "a house", "barks"),
    "cow": ("four", "a field", ""),
    "lion": ("four", "the grass", "roars"),
    "bird": ("two", "a tree", "sings"),
    "snake": ("no", "the sand", "hisses"),
    "fish": ("no", "the water", ""),
    "bee": ("six", "a flower", ""),
    "wolf": ("four", "the forest", ""),
    "duck": ("two", "a lake", "quacks"),
    "spider": ("eight", "a web", ""),
    "bear": ("four", "a cave", "growls"),
    "camel": ("four", "the desert", ""),
    "monkey": ("two", "a forest", ""),
    "horse": ("four", "a barn", ""),
    "chicken": ("two", "a farm", ""),
}
NAMES = (
    "Tom Mary Peter Lucy David Jack Sarah Paul George Frank Alice Henry Linda Robert Susan Michael".split()
)
PLACES = "garden kitchen park school office forest station market library hotel".split()
THINGS = "ball letter box lamp chair clock phone bottle hat key".split()
GOODS = "apples lemons carrots coins pencils flowers".split()
PAINTS = "red blue green yellow white black brown pink orange".split()
ADJECTIVES = "big small old young happy sad fast slow quiet strong".split()
ECHOES = "Please say:", "Say after me:", "Repeat:"
TALK = {
    "I am a small speech model.": ("Who are you?", "What are you?", "Tell me who you are."),
    "Hello, how can I help you?": ("Hello!", "Good morning!", "Hello there!"),
    "I am fine, thank you.": ("How are you?", "How are you today?", "Tell me how you are."),
    "Goodbye, see you soon.": ("Goodbye!", "See you soon!", "Good night, I am going to sleep."),
    "You are welcome.": ("Thank you!", "Thank you very much!", "Thank you for your help."),
    "I can listen and speak.": ("What can you do?", "Tell me what you can do.", "How can you help me?"),
    "I live in your computer.": ("Where do you live?", "Where are you?", "Tell me where you live."),
    "I like numbers and words.": (
        "What do you like?",
        "Tell me what you like.",
        "Please tell me what you like.",
    ),
    "I speak English.": ("Which language do you speak?", "What do you speak?", "Tell me your language."),
    "I am very young.": ("How old are you?", "Are you old or young?", "Tell me how old you are."),
    "There are seven days in a week.": (
        "How many days are in a week?",
        "How many days does a week have?",
        "Tell me how many days are in a week.",
    ),
    "There are twelve months in a year.": (
        "How many months are in a year?",
        "How many months does a year have?",
        "Tell me how many months are in a year.",
    ),
}


def dialogues(echoes: int = 150) -> dict[str, dict[str, list[str]]]:
    """family -> answer -> every wording of the question. `echoes`: number of sentences to repeat."""
    world: dict[str, dict[str, list[str]]] = {}

    def ask(family: str, answer: str, *questions: str) -> None:
        wordings = world.setdefault(family, {}).setdefault(capital(answer), [])
        wordings += [question for question in map(capital, questions) if question not in wordings]

    # tables
    for a, b in product(range(11), repeat=2):
        ask("plus", *addition(a, b))
    for a, b in product(range(13), range(11)):
        if b <= a:
            ask("minus", *subtraction(a, b))
    for a, b in combinations(NUMBERS[:13], 2):
        for x, y in ((a, b), (b, a)):
            ask(
                "compare",
                f"{b} is bigger than {a}.",
                f"Which is bigger, {x} or {y}?",
                f"Which number is bigger, {x} or {y}?",
            )
            ask(
                "compare",
                f"{a} is smaller than {b}.",
                f"Which is smaller, {x} or {y}?",
                f"Which number is smaller, {x} or {y}?",
            )
    for a, b in product(range(13), repeat=2):
        if 2 <= abs(a - b) <= 5:
            x, y = NUMBERS[a], NUMBERS[b]
            ask(
                "count",
                counting(a, b),
                f"Count from {x} to {y}.",
                f"Please count from {x} to {y}.",
                f"Can you count from {x} to {y}?",
            )

    # facts
    for a, b in pairwise(NUMBERS):
        ask(
            "next",
            f"{b} comes after {a}.",
            f"What number comes after {a}?",
            f"Which number is after {a}?",
            f"Tell me the number after {a}.",
        )
        ask(
            "next",
            f"{a} comes before {b}.",
            f"What number comes before {b}?",
            f"Which number is before {b}?",
            f"Tell me the number before {b}.",
        )
    for i, day in enumerate(DAYS):
        for shift, when in ((1, "after"), (-1, "before")):
            ask(
                "days",
                f"{DAYS[(i + shift) % 7]} comes {when} {day}.",
                f"What day comes {when} {day}?",
                f"Which day is {when} {day}?",
                f"Tell me the day {when} {day}.",
            )
            ask(
                "days",
                f"{DAYS[(i + 2 * shift) % 7]} is two days {when} {day}.",
                f"What day is two days {when} {day}?",
                f"Which day comes two days {when} {day}?",
                f"Tell me the day two days {when} {day}.",
            )
    for i, month in enumerate(MONTHS):
        for shift, when in ((1, "after"), (-1, "before")):
            ask(
                "months",
                f"{MONTHS[(i + shift) % 12]} comes {when} {month}.",
                f"What month comes {when} {month}?",
                f"Which month is {when} {month}?",
                f"Tell me the month {when} {month}.",
            )
    for country, city in CAPITALS.items():
        ask(
            "capitals",
            f"The capital of {country} is {city}.",
            f"What is the capital of {country}?",
            f"Which city is the capital of {country}?",
            f"Tell me the capital of {country}.",
        )
        ask(
            "capitals",
            f"{city} is the capital of {country}.",
            f"Which country has the capital {city}?",
            f"{city} is the capital of which country?",
            f"In which country is {city} the capital?",
        )
    for pair in OPPOSITES.split(", "):
        for a, b in (pair.split(), pair.split()[::-1]):
            ask(
                "opposites",
                f"The opposite of {a} is {b}.",
                f"What is the opposite of {a}?",
                f"Tell me the opposite of {a}.",
                f"Which word is the opposite of {a}?",
            )
    for thing, color in COLORS.items():
        ask(
            "colors",
            f"{thing} is {color}.",
            f"What color is {thing}?",
            f"What is the color of {thing}?",
            f"Tell me the color of {thing}.",
        )
    for animal, (legs, home, sound) in ANIMALS.items():
        ask(
            "animals",
            f"A {animal} has {legs} legs.",
            f"How many legs does a {animal} have?",
            f"How many legs has a {animal}?",
            f"Tell me how many legs a {animal} has.",
        )
        ask(
            "animals",
            f"A {animal} lives in {home}.",
            f"Where does a {animal} live?",
            f"Tell me where a {animal} lives.",
            f"Where is the home of a {animal}?",
        )
        if sound:
            ask(
                "animals",
                f"A {animal} {sound}.",
                f"What sound does a {animal} make?",
                f"How does a {animal} sound?",
                f"Tell me the sound of a {animal}.",
            )
    for answer, questions in TALK.items():
        ask("talk", answer, *questions)

    # questions that hold their own answer
    for name in NAMES:
        ask(
            "names",
            f"Your name is {name}.",
            f"My name is {name}. What is my name?",
            f"I am {name}. Who am I?",
            f"Hello, I am {name}. What is my name?",
        )
    for name, place in product(NAMES[:12], PLACES):
        fact = f"{name} is in the {place}."
        ask(
            "place",
            fact,
            f"{fact} Where is {name}?",
            f"{fact} Where can I find {name}?",
            f"{fact} Tell me where {name} is.",
        )
    for name, goods, total in product(NAMES[:8], GOODS, range(2, 11)):
        gains = [(a, "gets", total - a, "more") for a in range(2, total - 1)]
        losses = [(total + b, "loses", b, "of them") for b in range(2, 11 - total)]
        for a, verb, b, more in sorted(gains + losses, key=lambda story: chance("sum", name, goods, story))[
            :2
        ]:
            story = f"{name} has {NUMBERS[a]} {goods} and {verb} {NUMBERS[b]}"
            ask(
                "sum",
                f"{name} has {NUMBERS[total]} {goods}.",
                f"{story}. How many {goods} now?",
                f"{story} {more}. How many {goods} are there?",
            )
    for sentence in statements(echoes, "echo"):
        ask("echo", sentence, *[f"{please} {sentence}" for please in ECHOES])
    return world


def statements(number: int, tag: str = "statement") -> list[str]:
    """The first `number` sentences of an endless list: who does what to which thing, where and when."""
    found: dict[str, None] = {}  # a set that remembers its order
    for k in count():
        if len(found) >= number:
            return list(found)

        def one(*options: str, k: int = k, which: int = 0) -> str:
            return options[int(chance(tag, k, options, which) * len(options))]

        name, friend = one(*NAMES), one(*NAMES, which=1)
        place, thing, color, goods = one(*PLACES), one(*THINGS), one(*PAINTS), one(*GOODS)
        animal, adjective, amount = one(*list(ANIMALS)[:9]), one(*ADJECTIVES), one(*NUMBERS[2:])
        verb = one("puts", "finds", "drops", "leaves", "keeps", "wants")
        moment = one(*[f"on {day}" for day in DAYS], *[f"in {month}" for month in MONTHS])
        look = one("new", "old", "big", "small", "clean", "dirty")
        things = thing + ("es" if thing == "box" else "s")
        templates = (
            f"{name} {verb} the {color} {thing} in the {place}.",
            f"{name} {verb} {amount} {color} {things} in the {place}.",
            f"{name} follows the {adjective} {animal} to the {place}.",
            f"The {adjective} {animal} sleeps under the {color} {one('tree', 'chair', 'box')}.",
            f"{name} and {friend} go to the {place} {moment}.",
            f"{moment} {name} travels from {one(*CAPITALS.values())} to {one(*CAPITALS)}.",
            f"{name} gives {amount} {goods} to {friend}.",
            f"The {thing} in the {place} is {color} and {look}.",
            f"{moment} {name} needs {amount} {goods}.",
            f"{name} has {amount} {things} for the {adjective} {animal}.",
        )
        if name != friend:
            found.setdefault(capital(templates[k % len(templates)]))


def beyond() -> dict[str, dict[str, list[str]]]:
    """Sums and differences beyond the tables of `dialogues`, up to twenty: family -> answer -> questions; as
    text only. A model trained on them answers more of the held-out differences (LOG.md)."""
    pairs = [(a, b) for a, b in product(range(21), repeat=2) if max(a, b) > 10]
    plus = [addition(a, b) for a, b in pairs if a + b <= 20]
    minus = [subtraction(a, b) for a, b in pairs if b <= a and (a > 12 or b > 10)]
    return {
        family: {
            capital(answer): [capital(question) for question in questions] for answer, *questions in sums
        }
        for family, sums in (("plus", plus), ("minus", minus))
    }


def unasked() -> list[str]:
    """Sentences like answers, but to no recorded question: larger numbers, other people, numbers in disorder.
    To read them aloud a model has to follow the text; it cannot recite a known answer."""
    found = []
    for k in range(500):
        length = 3 + int(chance("list", k) * 4)
        found.append(", ".join(NUMBERS[int(chance("list", k, i) * 21)] for i in range(length)) + ".")
    for a, b in product(range(21), repeat=2):
        x, y, large = NUMBERS[a], NUMBERS[b], max(a, b) > 12
        if a > b and large:
            found += [f"{x} is bigger than {y}.", f"{y} is smaller than {x}."]
        if 2 <= abs(a - b) <= 5 and large:
            found.append(counting(a, b))
    found += [answer for sums in beyond().values() for answer in sums]
    found += [f"{name} is in the {place}." for name, place in product(NAMES[12:], PLACES)]
    found += [
        f"{name} has {NUMBERS[n]} {goods}." for name, goods, n in product(NAMES[8:], GOODS, range(2, 21))
    ]
    found += [
        f"{name} has {NUMBERS[n]} {goods}." for name, goods, n in product(NAMES[:8], GOODS, range(11, 21))
    ]
    return [capital(sentence) for sentence in found]


def addition(a: int, b: int) -> tuple[str, ...]:
    """(answer, questions)"""
    x, y = NUMBERS[a], NUMBERS[b]
    return (
        f"{x} plus {y} is {NUMBERS[a + b]}.",
        f"What is {x} plus {y}?",
        f"How much is {x} plus {y}?",
        f"Please add {x} and {y}.",
    )


def subtraction(a: int, b: int) -> tuple[str, ...]:
    """(answer, questions)"""
    x, y = NUMBERS[a], NUMBERS[b]
    return (
        f"{x} minus {y} is {NUMBERS[a - b]}.",
        f"What is {x} minus {y}?",
        f"How much is {x} minus {y}?",
        f"Please take {y} from {x}.",
    )


def counting(a: int, b: int) -> str:
    """From a to b, up or down: "three, two, one." """
    return ", ".join(NUMBERS[a : b + 1] or NUMBERS[b : a + 1][::-1]) + "."


def capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def chance(*about) -> float:
    """A pseudo-random number in [0, 1), a hash of `about` alone: the same in every run on every machine."""
    return int.from_bytes(blake2b(repr(about).encode(), digest_size=6).digest(), "big") / 2**48


def held_out(sentence: str) -> bool:
    return chance("held out", sentence) < HELD_OUT


def split(family: str, asked: dict[str, list[str]]) -> dict[str, str]:
    """question -> "train" or "heldout", for one family of `dialogues`."""
    by_chance = sorted(asked, key=lambda answer: chance(family, answer))
    if family == "echo":  # the sentences of an endless list, shared with the statements
        chosen = {question for answer in asked if held_out(answer) for question in asked[answer]}
    elif family in BY_ANSWER:
        chosen = {
            question for answer in by_chance[: round(HELD_OUT * len(asked))] for question in asked[answer]
        }
    else:  # a fact: at most one wording is held out, for the answer must be learnable from the others
        facts = by_chance[: round(HELD_OUT * sum(map(len, asked.values())))]
        chosen = {asked[answer][int(chance("wording", answer) * len(asked[answer]))] for answer in facts}
    return {q: "heldout" if q in chosen else "train" for wordings in asked.values() for q in wordings}
