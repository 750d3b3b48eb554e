"""A toy environment: four rooms in a row, a thing to find in one of them."""

from common import Environment, InputError, task_type


class Corridor(Environment):
    """Reward: 0.5 in the thing's room, 1 (success) when it is taken. Touching the trap loses."""

    SPLITS = {"train": 0, "seen": 10, "unseen": 20}
    MAX_STEPS = {"find-lamp": 6, "find-key": 8}
    VERBS, FAILED, MAX_FAILURES = {"walk", "take", "go"}, ("You cannot",), 10
    SECONDS = {"expert": 0.001, "reset": 0.001, "step": 0.001}

    def columns(self, split):
        return [[f"{kind}/{self.SPLITS[split] + i}" for i in range(4)] for kind in self.MAX_STEPS]

    @classmethod
    def check(cls, task):
        if task_type(task) not in cls.MAX_STEPS or not task.split("/")[-1].isdigit():
            raise InputError(f"unknown task {task!r}: TYPE/NUMBER, TYPE one of find-lamp, find-key")

    def reset(self, task):
        self.check(task)
        kind, number = task.split("/")
        self.thing, self.room, self.goal = kind.removeprefix("find-"), 0, 1 + int(number) % 3
        self.reward = 0.0
        return f"Find the {self.thing} of corridor {number}."

    def step(self, action):
        if action == "touch the trap":
            return "You are lost.", self.reward, True, False
        if action == "walk on" and self.room < 3:
            self.room += 1
            found = self.room == self.goal
            self.reward = max(self.reward, 0.5 * found)
            seen = f"a {self.thing}" if found else "nothing"
            return f"You see {seen}.", self.reward, False, False
        if action == f"take {self.thing}" and self.room == self.goal:
            return f"You have the {self.thing}.", 1.0, True, True
        return "You cannot do that.", self.reward, False, False

    def expert(self, task):
        u, steps = self.reset(task), []
        for action in [*["walk on"] * self.goal, f"take {self.thing}"]:
            observation, reward, *_ = self.step(action)
            steps.append([action, observation])
        return {"instruction": u, "steps": steps, "reward": reward}

    @staticmethod
    def abstract(u, steps):
        return ["walk on until the thing is there", "take the thing"]
