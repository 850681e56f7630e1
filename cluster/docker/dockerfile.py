"""Parser of a Dockerfile into stages and instructions."""
import dataclasses
import pathlib
import re

HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass
class Stage:
    """A build stage: one FROM and its instructions."""

    base: str
    name: str
    steps: list  # (instruction, arguments)

    def all(self, instruction):
        """Returns the arguments of all instructions of a kind."""
        return [arguments for kind, arguments in self.steps if kind == instruction]


def read(path=HERE / "Dockerfile"):
    """Returns the stages in order, without comments and with continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if not re.match(r"\s*(#|$)", line)]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    stages = []
    for line in text.splitlines():
        kind, _, arguments = line.strip().partition(" ")
        if kind == "FROM":
            base, *rest = arguments.split()
            stages.append(Stage(base, rest[1] if len(rest) == 2 and rest[0] == "AS" else "", []))
        else:
            stages[-1].steps.append((kind, arguments.strip()))
    return stages
