"""
Everyday prompts for a small chat model: three lists of subjects, each put into a few templates.

    .venv/bin/python data/everyday.py      # writes data/everyday.jsonl, which lies in the repository

A row holds a prompt and its `split`, `train` or `held-out`. The last subjects of each list are
held out in every template, so that no prompt of the evaluation asks about one that was trained on.
What is left out: answers; distillation needs none. Tests: tests/test_prune.py
"""
from __future__ import annotations

import json
from pathlib import Path

FILE = Path(__file__).with_suffix(".jsonl")
HELD_OUT = 4                                     # subjects of each list

SKILLS = """
bake a loaf of bread; change a bicycle tyre; clean a wooden table; learn to swim; plan a picnic;
grow tomatoes on a balcony; paint a bedroom wall; write a thank-you note;
save money for a holiday; train a young dog; make a pot of tea; pack a suitcase;
remember people's names; iron a shirt; fall asleep faster; prepare for a job interview;
organise a small kitchen; start running; make new friends in a new city; take better photographs;
cook rice; fix a dripping tap; read more books; keep houseplants alive; plan a birthday party;
learn a new language; choose a good melon; sharpen a kitchen knife; remove a coffee stain;
build a birdhouse; tie a tie; clean a window
"""
TOPICS = """
rain; the moon; a bicycle; bread; the heart; a rainbow; money; the sea; a magnet; sleep;
the seasons; electricity; a volcano; honey; the internet; a library; gravity; chocolate; a mirror;
the wind; salt; a seed; an echo; snow; a shadow; glass; the alphabet; a compass; thunder; soap;
a clock; ice
"""
SCENES = """
an old fisherman and a storm; a lost umbrella; two neighbours and a fence;
a cat who is afraid of mice; a train that is late; a girl who finds a key;
a baker on his last day; a letter without a name; a robot in a garden; the first snow of the year;
a dog who waits at a station; a broken teapot; a boy and his kite; a lighthouse at night;
three friends on a mountain; a quiet birthday; a painter without colours; a bus driver who sings;
an empty theatre; a tree that is older than the town; a market in the morning;
a chess game in the park; a coat with deep pockets; a bridge in the fog; a clockmaker;
a summer without rain; a fox in the city; a violin in a shop window; a nurse on the night shift;
a boat with a hole; a teacher's last lesson; a bird that cannot fly
"""
TEMPLATES = {
    SKILLS: ("How do I {}?", "Give me three tips to {}.", "What do I need in order to {}?",
             "My friend wants to {}. What mistakes should she avoid?"),
    TOPICS: ("Explain {} to a child.", "Tell me two interesting facts about {}.",
             "Why is {} important?", "Write one question about {} and answer it."),
    SCENES: ("Write a short story about {}.", "Suggest a title for a story about {}.",
             "Write the first sentence of a novel about {}.", "Describe {} in a few words."),
}


def subjects(text: str) -> list[str]:
    return [" ".join(subject.split()) for subject in text.split(";")]


def rows() -> list[dict[str, str]]:
    """All rows: subjects in the order of the lists, each in every template of its list."""
    found = []
    for text, templates in TEMPLATES.items():
        listed = subjects(text)
        for i, subject in enumerate(listed):
            split = "held-out" if i >= len(listed) - HELD_OUT else "train"
            found += [{"prompt": template.format(subject), "split": split}
                      for template in templates]
    return found


def as_json_lines() -> str:
    return "".join(json.dumps(row) + "\n" for row in rows())


if __name__ == "__main__":
    FILE.write_text(as_json_lines(), encoding="utf-8")
