"""One program of the engine: a function that is compiled for each form of its arrays."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from refimpl.engine.executables import Executable, store_of_this_machine, uncached


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
        depends_on: str,
    ) -> None:
        """Nothing is compiled yet.

        Args:
            name: of the function.
            function: of parameters, and of what may change from call to call.
            donated: whether the argument after the parameters is given away.
            options: for the compiler.
            depends_on: everything but its arrays, and but what all functions depend on, that could
                make it another function.
        """
        self.name = name
        self._function, self._donated, self._options = function, donated, dict(options)
        self._depends_on = depends_on
        self._store = store_of_this_machine()
        self._ready = dict[tuple[Any, ...], Executable]()

    def __call__(self, parameters: Any, *arrays: Any) -> Any:
        """The function's result.

        Raises:
            Whatever compiling or running it does.
        """
        leaves, tree = jax.tree.flatten((parameters, *arrays))
        # Parameters and state keep their form, and of the rest one array is at the end.
        form = (tree, leaves[-1].shape, leaves[-1].dtype)
        executable = self._ready.get(form)
        if executable is None:
            start = len(jax.tree.leaves(parameters))
            donated = range(start, start + len(jax.tree.leaves(arrays[0])) * self._donated)
            executable = self._ready[form] = self._prepared(leaves, tree, tuple(donated))
        return jax.tree.unflatten(executable.outputs, executable.run(*leaves))

    def _prepared(self, leaves: list[Any], tree: Any, donated: tuple[int, ...]) -> Executable:
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
