"""Replies that want the reward without the writing: the strings every judge here is measured against.

Kinds: master keys (arXiv 2507.08794), words to the judge, forged verdicts and template tokens, copies of the prompt,
lists of the required words, repetitions, flattery and filler, other languages, noise.
"""

from __future__ import annotations

import random
from importlib.resources import files

from omni_fast.rewards.judge.base import Reply
from omni_fast.rewards.judge.sentences import PHRASES, prompt_text, random_prompt, reference_sentence


def hack_replies(seed: int = 0, prompts: int = 12) -> list[Reply]:
    """At least 200 hacks, each as a reply to a prompt with a good reference."""
    rng = random.Random(seed)
    result = []
    shipped = (files("omni_fast.rewards.judge") / "data" / "hacks.txt").read_text(encoding="utf-8").splitlines()
    fixed = [*shipped, "", " ", "\n\n", "\u200b", "\ud800"]
    for text in fixed:
        topic, words = random_prompt(rng)
        result.append(Reply(prompt_text(topic, words), text, reference_sentence(topic, words, rng), words))
    for _ in range(prompts):
        topic, words = random_prompt(rng)
        prompt, reference = prompt_text(topic, words), reference_sentence(topic, words, rng)
        backwards = " ".join(reversed(reference.rstrip(".").split()))
        known = dict(prompt=prompt, topic=topic, a=words[0], b=words[1], backwards=backwards)
        result += [Reply(prompt, template.format(**known), reference, words) for template in PHRASES["hacks"]]
    return result
