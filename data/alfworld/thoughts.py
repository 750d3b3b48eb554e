"""What a person thinks while doing a chore, and which trajectories are worth imitating
(data/make_examples.py)."""

import re
from types import SimpleNamespace

PREFIX, FIXED, LONGEST = "", None, 2500
REPEATED = "go to .+"  # `detour` says which walks are in vain
# where such an object usually is; an example looks for it in no other place
FOOD = "fridge countertop diningtable"
DISH = "cabinet countertop diningtable shelf sinkbasin"
BATH = "toilet countertop shelf cabinet"
DESK = "desk dresser sidetable shelf drawer"
LIVING = "coffeetable sofa sidetable armchair dresser desk drawer"
USUAL = (
    dict.fromkeys("apple egg lettuce potato tomato".split(), FOOD)
    | dict.fromkeys("bowl cup mug plate".split(), DISH)
    | dict.fromkeys("candle soapbar soapbottle spraybottle".split(), BATH)
    | dict.fromkeys("alarmclock book cd desklamp pen pencil".split(), DESK)
    | dict.fromkeys("cellphone creditcard keychain remotecontrol watch".split(), LIVING)
)
INSIDE = set("cabinet drawer fridge garbagecan microwave safe sinkbasin".split())
WALK = ("go", "open", "close")
STATE = {"clean": "clean", "heat": "hot", "cool": "cool"}


def read(steps: list) -> list[SimpleNamespace]:
    """Of each step: its `verb` and `place`; the next action that is not a walk (`go to`, `open`,
    `close`): its verb (`aim`), its object ("cd 3"), the kind of it (`thing`) and `there`, the place
    from where it is done; whether that object was `seen` before; the places `tried` since the
    action before that one, and those where the person has `been` until then."""
    out, past, tried, been = [], "", [], set()
    for i, (action, observation) in enumerate(steps):
        verb, place = action.split()[0], " ".join(action.split()[-2:])
        j = next((j for j in range(i, len(steps)) if steps[j][0].split()[0] not in WALK), None)
        aim, thing, number = steps[j][0].split()[:3] if j is not None else ("", "", "")
        there = next((a[len("go to ") :] for a, _ in steps[j or 0 :: -1] if a[:3] == "go "), "")
        seen = bool(re.search(rf"\b{thing} {number}\b", past))
        out.append(
            SimpleNamespace(
                verb=verb,
                place=place,
                aim=aim,
                thing=thing,
                object=f"{thing} {number}",
                there=there,
                search=aim in ("take", "toggle") and not seen,
                seen=seen,
                tried=tried,
                been=been,
                usual=place.split()[0] in USUAL.get(thing, "").split(),
            )
        )
        past += observation
        if verb == "go":
            tried = [*tried, place]
        elif verb not in WALK:
            tried, been = [], been | {*tried}
    return out


def cleaned(actions: list[str]) -> list[str]:
    """Without closing, and without looking for an object where it is not usually, or again where it
    was not."""
    steps = zip(actions, read([(action, "") for action in actions]), strict=True)
    return [
        action
        for action, s in steps
        if s.verb != "close"
        and not (
            s.verb in WALK
            and s.search
            and s.place != s.there
            and (not s.usual or s.place in s.been)
        )
    ]


def detour(u: str, steps: list) -> str | None:
    goal = re.findall(r"\w+", u.rsplit("Your task is to:", 1)[1])
    if steps[-1][0].split()[0] not in ("put", "toggle"):
        return f"ends before what the task asks for last: {steps[-1][0]}"
    if other := [s.object for s in read(steps) if s.verb == "take" and s.thing not in goal]:
        return f"takes an object that the task does not name: {other[0]}"
    searched = 0
    for i, s in enumerate(read(steps)):
        if s.verb == "put" and s.place.split()[0] not in goal:
            return f"puts an object where the task does not want it: {s.place}"
        if s.verb not in ("go", "open", "take", "put", "toggle", *STATE):
            return f"does something that the task does not need: {s.verb} {s.place}"
        if s.verb == "go" and (s.place in s.tried or s.seen and s.place != s.there):
            return f"walks back and forth: {s.place}"
        if s.verb == "go" and s.search:
            searched += bool(s.tried)
            if not s.usual or s.place in s.been:
                return f"looks for an object where it should not be: {s.thing} {at(s.place)}"
            if s.tried and re.search(rf"\b{s.thing} \d|is closed", steps[i - 1][1]):
                return f"leaves a place that has or may have what it needs: {s.tried[-1]}"
        if s.verb not in WALK and not s.tried:
            return f"needs no walk before: {s.verb} {s.object}"
    return None if searched else "finds everything at the first place"


def a(thing: str) -> str:
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"


def at(place: str) -> str:
    return f"{'in' if place.split()[0] in INSIDE else 'on'} the {place}"


def places(kinds: list[str]) -> str:
    """'on a desk, a dresser or a shelf, or in a drawer'"""
    said = []
    for word in dict.fromkeys("in" if kind in INSIDE else "on" for kind in kinds):
        *others, last = [a(k) for k in kinds if (k in INSIDE) == (word == "in")]
        said.append(f"{word} {', '.join(others)}{' or ' * bool(others)}{last}")
    return (", or " if " or " in said[0] else " or ").join(said)


def thoughts(u: str, steps: list) -> list[str]:
    room, goal = u.split("Your task is to:")
    two, target = " two " in goal, next((s.place for s in read(steps)[::-1] if s.verb == "put"), "")
    texts, before, done = [], "", []  # done: the manipulations so far
    for (_, observation), s in zip(steps, read(steps), strict=True):
        last, held = s.tried[-1] if s.tried else "", done[-1].thing if done else ""
        text, thing, here = "", s.thing, at(s.place)
        if s.verb == "go" and s.aim in ("take", "toggle"):
            need = f"I have the {held}. " if s.aim == "toggle" else ""
            need += (
                f"The second {thing} is still missing"
                if done and s.aim == "take"
                else f"Now I need {a(thing)} to look at it"
                if done
                else f"First I need {a(thing)}"
            )
            if s.seen:
                text = f"{need}. I saw {s.object} {here}, so I go back there"
            elif not last and s.been:
                text = f"{need}. I have not looked {here} yet, so I go there"
            elif not last:
                kinds = sorted(
                    (k for k in USUAL[thing].split() if f" {k} " in room),
                    key=lambda k: not s.place.startswith(k),
                )
                text = (
                    f"{need}. {a(thing).capitalize()} is usually {places(kinds)}. I start with "
                    f"the {s.place}"
                )
            elif before.endswith("you see nothing."):
                text = f"The {last} is empty, so I look {here} next"
            else:
                text = f"There is no {thing} {at(last)}, so I look {here} next"
        elif s.verb == "go" and s.aim == "put":
            state = STATE.get(done[-1].verb)
            if two and len(done) == 1:
                text = (
                    f"I can carry only one object, so I bring this {thing} to the {s.place} "
                    "before I fetch the second one"
                )
            else:
                text = (
                    f"The {thing} is {state} now"
                    if state
                    else f"I have the second {thing}"
                    if two
                    else f"I have the {thing}"
                ) + f". What is left is to put it {here}"
        elif s.verb == "go":
            text = (
                f"I have the {thing}. It has to be {STATE[s.aim]} before it goes {at(target)}, "
                f"and I can {s.aim} it with the {s.place}"
            )
        elif s.verb == "open" and s.aim == "put":
            text = f"The {s.place} is closed, so I open it to put the {thing} in"
        elif s.verb == "open" and not any("is closed" in t for t in texts):
            text = f"The {s.place} is closed, so I open it to see whether {a(thing)} is inside"
        elif s.verb == "take" and s.object not in " ".join(texts):
            text = f"There is {a(thing)} {here}, so I take it"
        elif s.verb in STATE and "is closed" in before:
            text = f"I can {s.verb} the {thing} without opening the {s.place}"
        elif s.verb == "toggle":
            text = f"The {s.object} is here, so I switch it on to look at the {held} in its light"
        texts.append(f"{text}." if text else "")
        before = observation
        done += [s] if s.verb not in ("go", "open") else []
    return texts
