"""What is cached while the units of a network are finished one by one, and how long.

A call of a module in a forward pass is a node: the path of the module and the number of the call. Nodes are the calls
of the units and of the modules around them. Once its units are finished, a whole module does not run again: its output
is cached, and those of the units inside are dropped.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

Node = tuple[str, int]


@dataclass(frozen=True)
class Dependencies:
    """Which calls of a forward pass need the output of which.

    Attributes:
        units: the paths of the units, in the order in which their first calls complete.
        calls: how often each unit is called.
        inputs: for each call of a unit the nodes that its inputs are computed from.
        output: for each node the nodes that its output is computed from when it runs.
        inside: for each node the nodes that run within it; in the order in which the nodes complete.
        same: for modules that return the output of a node inside as it is: that node.
    """

    units: list[str]
    calls: Mapping[str, int]
    inputs: Mapping[Node, frozenset[Node]]
    output: Mapping[Node, frozenset[Node]]
    inside: Mapping[Node, tuple[Node, ...]]
    same: Mapping[Node, Node]

    def nodes(self, unit: str) -> list[Node]:
        """The calls of a unit."""
        return [(unit, number) for number in range(self.calls[unit])]

    def inputs_of(self, unit: str) -> set[Node]:
        """The nodes that the inputs of a unit are computed from, in any of its calls."""
        return {node for call in self.nodes(unit) for node in self.inputs[call]}

    @cached_property
    def around(self) -> dict[str, set[Node]]:
        """For each unit the nodes within which it is called."""
        found: dict[str, set[Node]] = {unit: set() for unit in self.units}
        for node, inner in self.inside.items():
            for path, _ in inner:
                if path in found:
                    found[path].add(node)
        return found

    @cached_property
    def children(self) -> dict[Node | None, list[Node]]:
        """The nodes directly within each node; None: within none."""
        parents: dict[Node, Node] = {}
        for outer, inner in self.inside.items():  # the innermost one completes first
            for node in inner:
                parents.setdefault(node, outer)
        found: dict[Node | None, list[Node]] = defaultdict(list)
        for node in self.inside:
            found[parents.get(node)].append(node)
        return found

    @cached_property
    def users(self) -> dict[Node, set[Node]]:
        """For each node the calls of units, and the modules around them, that are computed from it."""
        found: dict[Node, set[Node]] = defaultdict(set)
        for user, needed in self.output.items():
            if user not in self.same:
                for node in self.inputs.get(user, needed):
                    found[node].add(user)
        return found

    def is_final(self, node: Node, finished: Collection[str], stored: Collection[Node]) -> bool:
        """Whether the output of a node stays as it is, because every unit that it is computed by is finished."""
        seen: set[Node] = set()
        todo = [node]
        while todo:
            current = todo.pop()
            if current in seen or current in stored:
                continue
            seen.add(current)
            if any(path in self.calls and path not in finished for path, _ in (current, *self.inside[current])):
                return False
            todo += self.output[current]
        return True

    def required(self, roots: Iterable[Node], stored: Collection[Node]) -> set[Node]:
        """The nodes that must be right if `roots` shall be: stored ones are read, the others run."""
        found: set[Node] = set()
        todo = list(roots)
        while todo:
            node = todo.pop()
            if node not in found:
                found.add(node)
                todo += [] if node in stored else self.output[node]
        return found


@dataclass
class Progress:
    """How far a network is: what is finished and what is stored. The same rules plan the work and do it.

    Attributes:
        of: the dependencies.
        finished: the units that are finished.
        stored: the nodes whose outputs are stored now.
        settled: the nodes whose outputs were stored at some time.
    """

    of: Dependencies
    finished: set[str] = field(default_factory=set)
    stored: set[Node] = field(default_factory=set)
    settled: set[Node] = field(default_factory=set)

    def next_pass(self, unit: str) -> tuple[set[Node], set[Node]]:
        """What a pass up to `unit` needs.

        Returns:
            the nodes that must be right, and those among them that it stores: outputs that are final now and that
            something later needs.
        """
        due = {node for node in self.of.output if self._is_due(node)}
        required = self.of.required(self.of.inputs_of(unit) | due, self.stored)
        late = {node for node in required - self.stored if self.of.is_final(node, self.finished, self.settled)}
        return required, {node for node in late if node not in self.of.same and node[0] != unit}

    def _is_due(self, node: Node) -> bool:
        if node in self.settled or node in self.of.same or node[0] in self.of.calls:
            return False
        return bool(self.of.users.get(node, set()) - self.settled) and self.of.is_final(
            node, self.finished, self.settled
        )

    def store(self, nodes: Iterable[Node]) -> None:
        """Note that outputs are stored."""
        self.stored.update(nodes)
        self.settled.update(nodes)

    def finish(self, unit: str) -> list[Node]:
        """Note that a unit is finished.

        Returns:
            its calls whose outputs are final, and so are stored. A call whose inputs depend on units that are not
            finished, or on an earlier call of the unit itself, runs again later.
        """
        final = [
            call
            for call in self.of.nodes(unit)
            if all(self.of.is_final(node, self.finished, self.settled) for node in self.of.inputs[call])
        ]
        self.finished.add(unit)
        self.store(final)
        return final


def plan(
    dependencies: Dependencies, inputs: Mapping[Node, int], outputs: Mapping[Node, int]
) -> tuple[dict[Node, int], int]:
    """Go through the work in advance.

    Args:
        dependencies: which calls need which.
        inputs: the elements of one sample of the inputs of each call of a unit.
        outputs: the elements of one sample of the output of each node.

    Returns:
        for each node that is stored the position of the last unit for which its output is needed; and the most
        elements of one sample that are stored at once by two networks, inputs and outputs.
    """
    progress = Progress(dependencies)
    first: dict[Node, int] = {}
    last: dict[Node, int] = {}
    for position, unit in enumerate(dependencies.units):
        required, stored = progress.next_pass(unit)
        last |= dict.fromkeys(required & progress.stored, position)
        progress.store(stored)
        for node in [*stored, *progress.finish(unit)]:
            first[node] = last[node] = position
    stored_at = [0] * len(dependencies.units)
    for node in first:
        for position in range(first[node], last[node] + 1):
            stored_at[position] += 2 * outputs[node]
    for position, unit in enumerate(dependencies.units):
        stored_at[position] += sum(inputs[call] for call in dependencies.nodes(unit))
        stored_at[position] += sum(
            2 * outputs[call] for call in dependencies.nodes(unit) if first.get(call) != position
        )
    return last, max(stored_at, default=0)
