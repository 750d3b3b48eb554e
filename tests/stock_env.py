"""The environments as their own packages play them, for comparison, in a process of its own.

Reads JSON lines and writes one for each: the transcript, and the seconds of the load, the reset and
each step.
    {"game": path, "actions": [...]}               an ALFWorld game
    {"game": path, "steps": n, "seed": s}          with random actions, every fifth one invalid
    {"task": "TYPE/VARIATION", "actions": [...]}   ScienceWorld
"""

import json
import os
import random
import sys
import time
from pathlib import Path


class ALFWorld:
    """A game as alfworld's AlfredTWEnv starts it, one episode at a time."""

    def __init__(self, path):
        import textworld
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler, AlfredInfos

        infos = textworld.EnvInfos(won=True, admissible_commands=True, extras=["gamefile"])
        self.env = textworld.start(path, infos, wrappers=[AlfredDemangler(), AlfredInfos])

    def reset(self):
        self.state = self.env.reset()
        return self.state.feedback

    def step(self, action):
        self.state, score, done = self.env.step(action)
        return self.state.feedback, float(score), bool(done), list(self.state.admissible_commands)


class ScienceWorld:
    """scienceworld's ScienceWorldEnv as its examples use it."""

    def __init__(self, task):
        from scienceworld import ScienceWorldEnv

        kind, variation = task.rsplit("/", 1)
        self.env = ScienceWorldEnv("", envStepLimit=1000)
        self.env.load(kind, int(variation), "easy", False)

    def reset(self):
        self.best = 0.0
        self.env.reset()
        return self.env.get_task_description()

    def step(self, action):
        observation, _, done, info = self.env.step(action)
        self.best = min(1.0, max(self.best, info["score"] / 100))
        return observation.strip(), self.best, bool(done), []


def peak_mb(pid: int) -> float:
    """Peak memory of a process and its children (a JVM), MB."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    status = Path(f"/proc/{pid}/status").read_text()
    own = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(own.split()[1]) / 1024 + sum(peak_mb(int(c)) for c in children)


def transcript(env, actions: list[str]) -> dict:
    """What the environment says to these actions, and the seconds of the reset and each step."""
    start = time.perf_counter()
    intro = env.reset()
    seconds = [time.perf_counter() - start]
    rows = []
    for action in actions:
        start = time.perf_counter()
        row = env.step(action)
        seconds.append(time.perf_counter() - start)
        rows.append([action, *row])
        if row[2]:
            break
    return {"intro": intro, "rows": rows, "seconds": seconds}


def random_actions(env: ALFWorld, steps: int, seed: int):
    """Admissible commands, each chosen when the step before it is done; every fifth is invalid."""
    draw = random.Random(seed)
    for i in range(steps):
        known = env.state.admissible_commands
        yield "go to nowhere 1" if i % 5 == 4 else draw.choice(known)


def main() -> None:
    out = sys.stdout
    sys.stdout = sys.stderr  # the packages print
    env = None
    name = None
    for line in sys.stdin:
        job = json.loads(line)
        start = time.perf_counter()
        wanted = job.get("game") or job["task"]
        if wanted != name:
            name = wanted
            env = ALFWorld(name) if "game" in job else ScienceWorld(name)
        load = time.perf_counter() - start
        if "actions" in job:
            actions = job["actions"]
        else:
            actions = random_actions(env, job["steps"], job["seed"])
        row = transcript(env, actions)
        row |= {"name": name, "load": load, "peak_mb": peak_mb(os.getpid())}
        print(json.dumps(row), file=out, flush=True)


if __name__ == "__main__":
    main()
