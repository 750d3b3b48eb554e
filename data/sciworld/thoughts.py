"""What a person thinks during an experiment, and which trajectories are worth imitating
(data/make_examples.py)."""

import re

PREFIX, FIXED, LONGEST = "Task: ", "chemistry-mix-paint-secondary-color", 3500
REPEATED = r"wait1?|pour .+"

# (pattern, replacement), one after the other on the actions of the gold path, one per line
CLEANED = [
    # its names of things that env.py has not put right
    (r"^(pour .+?)(?: in art studio| in desk)? in(?:to)? ", r"\1 into "),
    (r"\b(cathode|anode) in (.+)", r"\2 \1"),
    (r"\bsubstance in metal pot\b", "water"),
    # actions that are not needed
    (
        r"^open cupboard\npick up metal pot\n(look around\n)pick up recipe\n(read .+\n)look around\n",
        r"\1\2open cupboard\n",
    ),
    (r"^pick up (.+)\nfocus on \1\ndrop .+\nlook around\n", r"look around\nfocus on \1\n"),
    (
        r"^focus on unknown substance\n(?=(?:.+\n)*connect (unknown substance \w) )",
        r"focus on \1\n",
    ),
    (r"^pick up (.+\n)(focus on \1)(?!teleport)", r"\2"),
    (r"^pick up (.+)\nmove \1 to ", r"move \1 to "),
    (r"^(pick up metal pot|pour (.+) into \2|examine metal pot|examine water)\n", ""),
    (r"^(focus on .+\n)wait1\n", r"\1"),
    (r"^(wait1\n)+", "wait1\n"),
    (r"^(?!teleport|wait)(.+\n)look around\n", r"\1"),
    (r"^(activate stove\n)(?:(?:examine|use thermometer on) (?:ice\n|water\n))+\Z", r"\1wait\n"),
    (r"^pick up thermometer\n(?!(?:.+\n)*use thermometer)", ""),
    # looking, where the gold path knows without
    (r"^open (.+)\n", r"open \1\nlook at \1\n"),
]
# (pattern in the actions, one per line; why such a trajectory is not worth imitating)
DETOURS = [
    (r"\A(?!teleport)", "begins where everything is"),
    (
        r"^(?!open|close|activate|deactivate|connect|disconnect|use|look|examine|read|move|pick up"
        r"|pour|mix|teleport to|focus on|wait).+",
        "has an action that the prompt does not list",
    ),
    (
        r"\b(object|living thing|(?<!unknown )substance|component|generator in|cloth|steel)\b",
        "names a thing as nobody would",
    ),
    (r"^pour .+ into cup", "pours into one of several cups"),
    (r"^move (bed|couch|counter|closet|table|mattress)\b", "moves furniture into a box"),
    (r"^pick up .+ egg$", "takes an egg for the animal"),
    (r"^mix .+\nfocus on banana sandwich$", "has an observation that names other ingredients"),
]
# words that say nothing about what is in a container
EMPTY = set(
    "a an the is in on of open door drawer containing nothing substance called which turned"
    " off".split()
)
LIVES = {
    "giant tortoise": "more than 100 years",
    "crocodile": "about 70 years",
    "elephant": "about 60 years",
    "parrot": "about 60 years",
    "mouse": "about two years",
    "ant": "a few months",
    "dragonfly": "a few months",
}

# {pattern of the task: [(pattern of the action, or of OBSERVATION BEFORE >> ACTION; thought)]}, of
# which the first that fits is used. {name}: a named group of the patterns, {a_name}: with its
# article; {first}, {second}, {third}: the colors poured; {made}: the first product of mixing;
# {life}: how long an animal lives
RULES = {
    r"to use chemistry to create (?P<color>\w+) paint\.": [
        (
            r"teleport to art studio",
            "{color} paint is made of {first} and {second} paint. Paints are usually kept in the art "
            "studio, so I go there.",
        ),
        (r"look around", "I look around to see which paints are here and what I can mix them in."),
        (
            r".* (?P<cup>bowl|jug) \(containing nothing.* >> pour .+ into (?P=cup)",
            "There are cups with {first} and {second} paint, and the {cup} is empty. I pour both "
            "into the {cup}, the {first} paint first.",
        ),
        (r"pour .+", "The {second} paint is still missing."),
        (r"mix (?P<cup>.+)", "Both colors are in the {cup} now, so I mix them."),
        (
            r"focus on .+",
            "The mixture is {color} paint, which is what the task asks for. What is left is to focus "
            "on it.",
        ),
    ],
    r"to use chemistry to create (?P<color>\w+-\w+) paint\.": [
        (
            r"teleport to art studio",
            "{color} paint is made of {made} and {third} paint, and {made} of {first} and {second}. "
            "Paints are usually kept in the art studio, so I go there.",
        ),
        (r"look around", "I look around to see which paints are here and what I can mix them in."),
        (
            r".* (?P<cup>bowl|jug) \(containing nothing.* >> pour .+ into (?P=cup)",
            "There are cups with {first} and {second} paint, and the {cup} is empty. I mix {made} in "
            "it first.",
        ),
        (
            r".* mix to produce .+? >> focus on \w+ paint",
            "This is the intermediate paint, {made}. The task says to focus on it before I go on.",
        ),
        (
            r"open .+",
            "I still need {third} paint, and I have used up the cup of it. There may be more in the "
            "cupboard, which is closed.",
        ),
        (
            r".*cupboard door is open.* >> pour cup containing (?P<last>\w+) paint .+",
            "There is more {last} paint, which turns {made} into {color}.",
        ),
        (r"focus on .+", "The mixture is {color} paint now. What is left is to focus on it."),
    ],
    r"the substance '(?P<product>.+?)'\. .+ near the (?P<place>.+?)\.": [
        (r"teleport to (?P=place)", "The recipe should be near the {place}, so I begin there."),
        (r"read recipe", "There is the recipe. I read it to know what to mix."),
        (
            r"open cupboard",
            "What the recipe names is here. I need a container to mix it in: there may be a pot in "
            "the cupboard, which is closed.",
        ),
        (
            r".*metal pot \(containing nothing\).* >> move .+",
            "The metal pot is empty. I move into it what the recipe names.",
        ),
        (r"mix .+", "All that the recipe names is in the pot, so I mix it."),
        (r"focus on .+", "The {product} has been made. What is left is to focus on it."),
    ],
    r"find a\(n\) non-living thing\. .+ to the (?P<box>.+?) in the (?P<room>.+?)\.": [
        (
            r"teleport to (?P=room)",
            "Things that are not alive are in every room, so I look for one in the {room}, where the "
            "{box} is.",
        ),
        (
            r"focus on (?P<thing>.+)",
            "The {thing} is not alive. The task says to focus on it first.",
        ),
        (r"move .+", "What is left is to move it to the {box}, which is in this room."),
    ],
    r"find a\(n\) (?P<kind>.+?)\. .+ to the (?P<box>.+?) in the (?P<room>.+?)\.": [
        (
            r"teleport to greenhouse",
            "To find {a_kind} I look in the greenhouse, where plants usually grow.",
        ),
        (r"teleport to outside", "To find {a_kind} I look outside, where animals usually live."),
        (
            r"teleport to (?P=room)",
            "What is left is to bring it to the {box}, which is in the {room}.",
        ),
        (
            r"focus on (?P<thing>.+)",
            "There is {a_thing}, which is {a_kind}. The task says to focus on it first.",
        ),
        (r"pick up (?P<pot>flower pot .+)", "It grows in the {pot}, so I take the pot along."),
        (r"pick up .+", "The {box} is in another room, so I take it along."),
    ],
    r"find the animal with the (?P<most>longest|shortest) life span": [
        (r"teleport to outside", "The task says that the animals are outside, so I go there."),
        (r"look around", "I look around to see which animals I have to compare."),
        (
            r".*You focus on .+ >> focus on (?:baby )?(?P<animal>.+?)(?: egg)?",
            "Next is the shortest life span: {a_animal} lives only {life}, less than the others.",
        ),
        (
            r"focus on (?:baby )?(?P<animal>.+?)(?: egg)?",
            "Of the animals here, the {animal} has the {most} life span: {life}.",
        ),
    ],
    r"turn on the (?P<bulb>.+? bulb)(?: by powering it using a (?P<sort>\w+) power source)?\.": [
        (
            r"teleport to workshop",
            "Light bulbs, wires and sources of electrical power are usually in the workshop, so I go "
            "there.",
        ),
        (r"focus on .+", "The {bulb} is here. The task says to focus on it first."),
        (
            r"connect battery anode .+",
            "The bulb needs a closed circuit: from one pole of the battery through a wire to the "
            "bulb, and through a second wire back to the other pole. I begin at the battery.",
        ),
        (
            r"connect (?P<source>.+) anode .+",
            "The task wants a {sort} power source, and the {source} is one. The bulb needs a closed "
            "circuit: from one pole of the {source} through a wire to the bulb, and through a second "
            "wire back to the other pole.",
        ),
        (
            r"connect .+ terminal 2 to .+ cathode",
            "Each pole has a wire now. Their free ends go to the two ends of the bulb.",
        ),
        (r"activate (?P<source>.+)", "The circuit is closed, but the {source} is still off."),
        (r"wait1", "Nothing is missing now. I wait one step for the bulb to go on."),
    ],
    r"determine if (?P<thing>.+?) is .+ located around the (?P<place>.+?)\. .+ conductive, place "
    r"it in the (?P<yes>.+?)\. .+ nonconductive, place it in the (?P<no>.+?)\.": [
        (r"teleport to (?P=place)", "The {thing} is around the {place}, so I go there."),
        (r"focus on .+", "The {thing} is here. The task says to focus on it first."),
        (
            r"connect battery anode .+",
            "To test the {thing} I build a circuit of the battery, a light bulb and the {thing}: the "
            "bulb goes on only if the {thing} conducts. I begin with a wire at each pole of the "
            "battery.",
        ),
        (
            r"connect (?P<wire>.+) terminal 2 to (?P<bulb>.+) cathode",
            "The other end of the {wire} goes to the {bulb}, and a third wire leads on from there.",
        ),
        (
            r"connect (?P=thing) terminal 1 .+",
            "The circuit still has a gap between two wires. The {thing} goes there.",
        ),
        (r"wait1", "The circuit is complete. I wait one step and look whether the bulb is on."),
        (
            r".*? (?P<bulb>\w+ light bulb), which is on.* >> move .+ to (?P=yes)",
            "The {bulb} is on, so the {thing} conducts and belongs in the {yes}.",
        ),
        (
            r"move .+ to (?P=no)",
            "The circuit is complete and yet no bulb is on, so the {thing} does not conduct and "
            "belongs in the {no}.",
        ),
    ],
    r"temperature of (?P<thing>.+?), which is located around the (?P<place>.+?)\. .+ above "
    r"(?P<limit>\S+) .+?, place it in the (?P<above>.+?)\. .+, place it in the (?P<below>.+?)\. .+ "
    r"around the (?P<room>.+?)\.": [
        (r"teleport to (?P=place)", "Next is the {thing}, which is around the {place}."),
        (r"teleport to (?P=room)", "The boxes are around the {room}, so I bring it there."),
        (
            r"teleport to kitchen",
            "First I need a thermometer. There usually is one in the kitchen.",
        ),
        (
            r"pick up thermometer",
            "There is a thermometer. I need it where the {thing} is, so I take it along.",
        ),
        (r"focus on thermometer", "The task says to focus on the thermometer first."),
        (
            r"pick up .+",
            "The {thing} is here, but the boxes are around the {room}, so I take it along.",
        ),
        (r"focus on .+", "The task says to focus on the {thing} next."),
        (r"use thermometer .+", "I have focused on both. Now I measure."),
        (
            r".* (?P<t>\S+) degrees celsius >> move .+ to (?P=above)",
            "{t} degrees is above {limit}, so the {thing} belongs in the {above}.",
        ),
        (
            r".* (?P<t>\S+) degrees celsius >> move .+ to (?P=below)",
            "{t} degrees is below {limit}, so the {thing} belongs in the {below}.",
        ),
    ],
    r"task is to (?P<what>melt|change the state of matter of) ice\.": [
        (
            r"teleport to kitchen",
            "Ice is usually in the freezer of a kitchen, and the stove to melt it is there too.",
        ),
        (
            r"open cupboard",
            "I need a pot to heat the ice in. There may be one in the cupboard, which is closed.",
        ),
        (
            r"open freezer",
            "There is a metal pot, and it is empty. The ice should be in the freezer, which is "
            "closed.",
        ),
        (r"focus on .+", "There is the ice. The task says to focus on it first."),
        (r"move ice .+", "Now the ice goes into the pot, and the pot onto the stove."),
        (r"activate stove", "The stove is still off."),
        (r"wait", "The ice melts only with time, so I wait."),
    ],
    r"task is to freeze water\.": [
        (
            r"teleport to kitchen",
            "A kitchen has a sink to get water from and a freezer, so I go there.",
        ),
        (
            r"pick up thermometer",
            "There is a thermometer. I take it, to see later how cold the water is.",
        ),
        (
            r"open cupboard",
            "I need a pot for the water. There may be one in the cupboard, which is closed.",
        ),
        (r"move metal pot to sink", "The metal pot is empty, so I fill it at the sink."),
        (
            r"focus on .+",
            "The pot should have water in it now. The task says to focus on it first.",
        ),
        (r"open freezer", "The pot with the water has to go into the freezer, which is closed."),
        (r"use .+", "I measure how cold the water is."),
        (
            r".* (?P<t>\S+) degrees celsius >> wait",
            "Water freezes at 0 degrees and this is at {t}, so it needs more time.",
        ),
    ],
}


def cleaned(actions: list[str]) -> list[str]:
    text = "".join(f"{action}\n" for action in actions)
    for pattern, replacement in CLEANED:
        text = re.sub(pattern, replacement, text, flags=re.M)
    return text.splitlines()


def detour(u: str, steps: list) -> str | None:
    text = "".join(f"{action}\n" for action, _ in steps)
    found = ((why, re.search(pattern, text, re.M)) for pattern, why in DETOURS)
    if fault := next((f"{why}: {match[0]}" for why, match in found if match), None):
        return fault
    for i, (action, observation) in enumerate(steps):
        later = re.findall(r"\w+", " ".join(a for a, _ in steps[i + 1 :]))
        if action.startswith("look at ") and not (
            set(re.findall(r"\w+", observation)) - EMPTY
        ) & set(later):
            return f"opens a container in vain: {action}"
        if action.startswith("focus on "):
            name = re.sub(r"^focus on | in .+", "", action)
            if not re.sub(r" in .+", "", observation.rstrip(".")).endswith(name):
                return f"names a thing as no observation does: {action}"
            if "life span" in u and not any(animal in name for animal in LIVES):
                return f"has an animal that LIVES lacks: {name}"
    return None


def thoughts(u: str, steps: list) -> list[str]:
    colors = re.findall(r"containing (\w+) paint", " ".join(a for a, _ in steps if "pour" in a))
    made = re.findall(r"to produce (\w+) paint", " ".join(o for _, o in steps))
    facts = dict(
        zip(("first", "second", "third", "made"), (colors + 3 * [""])[:3] + made[:1], strict=False)
    )
    texts, before = [], ""
    for action, observation in steps:
        now = f"{u}\n{before} >> {action}"
        found = (
            (thought, re.search(f"{task}.*\n{'' if '>>' in rule else '.* >> '}{rule}$", now))
            for task, rules in RULES.items()
            for rule, thought in rules
        )
        thought, match = next((f for f in found if f[1]), ("", None))
        groups = {k: v for k, v in match.groupdict().items() if v} if match else {}
        for name, value in list(groups.items()):
            groups[f"a_{name}"] = f"{'an' if value[0] in 'aeiou' else 'a'} {value}"
        groups["life"] = LIVES.get(groups.get("animal"), "")
        text = thought.format(**facts, **groups)
        text = text[:1].upper() + text[1:]
        texts.append("" if text in texts else text)
        before = " ".join(observation.split())
    return texts
