"""A property of text that can be checked: how many different words of the sea it has, up to three."""

import re

SEA = {
    *("sea", "ocean", "wave", "waves", "water", "waters", "shore", "beach", "island", "river", "harbour"),
    *("ship", "ships", "boat", "boats", "sail", "sails", "sailor", "sailors"),
}


def reward(prompt, answer, row):
    """0, 1/3, 2/3 or 1."""
    words = set(re.findall(r"[a-z]+", answer.lower()))
    return min(3, len(words & SEA)) / 3
