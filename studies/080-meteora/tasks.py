# SPDX-License-Identifier: Apache-2.0
"""Eight small tasks on letters, words and digits, alone and three in one prompt: study 080."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

IGNORED = -100
TASKS = ("reverse", "upper", "vowels", "first", "sum", "sort", "plural", "opposite")
WORDS = [
    "cat",
    "dog",
    "river",
    "house",
    "garden",
    "apple",
    "table",
    "window",
    "letter",
    "paper",
    "forest",
    "engine",
    "bottle",
    "camera",
    "pocket",
    "market",
    "doctor",
    "farmer",
    "teacher",
    "student",
    "mother",
    "brother",
    "sister",
    "planet",
    "rocket",
    "island",
    "bridge",
    "castle",
    "winter",
    "summer",
    "finger",
    "button",
    "carpet",
    "pillow",
    "mirror",
    "basket",
    "hammer",
    "ladder",
    "pencil",
    "rabbit",
    "monkey",
    "spider",
    "tiger",
    "eagle",
    "lemon",
    "onion",
    "carrot",
    "potato",
    "pepper",
    "cookie",
    "butter",
    "dinner",
    "kitchen",
    "bedroom",
    "office",
    "street",
    "corner",
    "village",
    "country",
    "nation",
    "friend",
    "soldier",
    "pilot",
    "singer",
    "writer",
    "painter",
    "actor",
    "driver",
    "waiter",
    "banker",
    "lawyer",
    "leader",
    "king",
    "queen",
    "prince",
    "flower",
    "tree",
    "leaf",
    "seed",
    "root",
    "branch",
    "stone",
    "hill",
    "lake",
    "ocean",
    "beach",
    "cloud",
    "storm",
    "wind",
    "train",
    "plane",
    "truck",
    "boat",
    "ship",
    "car",
    "road",
    "path",
    "door",
    "wall",
    "floor",
    "roof",
    "lamp",
    "clock",
    "phone",
    "book",
    "page",
    "line",
    "word",
]
OPPOSITES = (
    "hot cold, big small, up down, left right, open closed, fast slow, high low, hard soft, light dark, old young, "
    "rich poor, wet dry, full empty, early late, strong weak, happy sad, good bad, true false, day night, black white, "
    "love hate, win lose, push pull, buy sell, give take, start stop, near far, thick thin, wide narrow, long short, "
    "clean dirty, heavy light, loud quiet, safe dangerous, sweet bitter, first last, front back, inside outside, north south, "
    "east west, summer winter, friend enemy, peace war, life death, man woman, boy girl, king queen, brother sister, "
    "yes no, always never"
)


@dataclass(frozen=True)
class Row:
    """A question of a task with its answer, both as text."""

    task: str
    question: str
    answer: str

    @property
    def prompt(self) -> str:
        return f"{self.task}: {self.question}\n"

    @property
    def cue(self) -> str:
        return f"{self.task} ->"


def plural(word: str) -> str:
    """Regular plurals, and the irregular ones of the list."""
    odd = {"leaf": "leaves", "man": "men", "woman": "women"}
    if word in odd:
        return odd[word]
    if word.endswith(("s", "x", "ch", "sh", "potato")):
        return word + "es"
    return word[:-1] + "ies" if word.endswith("y") and word[-2] not in "aeiou" else word + "s"


def letters(task: str, w: tuple[str, ...]) -> str:
    """The answer of a task on four letters that stand apart, as a model of this size does not spell its tokens."""
    return {
        "reverse": " ".join(reversed(w)), "upper": " ".join(w).upper(), "first": w[0],
        "vowels": str(sum(c in "aeiou" for c in w)),
    }[task]  # fmt: skip


def rows(task: str) -> list[list[Row]]:
    """All questions of a task, in groups that must not be split over train, dev and test."""
    if task in ("reverse", "upper", "vowels", "first"):
        rng, words = random.Random(task), dict[tuple[str, ...], None]()
        while len(words) < 270:
            words[tuple(rng.choice("aeiou" if rng.random() < 0.4 else "bcdfghklmnprstvw") for _ in range(4))] = None
        return [[Row(task, " ".join(w), letters(task, w))] for w in words]
    if task == "plural":
        return [[Row(task, w, plural(w))] for w in dict.fromkeys(WORDS)]
    if task == "sum":
        pairs = [(a, b) for a in range(10) for b in range(a, 10)]
        return [[Row(task, f"{x} {y}", str(a + b)) for x, y in dict.fromkeys([(a, b), (b, a)])] for a, b in pairs]
    if task == "sort":
        rng = random.Random("digits")
        sets = list(itertools.combinations(range(10), 3))
        return [
            [
                Row(task, " ".join(map(str, p)), " ".join(map(str, d)))
                for p in rng.sample(list(itertools.permutations(d)), 2)
            ]
            for d in sets
        ]
    pairs = [p.split() for p in OPPOSITES.split(",")]
    groups: list[set[str]] = []
    for pair in pairs:  # a word with two opposites keeps them together
        near = [g for g in groups if g & set(pair)]
        groups = [g for g in groups if g not in near] + [set(pair).union(*near)]
    return [[Row(task, x, y) for p in pairs if set(p) <= g for x, y in (p, p[::-1])] for g in groups]


def splits(task: str, seed: int) -> dict[str, list[Row]]:
    """60 % of the groups to train on, 12 % to choose by, the rest to test on; test is the same for every seed."""
    groups = rows(task)
    random.Random(f"{task} test").shuffle(groups)
    cut = -(-28 * len(groups) // 100)
    test, rest = groups[:cut], groups[cut:]
    random.Random(f"{task} {seed}").shuffle(rest)
    dev = -(-12 * len(groups) // 100)
    made = {"train": rest[dev:], "dev": rest[:dev], "test": test}
    return {name: [r for g in some for r in g] for name, some in made.items()}


def composites(by_task: dict[str, list[Row]], n: int, seed: str) -> list[list[Row]]:
    """`n` prompts of three questions of different tasks, in random order."""
    rng = random.Random(seed)
    return [[rng.choice(by_task[t]) for t in rng.sample(list(by_task), 3)] for _ in range(n)]


@dataclass(frozen=True)
class Encoded:
    """Token ids with labels (not shifted), the task number of every token, and which question each label answers."""

    ids: list[int]
    labels: list[int]
    expert: list[int]
    question: list[int]
    text: str


def encoded(questions: Sequence[Row], code: Callable[[str], list[int]]) -> Encoded:
    """All questions, then each one's cue with its answer and a line end; answers and line ends are supervised."""
    ids, labels, expert, question = [], [], [], []

    def put(text: str, task: str, asked: int, supervised: bool) -> None:
        new = code(text)
        ids.extend(new)
        labels.extend(new if supervised else [IGNORED] * len(new))
        expert.extend([TASKS.index(task)] * len(new))
        question.extend([asked] * len(new))

    for i, q in enumerate(questions):
        put(q.prompt, q.task, i, False)
    for i, q in enumerate(questions):
        put(q.cue, q.task, i, False)
        put(f" {q.answer}", q.task, i, True)
        put("\n", q.task, i, True)
    return Encoded(ids, labels, expert, question, "".join(q.prompt for q in questions))
