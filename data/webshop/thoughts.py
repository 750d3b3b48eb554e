"""What a person thinks while shopping, and which trajectories are worth imitating
(data/make_examples.py)."""

import re

PREFIX, FIXED, LONGEST, REPEATED = "Task: ", None, 4500, ""


def cleaned(actions: list[str]) -> list[str]:
    return actions


def fitting(keywords: str, observation: str) -> list[str]:
    """The codes, in lower case, of the results whose title has all keywords."""
    words = [word.rstrip("s") for word in keywords.lower().split()]
    titles = re.findall(r"(\w{10}) \[SEP\] (.+?) \[SEP\] \$", observation)
    return [code.lower() for code, title in titles if all(w in title.lower() for w in words)]


def detour(u: str, steps: list) -> str | None:
    if "price lower than" not in u:
        return "has no limit of the price"
    keywords, found = steps[0][0][len("search[") : -1], steps[0][1]
    if steps[1][0] not in [f"click[{code}]" for code in fitting(keywords, found)[:1]]:
        return "opens a product that does not have the keywords in its title, or not the first"
    wanted = dict(re.findall(r"(\w+): ([^,]+)", u))
    chosen = [a[len("click[") : -1] for a, o in steps if o.startswith("You have clicked")]
    return None if chosen == list(wanted.values()) else "does not choose just the wanted options"


def thoughts(u: str, steps: list) -> list[str]:
    ceiling = re.search(r"lower than (\S+) dollars", u)[1]
    names = {value: name for name, value in re.findall(r"(\w+): ([^,]+)", u)}
    texts, chosen, keywords, before = [], [], "", ""
    for action, observation in steps:
        value, text = re.search(r"\[(.*)\]", action)[1], ""
        result = re.search(rf"({value.upper()}) \[SEP\] (.+?) \[SEP\] (\$\S+)", before)
        if action.startswith("search"):
            keywords = value
            text = (
                "I search for the kind of product and for what it must be like. The "
                f"{' and the '.join(names.values())} can be chosen later on the product's "
                "page, and the results show the price."
            )
        elif result:
            code, title, price = result.groups()
            others = ", and no other result has" if len(fitting(keywords, before)) == 1 else ""
            text = (
                f'The title of {code}, "{title}", has all that I search for{others}. Its price '
                f"of {price} is below {ceiling} dollars, so I open its page."
            )
        elif value in names:
            text = (
                f"The {names[value]} is still missing; {value} can be chosen here."
                if chosen
                else f"This page offers the {names[value]} {value}, which the task wants."
            )
            chosen.append(f"{names[value]} {value}")
        elif value == "buy now":
            text = (
                f"The {' and the '.join(chosen)} are chosen, and kind and price are right: "
                "nothing is missing, so I buy it."
            )
        texts.append(text)
        before = observation
    return texts
