"""A toy environment: four rooms in a row, a thing to find in one of them."""

from common import Environment, InputError, task_type


class Corridor(Environment):
    """Reward: 0.5 in the thing's room, 1 (success) when it is taken. Touching the trap loses."""

    SPLITS = {"train": 0, "seen": 10, "unseen": 20}
    MAX_STEPS = {"find-lamp": 6, "find-key": 8}
    VERBS = {"walk", "take", "go"}
    FAILED = ("You cannot",)
    MAX_FAILURES = 10
    SECONDS = {"expert": 0.001, "reset": 0.001, "step": 0.001}

    def columns(self, split):
        first = self.SPLITS[split]
        columns = []
        for kind in self.MAX_STEPS:
            columns.append([f"{kind}/{number}" for number in range(first, first + 4)])
        return columns

    @classmethod
    def check(cls, task):
        if task_type(task) not in cls.MAX_STEPS or not task.split("/")[-1].isdigit():
            raise InputError(f"unknown task {task!r}: TYPE/NUMBER, TYPE one of find-lamp, find-key")

    def reset(self, task):
        self.check(task)
        kind, number = task.split("/")
        self.thing = kind.removeprefix("find-")
        self.goal = 1 + int(number) % 3
        self.room = 0
        self.reward = 0.0
        return f"Find the {self.thing} of corridor {number}."

    def step(self, action):
        if action == "touch the trap":
            return "You are lost.", self.reward, True, False
        if action == "walk on" and self.room < 3:
            self.room += 1
            if self.room != self.goal:
                return "You see nothing.", self.reward, False, False
            self.reward = 0.5
            return f"You see a {self.thing}.", self.reward, False, False
        if action == f"take {self.thing}" and self.room == self.goal:
            return f"You have the {self.thing}.", 1.0, True, True
        return "You cannot do that.", self.reward, False, False

    def expert(self, task):
        u = self.reset(task)
        actions = ["walk on"] * self.goal + [f"take {self.thing}"]
        steps = []
        for action in actions:
            observation, reward, _done, _success = self.step(action)
            steps.append([action, observation])
        return {"instruction": u, "steps": steps, "reward": reward}

    @staticmethod
    def abstract(u, steps):
        return ["walk on until the thing is there", "take the thing"]
