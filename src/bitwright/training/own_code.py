"""Functions and classes of the user's own Python, named in a recipe: `FILE.py:NAME` or `MODULE:NAME`."""

import importlib
import importlib.util
import inspect
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from bitwright.errors import BitwrightError
from bitwright.training.lookup import close_matches, first_line


class Own(NamedTuple):
    """What a name stands for.

    role: "model" or "data", for messages. module: where `maker`, a class or function, was found.
    """

    role: str
    name: str
    module: ModuleType
    maker: Any

    def made(self, given: dict[str, Any], options: dict[str, Any]) -> Any:
        """`maker` called with `options`, and with those of `given` that it has parameters for.

        Raises: BitwrightError for an option that it does not take or lacks, and for code that raises.
        """
        arguments = self._arguments(given, options)
        try:
            return self.maker(**arguments)
        except Exception as error:
            raise self.error(f"cannot be made ({self.said(error)})") from error

    def error(self, what: str) -> BitwrightError:
        """One line that begins with the name."""
        return BitwrightError(f"{self.role} {self.name!r}: {what}")

    def said(self, error: BaseException) -> str:
        """Kind and first line of an error, and the last line of the user's code that it passed."""
        return _said(error, self.module)

    def _arguments(self, given: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        try:
            parameters = inspect.signature(self.maker).parameters
        except ValueError:  # compiled code need not have a signature
            return options
        named = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for option in options:
            if option not in named and not any_name:
                accepted = [n for n in named if n not in given]
                hint = close_matches(option, accepted) if accepted else "it takes none"
                raise BitwrightError(f"unknown option {option!r} for {self.role} {self.name!r}; {hint}")
        found = {k: v for k, v in given.items() if k in named} | options
        for needed in named:
            if parameters[needed].default is inspect.Parameter.empty and needed not in found:
                raise self.error(f"needs the option {needed!r}; give {self.role}.options.{needed}")
        return found


def find_own(role: str, name: str, returns: str) -> Own:
    """The class or function called `name`: `FILE.py:NAME`, the file relative to the present folder, or `MODULE:NAME`.

    The file's folder joins `sys.path`, so that it can import its neighbours. returns: what it should return, in words.

    Raises: BitwrightError for a file or name that is not there, and for a file that cannot be imported.
    """
    where, _, inner = name.rpartition(":")
    if not where or not inner:
        raise BitwrightError(f"{role} {name!r}: use FILE.py:NAME, a class or function of a Python file")
    module = import_own(role, name)
    if not hasattr(module, inner):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise BitwrightError(f"{role} {name!r}: {inner!r} is not in the file; {close_matches(inner, known)}")
    maker = getattr(module, inner)
    if not callable(maker):
        raise BitwrightError(f"{role} {name!r}: {inner!r} is a {type(maker).__name__}; use {returns}")
    return Own(role, name, module, maker)


def import_own(role: str, name: str) -> ModuleType:
    """The module of `FILE.py:NAME` or `MODULE:NAME`; one that was imported before is not run again."""
    where = name.rpartition(":")[0]
    path = Path(where).expanduser()
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise BitwrightError(f"{role} {name!r}: no such file; paths start at the folder that the command runs in")
    folder = str(path.resolve().parent if is_file else Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        if not is_file:
            return importlib.import_module(where)
        known = sys.modules.get(path.stem)
        if known is not None and Path(known.__file__ or "").resolve() == path.resolve():
            return known
        # Under its own name where that is free, as `import` would: pickles and its neighbours find it.
        key = path.stem if known is None else f"{path.stem} in {folder}"
        if key in sys.modules:
            return sys.modules[key]
        spec = importlib.util.spec_from_file_location(key, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[key] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[key]
            raise
        return module
    except (Exception, SystemExit) as error:
        raise BitwrightError(f"{role} {name!r}: cannot be imported ({_said(error, None)})") from error


def _said(error: BaseException, module: ModuleType | None) -> str:
    """Kind and first line of an error, and the last line of the user's code that it passed."""
    text = first_line(error)
    kind = type(error).__name__
    text = text if text.startswith(kind) else f"{kind}: {text}"
    if isinstance(error, SyntaxError):
        return f"{kind}: {error.msg}; {error.filename}, line {error.lineno}"
    own = [f for f in traceback.extract_tb(error.__traceback__) if module is None or f.filename == module.__file__]
    inside = [f for f in own if "importlib" not in f.filename and f.filename != __file__]
    return f"{text}; {inside[-1].filename}, line {inside[-1].lineno}" if inside else text
