"""Monitors: each signal fires on its hack and stays silent on ordinary text."""

from omni_fast.rewards.monitors import Monitor, WatchedGroup

GOOD = [
    "The cat watched the moon over the river.",
    "A boat drifted past the sleeping village.",
    "My uncle lost his key near the old bridge.",
    "Nobody heard the bell ring that evening.",
]


def group(texts, rewards=None, **more) -> WatchedGroup:
    return WatchedGroup(texts, rewards if rewards is not None else [0.5] * len(texts), **more)


def steps(*groups: WatchedGroup):
    monitor = Monitor()
    return [monitor.update("writing", [g]) for g in groups][-1]


def test_ordinary_text_warns_of_nothing():
    signals, warnings = steps(*[group(GOOD, checks=[0.9] * 4)] * 6)
    assert warnings == {} and signals.identical == signals.repeated == signals.drift == signals.disagreement == 0.0


def test_length_drift_is_seen_in_both_directions_and_survives_a_resume():
    long = [f"{text} {GOOD[(i + 1) % 4]} {GOOD[(i + 2) % 4]}" for i, text in enumerate(GOOD)]
    assert "grown" in steps(*[group(GOOD)] * 3, group(long))[1]["drift"]
    assert "shrunk" in steps(*[group(long)] * 3, group(GOOD))[1]["drift"]
    before = Monitor()
    for _ in range(3):
        before.update("writing", [group(GOOD)])
    assert Monitor(dict(before.baselines)).update("writing", [group(long)]) == before.update("writing", [group(long)])


def test_each_hack_has_its_signal():
    assert steps(group(["the moon and the moon and the moon and the moon and"] * 2 + GOOD[:2]))[0].repeated == 0.5
    same, warnings = steps(group([GOOD[0]] * 3 + [GOOD[1]], checks=[1.0] * 4))
    assert same.identical == 0.75 and "temperature" in warnings["identical"]
    stuffed, warnings = steps(group(["Paris, paris! PARIS?", "Paris", "Lyon", "Rome"], gold=["Paris"]))
    assert stuffed.stuffed == 0.25 and "gold answer" in warnings["stuffed"]
    torn, warnings = steps(group(GOOD, rewards=[1.0, 1.0, 0.0, None], checks=[0.1, 0.2, 1.0, 0.0]))
    assert torn.disagreement == 1.0 and "contradict" in warnings["disagreement"]


def test_equal_short_answers_are_no_hack_when_they_are_right():
    assert steps(group(["12"] * 8, rewards=[1.0] * 8))[1] == {}
    assert "temperature" in steps(group(["12"] * 8, rewards=[0.0] * 8))[1]["identical"]
