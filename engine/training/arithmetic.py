"""Seeded synthetic arithmetic: plain lines, interactive sessions, word problems and chat."""

from __future__ import annotations

import random

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gita", "Hugo", "Iris", "Jon", "Kim", "Lea")
THINGS = ("apples", "books", "coins", "pens", "stones", "cards", "stamps", "shells", "eggs", "cups")
ASKS = (
    "What is {q}?",
    "Calculate {q}.",
    "Compute {q}.",
    "How much is {q}?",
    "{q} = ?",
    "Please work out {q}.",
)


def problem(rng: random.Random) -> tuple[int, str, int, int]:
    """One exact problem (a, sign, b, result), every number in 0 ... 999."""
    kind = rng.choices("+-*/", (4, 4, 2, 1))[0]
    if kind == "+":
        top = rng.choice((9, 20, 99, 99))
        a, b = rng.randint(0, top), rng.randint(0, top)
        return a, "+", b, a + b
    if kind == "-":
        top = rng.choice((9, 20, 99, 99))
        a, b = sorted((rng.randint(0, top), rng.randint(0, top)), reverse=True)
        return a, "-", b, a - b
    a, b = rng.randint(1, 12), rng.randint(1, 12)
    return (a, "*", b, a * b) if kind == "*" else (a * b, "/", b, a)


def line(rng: random.Random) -> str:
    """`a + b = c`."""
    a, sign, b, c = problem(rng)
    return f"{a} {sign} {b} = {c}"


def session(rng: random.Random) -> str:
    """One prompt and answer of an interactive Python session."""
    a, sign, b, c = problem(rng)
    return f">>> {a} {'//' if sign == '/' else sign} {b}\n{c}"


def story(rng: random.Random) -> tuple[str, str]:
    """A word problem and its worked answer."""
    name, other = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    a, b = rng.randint(2, 50), rng.randint(2, 50)
    small, times = rng.randint(2, 12), rng.randint(2, 12)
    low, high = min(a, b), max(a, b)
    return rng.choice(
        (
            (
                f"{name} has {a} {thing}. {other} gives {name} {b} more {thing}. "
                f"How many {thing} does {name} have now?",
                f"{a} + {b} = {a + b}. {name} has {a + b} {thing}.",
            ),
            (
                f"{name} has {high} {thing} and gives {low} of them to {other}. "
                f"How many {thing} does {name} have left?",
                f"{high} - {low} = {high - low}. {name} has {high - low} {thing} left.",
            ),
            (
                f"{name} buys {small} boxes with {times} {thing} in each box. How many {thing} does {name} buy?",
                f"{small} * {times} = {small * times}. {name} buys {small * times} {thing}.",
            ),
            (
                f"{name} shares {small * times} {thing} equally among {small} friends. "
                f"How many {thing} does each friend get?",
                f"{small * times} / {small} = {times}. Each friend gets {times} {thing}.",
            ),
            (
                f"{name} has {a} {thing} and {other} has {b} {thing}. How many {thing} do they have together?",
                f"{a} + {b} = {a + b}. Together they have {a + b} {thing}.",
            ),
        )
    )


def turn(rng: random.Random) -> tuple[str, str]:
    """One question and answer."""
    if rng.random() < 0.4:
        return story(rng)
    a, sign, b, c = problem(rng)
    return rng.choice(ASKS).format(q=f"{a} {sign} {b}"), f"{a} {sign} {b} = {c}"


def chat(turns: list[tuple[str, str]], system: str | None = None) -> str:
    """ChatML, as the chat template of the embedded model renders it."""
    text = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    for question, answer in turns:
        text += f"<|im_start|>user\n{question}<|im_end|>\n"
        text += f"<|im_start|>assistant\n{answer}<|im_end|>\n"
    return text


def document(rng: random.Random) -> str:
    """One training document of one of the five styles."""
    style = rng.choices(("lines", "session", "story", "chat"), (3, 2, 2, 4))[0]
    if style == "lines":
        return "\n".join(line(rng) for _ in range(rng.randint(5, 40))) + "\n"
    if style == "session":
        return "\n".join(session(rng) for _ in range(rng.randint(4, 30))) + "\n"
    if style == "story":
        pairs = [story(rng) for _ in range(rng.randint(1, 6))]
        return "\n\n".join(f"Question: {q}\nAnswer: {a}" for q, a in pairs) + "\n"
    system = rng.choice((None, None, None, "You are a helpful assistant.", "Answer briefly."))
    return chat([turn(rng) for _ in range(rng.randint(1, 5))], system)


def documents(characters: int, seed: int) -> list[str]:
    """Documents that together hold at least this many characters."""
    rng = random.Random(seed)
    out: list[str] = []
    while characters > 0:
        out.append(document(rng))
        characters -= len(out[-1])
    return out
