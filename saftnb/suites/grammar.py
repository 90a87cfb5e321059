"""The six tasks of `pocket-nli`: sentence pairs of our own grammar, each labelled by trying all small worlds.

A sentence is a text and a test of a world. A pair is *entailment* if the hypothesis holds in every world in which the
premise does, *contradiction* if in none of them, else *neutral*. Each task is about one phenomenon, and asks for three
classes or two, as the six tasks of `nli6` do. Words with content come from disjoint parts of a lexicon in train,
validation and test, so that remembering pairs, or words, does not help.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

LABELS = ("entailment", "neutral", "contradiction")
PARTS = ("train", "validation", "test")
World = tuple[Any, ...]  # what each phenomenon makes of it
Word = TypeVar("Word")


@dataclass(frozen=True)
class Sentence:
    """A text, and whether it is true of a world."""

    text: str
    holds: Callable[[World], bool]


def relation(premise: Sentence, hypothesis: Sentence, worlds: Iterable[World]) -> int | None:
    """The label (an index of `LABELS`) by trying all worlds; None where the premise holds in none."""
    truths = {bool(hypothesis.holds(world)) for world in worlds if premise.holds(world)}
    if not truths:
        return None
    return 1 if len(truths) == 2 else 0 if True in truths else 2


# ---- words ----------------------------------------------------------------------------------------------------------

_NOUNS = (
    "dog cat horse farmer doctor teacher singer sailor child tourist soldier painter baker lawyer nurse driver pilot "
    "student clerk guard cook waiter poet judge miner tailor priest dancer actor writer hunter shepherd banker plumber "
    "barber butcher gardener carpenter mechanic librarian"
).split()
_ADJECTIVES = (
    "old young tall short tired hungry clever lazy rich poor happy sad brave shy kind rude busy calm proud strong "
    "careful nervous polite honest famous lonely loud gentle serious blond"
).split()
_ACTIONS = (
    "sleeps:slept:sleep dances:danced:dance sings:sang:sing works:worked:work smiles:smiled:smile waits:waited:wait "
    "laughs:laughed:laugh walks:walked:walk reads:read:read swims:swam:swim talks:talked:talk eats:ate:eat "
    "writes:wrote:write runs:ran:run listens:listened:listen paints:painted:paint cries:cried:cry "
    "whistles:whistled:whistle jumps:jumped:jump coughs:coughed:cough prays:prayed:pray shouts:shouted:shout "
    "yawns:yawned:yawn travels:travelled:travel"
).split()
_MANNERS = (
    "quietly loudly quickly slowly often outside alone indoors here together badly well today calmly happily upstairs "
    "twice again everywhere downtown nearby abroad gladly softly"
).split()
_NAMES = (
    "Anna Tom Mary Peter Lucy Jack Emma Paul Sara David Julia Mark Alice Henry Clara George Nina Oscar Helen Frank "
    "Laura Simon Rosa Martin Eva Philip Ruth Victor Irene Walter"
).split()
_OBJECTS = (
    "apples books chairs keys letters coins eggs shirts pencils tickets plates stamps hats candles bottles lamps "
    "photos maps boxes rings cups spoons cards flowers bricks shoes cakes nails bells ropes"
).split()
# two-way implicatives: with "never" before them they say the opposite
_DONE = {
    "train": ("managed", "remembered", "dared"), "validation": ("got", "bothered"), "test": ("happened", "deigned"),
}  # fmt: skip
_UNDONE = {"train": ("failed", "forgot", "declined"), "validation": ("omitted",), "test": ("neglected",)}
# complementary: each of the things is exactly one of the two
_OPPOSITES = {
    ("open", "closed"): "door gate window box shop",
    ("on", "off"): "lamp radio oven heater fan",
    ("alive", "dead"): "bird fish tree dog plant",
    ("right", "wrong"): "answer choice guess word sum",
    ("true", "false"): "story rumour claim report legend",
    ("full", "empty"): "glass bucket bag bottle jar",
    ("wet", "dry"): "road towel coat roof floor",
    ("open", "shut"): "bank museum school library office",
    ("guilty", "innocent"): "prisoner suspect driver sailor clerk",
    ("awake", "asleep"): "man baby guard cat teacher",
    ("correct", "incorrect"): "statement spelling date address total",
    ("possible", "impossible"): "plan trip rescue repair deal",
    ("even", "odd"): "number sum score page age",
    ("free", "taken"): "seat desk room table bed",
    ("present", "absent"): "king judge singer witness mayor",
    ("legal", "illegal"): "rule tax fee weapon trade",
    ("pure", "impure"): "metal water oil gold air",
    ("whole", "broken"): "machine cup plate chair clock",
    ("safe", "unsafe"): "child bridge path boat town",
    ("complete", "incomplete"): "letter list map puzzle book",
    ("married", "unmarried"): "guest nurse doctor poet baker",
    ("clean", "dirty"): "shirt hand shoe carpet spoon",
    ("finished", "unfinished"): "task painting house song novel",
    ("fair", "unfair"): "judgment contest price vote test",
    ("loyal", "disloyal"): "friend servant ally partner soldier",
}
_KINDS = {
    "bird": "eagle robin sparrow owl parrot", "fish": "salmon trout shark tuna cod", "tree": "oak pine maple birch elm",
    "insect": "ant bee beetle wasp fly", "fruit": "apple pear peach plum cherry", "tool": "hammer saw drill wrench axe",
    "vehicle": "car truck bus tractor van", "boat": "canoe ferry yacht kayak raft",
    "weapon": "sword rifle spear pistol",
    "building": "church hospital castle barn tower", "flower": "rose tulip daisy lily orchid",
    "vegetable": "carrot onion potato cabbage spinach", "drink": "coffee tea lemonade wine beer",
    "instrument": "piano violin guitar flute trumpet", "jewel": "diamond ruby emerald pearl sapphire",
    "reptile": "lizard snake crocodile turtle", "metal": "iron copper silver gold",
    "shoe": "boot sandal slipper sneaker",
    "dessert": "cake pudding pie cookie", "disease": "flu measles cholera malaria", "dance": "waltz tango polka samba",
    "document": "contract passport receipt certificate", "toy": "doll kite yoyo puppet",
    "rodent": "mouse rat squirrel hamster beaver", "grain": "wheat barley rye oats",
    "cheese": "cheddar brie feta gouda",
    "relative": "uncle aunt cousin nephew niece", "garment": "jacket skirt sweater vest blouse",
    "utensil": "fork ladle spatula whisk", "limb": "arm leg wing tail", "sport": "soccer tennis golf hockey",
    "spice": "pepper cinnamon saffron ginger", "nut": "almond walnut hazelnut pecan",
    "hat": "beret helmet bonnet turban",
    "seat": "bench stool sofa throne", "stone": "granite marble slate flint", "fabric": "silk cotton linen velvet",
}  # fmt: skip
_SEEN = (
    "was found:is old:was lost:was bought:was praised:is small:was hidden:was drawn:is rare:was moved:was stolen:"
    "is new:was seen:was sold:was missing:is cheap:was damaged:was described:was shown:is famous:was mentioned:"
    "was wanted:was sent:is ugly:was ordered:was brought:was chosen:is green:was touched:was kept"
).split(":")
_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()


def _fifths(words: Sequence[Word], part: str) -> list[Word]:
    """The words of a part: three fifths for training, a fifth each for validation and test."""
    where = {"train": (0, 1, 2), "validation": (3,), "test": (4,)}[part]
    return [word for number, word in enumerate(words) if number % 5 in where]


# ---- phenomena ------------------------------------------------------------------------------------------------------

Drawn = tuple[Sentence, Sentence, list[World]]
Draw = Callable[[random.Random, str], Drawn]


def _quantified(rng: random.Random, part: str) -> Drawn:
    """Quantifiers over a noun with or without adjective and an action with or without manner. A world is a set of
    individuals, each (has the adjective, acts, acts in that manner); at least one has the adjective, so that "every"
    has something to speak of."""
    noun, adjective = rng.choice(_fifths(_NOUNS, part)), rng.choice(_fifths(_ADJECTIVES, part))
    action, manner = rng.choice(_fifths(_ACTIONS, part)).split(":")[0], rng.choice(_fifths(_MANNERS, part))

    def sentence() -> Sentence:
        quantifier, narrow, how = (
            rng.choice(("every", "some", "no", "not every")),
            rng.random() < 0.5,
            rng.random() < 0.5,
        )
        text = " ".join(filter(None, (quantifier, adjective if narrow else "", noun, action, manner if how else "")))

        def holds(world: World) -> bool:
            acts = [(w[2] if how else w[1]) for w in world if w[0] or not narrow]
            return {"every": all(acts), "some": any(acts), "no": not any(acts), "not every": not all(acts)}[quantifier]

        return Sentence(text, holds)

    return sentence(), sentence(), _CROWDS


_PERSONS = [(tall, acts, how) for tall in (0, 1) for acts, how in ((0, 0), (1, 0), (1, 1))]
_CROWDS = [
    crowd
    for size in range(1, len(_PERSONS) + 1)
    for crowd in itertools.combinations(_PERSONS, size)
    if any(person[0] for person in crowd)
]


def _negated(rng: random.Random, part: str) -> Drawn:
    """One negation or none, and complementary opposites. A world says whether the thing is the first of the two."""
    one, other = rng.choice(_fifths(list(_OPPOSITES), part))
    thing = rng.choice(_OPPOSITES[one, other].split())

    def sentence(frames: Sequence[str], word: str) -> Sentence:
        frame = rng.choice(frames)
        turned = (word == other) + any(no in frame for no in ("by no means", "false"))
        return Sentence(frame.format(thing, word), lambda world: world[0] != turned % 2)

    time = rng.choice(("is", "was", "remains"))
    plain = (f"the {{}} {time} {{}}", f"it is true that the {{}} {time} {{}}")
    negative = (f"the {{}} {time} by no means {{}}", f"it is false that the {{}} {time} {{}}")
    words = rng.choice(((one, one), (other, other), (one, one), (other, other), (one, other), (other, one)))
    return sentence(plain + negative, words[0]), sentence(plain[:1], words[1]), [(True,), (False,)]


def _of_a_kind(rng: random.Random, part: str) -> Drawn:
    """Kinds of things, in sentences that some or no such thing makes true. A world says which of three things, two of
    one kind and one of another, and one more of the first kind, were found."""
    kinds = _fifths(list(_KINDS), part)
    kind, strange = rng.sample(kinds, 2)
    one, two = rng.sample(_KINDS[kind].split(), 2)
    three = rng.choice(_KINDS[strange].split())
    what = rng.choice(_fifths(_SEEN, part))
    members = {one: (0,), two: (1,), three: (2,), kind: (0, 1, 3), strange: (2, 4)}

    def sentence(word: str, positive: bool) -> Sentence:
        article = ("an" if word[0] in "aeiou" else "a") if positive else "no"
        return Sentence(f"{article} {word} {what}", lambda world: any(world[i] for i in members[word]) == positive)

    positive = rng.random() < 0.6
    first = rng.choice((one, one, kind))
    second = rng.choice((one, kind) if first != one else (kind, kind, two, strange, three))
    return sentence(first, positive), sentence(second, positive), list(itertools.product((False, True), repeat=5))


def _counted(rng: random.Random, part: str) -> Drawn:
    """Bounds on a number. A world is a number from 0 to 14."""
    name, things = rng.choice(_fifths(_NAMES, part)), rng.choice(_fifths(_OBJECTS, part))
    verb = rng.choice(("has", "bought", "lost"))

    def sentence(kinds: Sequence[str], bound: int) -> Sentence:
        kind = rng.choice(kinds)
        holds = {
            "more than": lambda w: w[0] > bound, "at least": lambda w: w[0] >= bound,
            "fewer than": lambda w: w[0] < bound, "at most": lambda w: w[0] <= bound,
            "exactly": lambda w: w[0] == bound,
        }[kind]  # fmt: skip
        return Sentence(f"{name} {verb} {kind} {_NUMBERS[bound]} {things}", holds)

    bound = rng.randint(2, 11)
    other = min(12, max(1, bound + rng.choice((-5, -4, -3, -2, 2, 3, 4, 5))))
    premise = sentence(("at least", "at most", "exactly"), bound)
    return premise, sentence(("more than", "fewer than", "exactly"), other), [(number,) for number in range(15)]


def _implied(rng: random.Random, part: str) -> Drawn:
    """Verbs that say whether what they speak of happened. A world says whether it did."""
    who = rng.choice((rng.choice(_fifths(_NAMES, part)), "the " + rng.choice(_fifths(_NOUNS, part))))
    _, past, plain = rng.choice(_fifths(_ACTIONS, part)).split(":")
    manner = rng.choice(("", " " + rng.choice(_fifths(_MANNERS, part))))
    happened, never = rng.random() < 0.5, rng.random() < 0.4
    verb = ("never " if never else "") + rng.choice((_DONE if happened else _UNDONE)[part])
    premise = Sentence(f"{who} {verb} to {plain}{manner}", lambda world: world[0] == (happened != never))
    hypothesis = rng.choice((
        Sentence(f"{who} {past}{manner}", lambda world: world[0]),
        Sentence(f"{who} did not {plain}{manner}", lambda world: not world[0]),
    ))  # fmt: skip
    return premise, hypothesis, [(True,), (False,)]


def _coordinated(rng: random.Random, part: str) -> Drawn:
    """And, or, neither, but not. A world says which of three people acted."""
    names = rng.sample(_fifths(_NAMES, part), 3)
    _, past, plain = rng.choice(_fifths(_ACTIONS, part)).split(":")
    a, b = 0, 1
    text, holds = rng.choice((
        (f"{names[a]} and {names[b]} {past}", lambda w: w[a] and w[b]),
        (f"{names[a]} or {names[b]} {past}", lambda w: w[a] or w[b]),
        (f"neither {names[a]} nor {names[b]} {past}", lambda w: not w[a] and not w[b]),
        (f"{names[a]} but not {names[b]} {past}", lambda w: w[a] and not w[b]),
        (f"{names[a]} did not {plain}, but {names[b]} did", lambda w: w[b] and not w[a]),
        (f"only {names[a]} {past}", lambda w: w[a] and not w[b] and not w[2]),
    ))  # fmt: skip
    who = rng.choice((0, 0, 1, 1, 2))
    hypothesis = rng.choice((
        Sentence(f"{names[who]} {past}", lambda w: w[who]),
        Sentence(f"{names[who]} did not {plain}", lambda w: not w[who]),
    ))  # fmt: skip
    return Sentence(text, holds), hypothesis, list(itertools.product((False, True), repeat=3))


@dataclass(frozen=True)
class Phenomenon:
    """How a task's pairs are drawn, and which labels it asks for."""

    draw: Draw
    allowed: tuple[int, ...]


# Like SNLI, MNLI and SICK three tasks have all classes; like QNLI and RTE two have no "neutral", like SciTail one has
# no "contradiction".
PHENOMENA = {
    "quantifiers": Phenomenon(_quantified, (0, 1, 2)),
    "numbers": Phenomenon(_counted, (0, 1, 2)),
    "coordination": Phenomenon(_coordinated, (0, 1, 2)),
    "negation": Phenomenon(_negated, (0, 2)),
    "implicatives": Phenomenon(_implied, (0, 2)),
    "kinds": Phenomenon(_of_a_kind, (0, 1)),
}


def pairs(task: str, part: str, count: int, seed: int = 0) -> list[tuple[str, str, int]]:
    """`count` different pairs (premise, hypothesis, label) of a part, as many of each allowed label, shuffled.

    The order is mixed label by label: the first n of them are balanced too, to one.

    Raises:
        ValueError: the grammar does not have so many.
    """
    phenomenon, rng = PHENOMENA[task], random.Random(f"{task} {part} {seed}")
    wanted = {label: count // len(phenomenon.allowed) for label in phenomenon.allowed}
    for label in phenomenon.allowed[: count % len(phenomenon.allowed)]:
        wanted[label] += 1
    found: dict[int, list[tuple[str, str, int]]] = {label: [] for label in phenomenon.allowed}
    seen: set[tuple[str, str]] = set()
    tries = 0
    while any(len(found[label]) < wanted[label] for label in found):
        tries += 1
        if tries > 60 * count + 10_000:
            raise ValueError(f"{task}: the {part} lexicon does not give {count} different pairs")
        premise, hypothesis, worlds = phenomenon.draw(rng, part)
        key = (premise.text, hypothesis.text)
        if premise.text == hypothesis.text or key in seen:
            continue
        label = relation(premise, hypothesis, worlds)
        if label in found and len(found[label]) < wanted[label]:
            seen.add(key)
            found[label].append((*key, label))
    mixed = []
    for row in itertools.zip_longest(*found.values()):
        row = [pair for pair in row if pair is not None]
        rng.shuffle(row)
        mixed += row
    return mixed
