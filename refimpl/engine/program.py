"""One program of the engine: a function that is compiled for each form of its arrays."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from refimpl.engine.executables import Executable, ExecutableStore, uncached


class Program:
    """A function that is compiled, or read from disk, at its first call with arrays of a form.

    It passes leaves to the device, not trees: what is read from disk then knows nothing of our
    classes, and a call does not build them for each of its arguments.

    Attributes:
        name: of the function.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        *,
        donated: bool,
        options: Mapping[str, str],
        store: ExecutableStore | None,
        depends_on: str = "",
    ) -> None:
        """Nothing is compiled yet.

        Args:
            name: of the function.
            function: of parameters, and of what may change from call to call.
            donated: whether the argument after the parameters is given away.
            options: for the compiler.
            store: where it is kept; None keeps it in this process alone.
            depends_on: everything but its name, its arrays, and what the store depends on, that
                could make it another function.
        """
        self.name = name
        self._function, self._donated, self._options = function, donated, dict(options)
        self._depends_on = depends_on
        self._store = store
        self._ready = dict[Any, Executable]()
        self._bound: _Bound | None = None

    def __call__(self, parameters: Any, *arrays: Any) -> Any:
        """The function's result.

        Raises:
            Whatever compiling or running it does.
        """
        if self._bound is None or self._bound.parameters is not parameters:
            self._bound = self.of(parameters)
        return self._bound(*arrays)

    def of(self, parameters: Any) -> "_Bound":
        """The function of these parameters: a call of it need not take them apart again."""
        return _Bound(self, parameters)

    def prepared(self, leaves: list[Any], tree: Any, *, num_parameters: int) -> Executable:
        """What runs on these leaves, of which so many are parameters."""
        form = (tree, *[(leaf.shape, leaf.dtype) for leaf in leaves])
        executable = self._ready.get(form)
        if executable is None:
            _, *arrays = jax.tree.unflatten(tree, leaves)
            end = num_parameters + len(jax.tree.leaves(arrays[0])) * self._donated
            executable = self._read_or_compiled(leaves, tree, tuple(range(num_parameters, end)))
            self._ready[form] = executable
        return executable

    def _read_or_compiled(
        self, leaves: list[Any], tree: Any, donated: tuple[int, ...]
    ) -> Executable:
        shapes = [f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves]
        description = "\n".join((self._depends_on, str(tree), *shapes))
        if self._store is None:
            return self._compiled(leaves, tree, donated)
        kept = self._store.get(self.name, description)
        if kept is not None:
            return kept
        with uncached():
            executable = self._compiled(leaves, tree, donated)
        self._store.put(self.name, description, executable)
        return executable

    def _compiled(self, leaves: list[Any], tree: Any, donated: tuple[int, ...]) -> Executable:
        outputs: list[Any] = []

        def flat(*leaves: Any) -> list[Any]:
            result, result_tree = jax.tree.flatten(
                self._function(*jax.tree.unflatten(tree, leaves))
            )
            outputs.append(result_tree)
            return result

        flat.__name__ = self.name
        function = jax.jit(flat, donate_argnums=donated, compiler_options=self._options or None)
        return Executable(function.lower(*leaves).compile(), outputs[0])


class _Bound:
    """A program of certain parameters.

    Attributes:
        parameters: the tree.
    """

    def __init__(self, program: Program, parameters: Any) -> None:
        self.parameters = parameters
        self._program, self._leaves = program, jax.tree.leaves(parameters)
        self._ready = dict[Any, Executable]()

    def __call__(self, *arrays: Any) -> Any:
        """The function's result."""
        leaves, tree = jax.tree.flatten(arrays)
        # Within one tree the last array alone has more than one shape.
        form = (tree, leaves[-1].shape)
        executable = self._ready.get(form)
        if executable is None:
            every, whole = jax.tree.flatten((self.parameters, *arrays))
            executable = self._program.prepared(every, whole, num_parameters=len(self._leaves))
            self._ready[form] = executable
        return jax.tree.unflatten(executable.outputs, executable.run(*self._leaves, *leaves))
