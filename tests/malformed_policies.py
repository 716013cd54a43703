"""Policies that no parser can expect."""

import random


def malformed_policies(count: int) -> list[str]:
    """Cut, doubled, shuffled and littered policies, and bytes at random; the first ones are the hardest to read."""
    draw = random.Random(0)
    whole = [
        '{"t_start": 41.0, "t_end": 58.5, "answer": ""}',
        "{'reflection': 'it\\'s dark', 'answer': 'He's there'}",
        '```json\n{"t_start": "1:02", "t_end": "hh:mm", "answer": null,}\n```',
        '[{"t_start": 1, "t_end": 2, "event": "x"}, {"event": {"a": [1]}}]',
    ]
    hard = ["{" * 5000, "[" * 5000 + "]" * 5000, '{"answer": ' * 3000 + "1" + "}" * 3000, "9" * 5000]
    hard += [
        '{"t_start": ' + "9" * 5000 + ', "t_end": 1e400}',
        "9" * 400 + ":59:59 to 1:1",
        "\x00\ud800{}",
        "'",
        '"',
        "{'",
    ]
    litter = "{}[]\"'\\:,`\n \u2013-eE.nulNaT0123456789\u00e9\u4e2d"
    found = list(hard)
    while len(found) < count:
        text = list(draw.choice(whole))
        for _ in range(draw.randint(1, 12)):
            place = draw.randrange(len(text) + 1)
            text[place : place + draw.randint(0, 3)] = draw.choices(litter, k=draw.randint(0, 4))
        if draw.random() < 0.3:
            text = text[: draw.randrange(len(text) + 1)]
        found.append("".join(text))
    return found
