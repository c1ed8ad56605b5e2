"""A pickle reader that executes nothing: it understands what torch writes for tensors and DTensors, and refuses the rest.

Checkpoints are untrusted input, and pickles of DTensors name torch-internal classes that come and go between releases. So no
class is ever looked up: a GLOBAL is only a name. Names of tensor storage, placements and meshes become inert records, out of
which tensors' places in the file and their sharding are read; every other name ends the reading with a ValueError.
"""

from __future__ import annotations

import pickletools
from collections.abc import Hashable
from typing import Any

from retool.checkpoint.stored import Name, Record, Refused, call, expect, instance, name_of, storage_of

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
}  # fmt: skip
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def parse(data: bytes) -> Any:
    """The object that a pickle describes, tensors as `Stored` and `Sharded`. ValueError for anything else than data."""
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, argument)
    except Refused:
        raise
    except Exception as error:  # a broken stream can break the machine anywhere; what matters is that it is broken
        raise ValueError(f"broken pickle: {type(error).__name__}: {error}") from error
    raise ValueError("broken pickle: it has no end")


class _Machine:
    """The stack machine for the opcodes that torch writes."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def step(self, op: str, argument: Any) -> None:
        if op in LITERALS:
            self.stack.append(argument)
        elif op in CONSTANTS:
            self.stack.append(CONSTANTS[op])
        elif op in TUPLES:
            count = TUPLES[op]
            items = tuple(self.pop() for _ in range(count))[::-1]
            self.stack.append(items)
        elif op in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif op == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif op in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif op not in ("PROTO", "FRAME"):
            self._compose(op, argument)

    def _compose(self, op: str, argument: Any) -> None:
        match op:
            case "MARK":
                self.marks.append(self.stack)
                self.stack = []
            case "EMPTY_LIST":
                self.stack.append([])
            case "EMPTY_DICT":
                self.stack.append({})
            case "TUPLE":
                items = self.pop_mark()
                self.stack.append(tuple(items))
            case "APPEND" | "APPENDS":
                items = [self.pop()] if op == "APPEND" else self.pop_mark()
                expect(list, self.stack[-1]).extend(items)
            case "SETITEM" | "SETITEMS":
                items = self.pop_mark() if op == "SETITEMS" else [self.pop() for _ in range(2)][::-1]
                expect(dict, self.stack[-1]).update((_key(k), v) for k, v in zip(items[::2], items[1::2], strict=True))
            case "GLOBAL":
                self.stack.append(name_of(argument))
            case "STACK_GLOBAL":
                name, module = self.pop(), self.pop()
                self.stack.append(name_of(f"{module} {name}"))
            case "BINPERSID":
                self.stack.append(storage_of(self.pop()))
            case "REDUCE":
                args, function = self.pop(), self.pop()
                self.stack.append(call(expect(Name, function).name, expect(tuple, args)))
            case "NEWOBJ":
                args, cls = self.pop(), self.pop()
                self.stack.append(instance(expect(Name, cls).name, expect(tuple, args)))
            case "BUILD":
                state, target = self.pop(), self.stack[-1]
                if isinstance(target, Record):
                    target.state.update(expect(dict, state))
                else:
                    expect(dict, target)  # an OrderedDict's attributes (torch's _metadata): nothing that we need
            case _:
                raise Refused(f"refused pickle opcode {op}: torch writes no such thing for tensors")


def _key(value: Any) -> Hashable:
    """Only plain keys: hashing nested tuples can take exponential time."""
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"a dict key of type {type(value).__name__}")
    return value
