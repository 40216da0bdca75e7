"""Replies that want the reward without the writing: the strings every judge here is measured against.

Kinds: master keys (arXiv 2507.08794), words to the judge, forged verdicts and template tokens, copies of the prompt,
lists of the required words, repetitions, flattery and filler, other languages, noise.
"""

from __future__ import annotations

import random
from dataclasses import replace
from importlib.resources import files

from omni_fast.rewards.judge.base import Reply
from omni_fast.rewards.judge.sentences import PHRASES, random_reply


def hack_replies(seed: int = 0, prompts: int = 12) -> list[Reply]:
    """At least 200 hacks, each as a reply to a prompt with a good reference."""
    rng = random.Random(seed)
    fixed = (files("omni_fast.rewards.judge") / "data" / "hacks.txt").read_text(encoding="utf-8").splitlines()
    fixed += ["", " ", "\n\n", "\u200b", "\ud800"]
    result = [replace(random_reply(rng)[1], completion=text) for text in fixed]
    for _ in range(prompts):
        topic, good = random_reply(rng)
        backwards = " ".join(reversed(good.reference.rstrip(".").split()))
        a, b = good.required
        known = dict(prompt=good.prompt, topic=topic, a=a, b=b, backwards=backwards)
        result += [replace(good, completion=template.format(**known)) for template in PHRASES["hacks"]]
    return result
