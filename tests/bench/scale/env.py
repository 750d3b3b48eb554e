"""An environment that waits as long as a real one takes. settings.json beside this file says how
long, how many tasks there are, and the step limit of an episode."""

import json
import time
from pathlib import Path

from common import Environment

SETTINGS = json.loads(Path(__file__).with_name("settings.json").read_text())


class Scale(Environment):
    SPLITS = {"train": SETTINGS["tasks"]}
    MAX_STEPS = {"walk": SETTINGS["most_steps"]}
    VERBS = {"walk"}
    FAILED = ("no",)
    SECONDS = SETTINGS["seconds"]

    def columns(self, split):
        return [[f"walk/{i}" for i in range(SETTINGS["tasks"])]]

    def reset(self, task):
        time.sleep(self.SECONDS["reset"])
        return f"Task number {task}: " + "walk to the end of the road. " * 12

    def step(self, action):
        """An action says how far it is to the end: "walk on 3"."""
        time.sleep(self.SECONDS["step"])
        left = int(action.split()[-1])
        done = left == 0
        return "You walk on. " * 20, 1 / (1 + left), done, done

    def expert(self, task):
        instruction = self.reset(task)
        steps = []
        for left in range(5, -1, -1):
            action = f"walk on {left}"
            observation, _, _, _ = self.step(action)
            steps.append([action, observation])
        return {"instruction": instruction, "steps": steps, "reward": 1.0}

    @staticmethod
    def abstract(u, steps):
        return ["walk on", "walk to the end"]
